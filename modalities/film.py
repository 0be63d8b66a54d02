"""Reading single frames of a film's file by seeking. H rows, W columns."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plait.errors import MediaError

_EPSILON = 1e-4
"""Seconds; times of frames are rounded to the file's time base."""

_LIKELY_GOP_SECONDS = 2.0
"""Read on rather than seek up to here, in a file that lists no key frames."""


@dataclass(frozen=True, slots=True)
class FilmFacts:
    """What a film's header says; width and height after rotation."""

    seconds: float
    width: int
    height: int
    fps: float
    format: str
    bytes: int = 0


def film_facts(container: Any) -> FilmFacts:
    """Facts of a container's film; its first frame is decoded, which knows how it is turned.

    Raises:
        MediaError: there is no film, or it has no frames.
    """
    stream = video_stream(container)
    first = next(iter(container.decode(stream)), None)
    if first is None:
        raise MediaError("a film must have frames; this one has none; replace it")
    swapped = first.rotation % 180 != 0
    width, height = (first.height, first.width) if swapped else (first.width, first.height)
    seconds = _seconds(container, stream)
    if not 0 < seconds < float("inf"):
        raise MediaError("a film must last some time; this one has no length; save it again")
    fps = float(stream.average_rate or 0) or 1 / seconds
    return FilmFacts(seconds, width, height, fps, container.format.name)


def video_stream(container: Any) -> Any:
    """The first stream of moving pictures; the cover of a sound file is none.

    Raises:
        MediaError: there is none.
    """
    for stream in container.streams.video:
        if not stream.disposition & stream.disposition.attached_pic:
            return stream
    raise MediaError("a film must be in the file; this one has none; take another file")


def _seconds(container: Any, stream: Any) -> float:
    """The header's length; where it has none, up to the end of the last packet."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    if container.duration:
        return float(container.duration) / 1e6
    container.seek(0)
    end = 0.0
    for packet in container.demux(stream):
        if packet.pts is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
    return end - _start(stream)


def _start(stream: Any) -> float:
    return float((stream.start_time or 0) * stream.time_base)


def frames_at(container: Any, times: Sequence[float]) -> list[tuple[float, NDArray[np.uint8]]]:
    """(when it begins, its pixels) of the frame that is seen at each time; times do not decrease.

    Raises:
        MediaError: the film cannot be decoded there.
    """
    reader = _Reader(container)
    return [reader.frame_at(at) for at in times]


class _Reader:
    """Decodes forward, and seeks where that skips a key frame."""

    def __init__(self, container: Any) -> None:
        self.container, self.stream = container, video_stream(container)
        self.start = _start(self.stream)
        self.held: Any = None  # the frame seen now
        self.next: Any = None  # the one after it
        self._decoding: Iterator[Any] = iter(container.decode(self.stream))
        self._made: tuple[float, NDArray[np.uint8]] | None = None
        self._of: Any = None

    def frame_at(self, at: float) -> tuple[float, NDArray[np.uint8]]:
        if self.held is None or self._seeking_helps(at):
            self._seek(at)
        while self.next is not None and self._time(self.next) <= at + _EPSILON:
            self._advance()
        if self.held is None:
            raise MediaError(f"a film must have a frame at {at:.2f} s; replace it")
        if self._of is not self.held:
            self._of, self._made = self.held, (self._time(self.held), upright(self.held))
        assert self._made is not None
        return self._made

    def _time(self, frame: Any) -> float:
        """Seconds from the film's beginning."""
        return float(frame.pts * frame.time_base) - self.start if frame.pts is not None else 0.0

    def _seeking_helps(self, at: float) -> bool:
        if self.next is None:  # the end was reached
            return self._time(self.held) > at + _EPSILON
        now = self._time(self.next)
        if now > at:
            return self._time(self.held) > at + _EPSILON
        entries = self.stream.index_entries
        target = int((at + self.start) / float(self.stream.time_base))
        place = entries.search_timestamp(target) if len(entries) else -1
        if place < 0:
            return at - now > _LIKELY_GOP_SECONDS
        key = float(entries[place].timestamp * self.stream.time_base) - self.start
        return key > now

    def _seek(self, at: float) -> None:
        self._begin(at)
        if self.held is None or self._time(self.held) > at + _EPSILON:
            # The file's index leads past the frame: decode from the very beginning.
            self._begin(None)

    def _begin(self, at: float | None) -> None:
        place = 0 if at is None else int((at + self.start) / float(self.stream.time_base))
        self.container.seek(place, stream=self.stream, backward=True)
        self._decoding = iter(self.container.decode(self.stream))
        self.held = self.next = None
        self._advance()
        self._advance()

    def _advance(self) -> None:
        self.held = self.next if self.next is not None else self.held
        self.next = next(self._decoding, None)


def upright(frame: Any) -> NDArray[np.uint8]:
    """RGB (H, W, 3), turned as the file's display matrix says."""
    pixels: NDArray[np.uint8] = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4  # counter-clockwise
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels

"""Single frames of a compressed film, found by seeking."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plait.errors import MediaError
from plait.modalities import containers
from plait.modalities.frames import Facts, Frames, Pixels
from plait.modalities.limits import Limits
from plait.modalities.sources import Stored

_SEEK_AFTER = 2.0
"""Seconds to the next wanted frame from which seeking is tried where the file has no index."""

_EARLIER = 1.0
"""Seconds that a seek which landed too late is begun earlier; doubled until it lands."""


@dataclass(frozen=True, slots=True)
class _Display:
    """How stored frames are shown: upright `width` and `height`, and quarter turns to the left."""

    width: int
    height: int
    turns: int

    def show(self, frame: Any) -> Pixels:
        """The frame's pixels (height, width, 3), as they are meant to be seen."""
        width, height = (self.height, self.width) if self.turns % 2 else (self.width, self.height)
        stored = frame.reformat(width=width, height=height, format="rgb24").to_ndarray()
        return np.rot90(stored, self.turns)


def film_facts(container: Any, size: int, limits: Limits) -> Facts:
    """What the header says; of the frames, the first is decoded, which tells how the film lies.

    Raises:
        MediaError: there are no moving pictures, no frames, or frames over a limit.
    """
    stream = _stream(container)
    display = _display(stream, _first(container, stream), limits)
    seconds = containers.seconds_of(container, stream)
    if seconds is None:
        container.seek(0, backward=True)
        most = float(limits.max_video_seconds)
        seconds = containers.counted_seconds(container, stream, most)
    rate = stream.average_rate or stream.guessed_rate
    form = containers.format_of(container)
    return Facts(seconds, display.width, display.height, float(rate or 0), form, size)


def read_film(source: Stored, times: NDArray[np.float64], facts: Facts, limits: Limits) -> Frames:
    """The frames shown at `times`, in rising order, of the film's clock."""
    with containers.opened(source, "film", limits) as container:
        stream = _stream(container)
        display = _display(stream, _first(container, stream), limits)
        pixels = np.empty((len(times), facts.height, facts.width, 3), np.uint8)
        seconds = np.empty(len(times))
        reader = FrameReader(container, stream)
        for at, time in enumerate(times):
            frame = reader.at(float(time))
            if at and frame is reader.last:
                pixels[at] = pixels[at - 1]
            else:
                _check_size(frame.width, frame.height, limits)
                pixels[at] = display.show(frame)
            reader.last = frame
            seconds[at] = max(0.0, reader.second(frame))
        reader.check_end(float(times[-1]), facts.seconds)
        return Frames(pixels, seconds)


class FrameReader:
    """Frames of an open film by their time, for times that mostly rise.

    Decodes from the last keyframe at or before the time, or on from where it stands if no keyframe
    lies between. Only time stamps count, never a frame's number: the rate may vary.
    """

    def __init__(self, container: Any, stream: Any) -> None:
        self.last: Any | None = None
        self.decoded = 0
        self._container, self._stream = container, stream
        self._start = stream.start_time or 0
        self._index = stream.index_entries
        self._frames: Iterator[tuple[int, Any]] = iter(())
        self._shown: tuple[int, Any] | None = None
        self._next: tuple[int, Any] | None = None

    def second(self, frame: Any) -> float:
        """When the frame begins to be seen."""
        return float((_pts(frame) - self._start) * self._stream.time_base)

    def at(self, second: float) -> Any:
        """The frame shown at a time: the last that begins at or before it."""
        # A hundredth of a tick: a time computed from a frame's own must find that frame.
        wanted = self._start + math.floor(second / self._stream.time_base + 0.01)
        if self._shown is None or wanted < self._shown[0] or self._skips(wanted):
            self._seek(wanted)
        while self._next is not None and self._next[0] <= wanted:
            self._shown, self._next = self._next, next(self._frames, None)
        assert self._shown is not None
        return self._shown[1]

    def check_end(self, second: float, seconds: float) -> None:
        """
        Raises:
            MediaError: the film ended long before the last time that was asked for.
        """
        if self._next is not None or self._shown is None:
            return
        frame = self._shown[1]
        until = self.second(frame) + float((frame.duration or 0) * self._stream.time_base)
        if second - until > max(0.5, 0.05 * seconds):
            raise MediaError(
                f"a film must be as long as its header says, {seconds:g} s; this one ends at "
                f"{until:g} s; it is cut off: replace the file"
            )

    def _skips(self, wanted: int) -> bool:
        """Whether a keyframe lies between the frame that would come next and the wanted time."""
        if self._next is None or wanted <= self._next[0]:
            return False
        if len(self._index):
            entry = self._index.search_timestamp(wanted, backward=True)
            return entry >= 0 and int(self._index[entry].timestamp) > self._next[0]
        return bool((wanted - self._next[0]) * self._stream.time_base > _SEEK_AFTER)

    def _seek(self, wanted: int) -> None:
        target, earlier = wanted, math.ceil(_EARLIER / self._stream.time_base)
        while True:
            self._container.seek(max(target, self._start), stream=self._stream, backward=True)
            self._frames = self._decoded()
            self._shown = next(self._frames, None)
            if (self._shown is not None and self._shown[0] <= wanted) or target <= self._start:
                break
            target, earlier = target - earlier, 2 * earlier
        if self._shown is None:
            raise MediaError("a film must have frames; none can be decoded; replace the file")
        self._next = next(self._frames, None)

    def _decoded(self) -> Iterator[tuple[int, Any]]:
        for frame in self._container.decode(self._stream):
            self.decoded += 1
            yield _pts(frame), frame


def _pts(frame: Any) -> int:
    found = frame.pts if frame.pts is not None else frame.dts
    if found is None:
        raise MediaError("a film's frames must have time stamps; these have none; convert it")
    return int(found)


def _stream(container: Any) -> Any:
    stream = containers.film_stream(container)
    if stream is None:
        raise MediaError("it must hold moving pictures; this file has none; mend the row")
    return stream


def _first(container: Any, stream: Any) -> Any:
    frame = next(iter(container.decode(stream)), None)
    if frame is None:
        raise MediaError("a film must have frames; this one has none; replace the file")
    return frame


def _display(stream: Any, frame: Any, limits: Limits) -> _Display:
    aspect = float(stream.sample_aspect_ratio or 1)
    aspect = aspect if 0.25 <= aspect <= 4 else 1.0
    width, height = max(1, round(frame.width * aspect)), int(frame.height)
    _check_size(width, height, limits)
    turns = round(frame.rotation / 90) % 4
    return _Display(height, width, turns) if turns % 2 else _Display(width, height, turns)


def _check_size(width: int, height: int, limits: Limits) -> None:
    if not 0 < width * height <= limits.max_video_pixels:
        raise MediaError(
            f"a film's frame must have 1 to {limits.max_video_pixels:,} pixels; this one has "
            f"{width} x {height} = {width * height:,}; shrink it or raise max_video_pixels"
        )

"""Films: paths, bytes, lists of frames and animated pictures, of which single frames are read.

Frames are found by seeking: only what lies between a key frame and the frame that is wanted is
decoded. Shape letters: F frames, H rows, W columns.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from plait.errors import ConfigError, DataError, MediaError, Origin
from plait.modalities.animated import Animated, is_animated
from plait.modalities.audio import Audio, AudioHeader, file_digest, sound_header
from plait.modalities.containers import describe, opened, size_of
from plait.modalities.film import FilmFacts, film_facts, frames_at
from plait.modalities.image import Image
from plait.modalities.limits import Limits
from plait.modalities.part import MediaHeader, MediaPart

VideoSource = str | Path | bytes | Sequence[Any]
SoundPlace = Literal["interleaved", "after"]


@dataclass(frozen=True, slots=True)
class FrameSampling:
    """Which frames are read: `fps` a second and `max_frames` at most, or `count` uniform ones.

    Raises:
        ConfigError: a number is not above 0, or neither fps nor count is given.
    """

    fps: float | None = 1.0
    """Frames a second, from the beginning on; `count` comes before it."""

    max_frames: int | None = 64
    """A longer film is read at so many uniform times instead; None is no limit."""

    count: int | None = None
    """So many uniform times, each in the middle of its share of the film."""

    def __post_init__(self) -> None:
        for name in ("fps", "max_frames", "count"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} of a frame sampling must be above 0; it is {value}")
        if self.fps is None and self.count is None:
            raise ConfigError("a frame sampling needs fps or count; give one")

    def times(self, seconds: float) -> tuple[float, ...]:
        """The times, in seconds, of the frames read of a film of so many seconds."""
        if self.count is not None:
            return _uniform(seconds, self.count)
        fps = float(self.fps or 1.0)
        wanted = max(1, math.ceil(round(seconds * fps, 6)))
        if self.max_frames is not None and wanted > self.max_frames:
            return _uniform(seconds, self.max_frames)
        return tuple(number / fps for number in range(wanted))


def _uniform(seconds: float, count: int) -> tuple[float, ...]:
    return tuple((number + 0.5) * seconds / count for number in range(count))


@dataclass(frozen=True, slots=True)
class VideoHeader(MediaHeader):
    """Width and height in pixels as the film is meant to be seen.

    `seconds` is what the cut leaves. `audio` is the film's sound, where it has one and the sample
    reads it. `sampling` is the sample's own wish, which comes before the encoder's.
    """

    seconds: float
    width: int
    height: int
    fps: float
    format: str
    bytes: int
    audio: AudioHeader | None = None
    sampling: FrameSampling | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Frames:
    """Decoded frames: `pixels` uint8 (F, H, W, 3), and `seconds` float64 (F,), when each begins.

    F is the number of times that the sampling gives for the header's seconds; times count from
    the film's own beginning, a cut's start included.
    """

    pixels: NDArray[np.uint8]
    seconds: NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Video(MediaPart):
    """A film.

    Args:
        source: A path, a file's bytes, an animated WebP, GIF or PNG, or a list of pictures (paths,
            bytes, PIL images or arrays) of one size.
        start, end: Seconds; None is the film's own end.
        sampling: Which frames to read, where it is not the encoder's to say.
        sound: Where the film's own sound is read: "interleaved" second by second with the frames,
            "after" them, or None for not at all. A film without sound has none to read.
        fps: Of a list of pictures; 1 a second by default.

    Raises:
        MediaError: the source is none of these. What a path leads to is only read later.
    """

    source: VideoSource
    start: float = 0.0
    end: float | None = None
    sampling: FrameSampling | None = None
    sound: SoundPlace | None = None
    fps: float | None = None

    medium: ClassVar[str] = "video"

    def __post_init__(self) -> None:
        if isinstance(self.source, list | tuple):
            if not self.source:
                raise self._error("a film must have frames; this list is empty")
            if self.sound is not None:
                raise self._error("a list of pictures has no sound; leave sound out")
        elif not isinstance(self.source, str | Path | bytes):
            raise self._error(
                "a film must be a path, bytes or a list of pictures; it is "
                f"{type(self.source).__name__}"
            )
        elif self.fps is not None:
            raise self._error("a film's file says its own rate; leave fps out")
        if self.fps is not None and not self.fps > 0:
            raise self._error(f"fps must be above 0; it is {self.fps}")
        if self.sound is not None and self.sound not in get_args(SoundPlace):
            raise self._error(f"sound is 'interleaved', 'after' or None; it is {self.sound!r}")
        if not (self.start >= 0 and (self.end is None or self.start < self.end)):
            raise self._error(
                "a cut must go from a start of 0 or more to a later end; it goes from "
                f"{self.start} to {self.end}"
            )

    def __eq__(self, other: object) -> bool:
        """Paths and bytes compare by value; lists of pictures only with themselves."""
        if not isinstance(other, Video):
            return NotImplemented
        return self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[Any, ...]:
        held = self.source if isinstance(self.source, str | Path | bytes) else id(self.source)
        return type(self.source), held, self.cut, self.sound, self.fps

    @property
    def file(self) -> str:
        if isinstance(self.source, list | tuple):
            return f"<{len(self.source)} pictures>"
        return describe(self.source)

    @property
    def cut(self) -> str:
        facts = (self.start, self.end, self.sampling)
        return "" if facts == (0.0, None, None) else f"{self.start}:{self.end}:{self.sampling}"

    def header(self, limits: Limits = Limits()) -> VideoHeader:  # noqa: B008  (frozen)
        """Length, size, rate and sound; of a film's pictures only the first is decoded.

        Raises:
            MediaError: the file is missing, empty, over a limit or holds no film.
        """
        facts, sound = self._facts(limits)
        if facts.width * facts.height > limits.max_video_pixels:
            raise self._error(
                f"a film's frame must have at most {limits.max_video_pixels:,} pixels; this one "
                f"has {facts.width} x {facts.height}; scale it down or raise max_video_pixels"
            )
        last = facts.seconds if self.end is None else min(self.end, facts.seconds)
        if last <= self.start:
            raise self._error(
                f"a film must have frames; this one lasts {facts.seconds:.2f} s and is read from "
                f"{self.start} s; mend its start or replace it"
            )
        if last - self.start > limits.max_video_seconds:
            raise self._error(
                f"a film must have at most {limits.max_video_seconds:g} s; this one has "
                f"{last - self.start:.0f}; cut it with start and end, or raise max_video_seconds"
            )
        return VideoHeader(
            seconds=last - self.start,
            width=facts.width,
            height=facts.height,
            fps=facts.fps,
            format=facts.format,
            bytes=facts.bytes,
            audio=sound,
            sampling=self.sampling,
        )

    def load(self, limits: Limits, wanted: FrameSampling | None = None) -> Frames:
        """The frames seen at the sampling's times.

        Args:
            wanted: The encoder's sampling, where the sample has none of its own.

        Raises:
            MediaError: as for `header`, or a frame cannot be decoded, or too many are wanted.
        """
        header = self.header(limits)
        sampling = self.sampling or wanted or FrameSampling()
        times = [self.start + at for at in sampling.times(header.seconds)]
        if len(times) > limits.max_video_frames:
            raise self._error(
                f"at most {limits.max_video_frames} frames of a film are read; the sampling asks "
                f"for {len(times)}; lower its fps or count, or raise max_video_frames"
            )
        try:
            found = self._frames(times, limits)
        except DataError as error:
            raise error.at(Origin(file=self.file)) from None
        shape = (header.height, header.width, 3)
        for at, pixels in found:
            if pixels.shape != shape:
                raise self._error(
                    f"a film must keep its size, {header.width} x {header.height}; at {at:.2f} s "
                    f"it is {pixels.shape[1]} x {pixels.shape[0]}; save it again"
                )
        seconds = np.array([at for at, _ in found], dtype=np.float64)
        return Frames(np.stack([pixels for _, pixels in found]), seconds)

    def digest(self) -> str:
        """SHA-256, in hex, of the file's bytes, or over the pictures of a list."""
        if isinstance(self.source, str | Path | bytes):
            return file_digest(self.source, "video")
        digest = hashlib.sha256(f"plait film {self.fps}".encode())
        for picture in self._pictures():
            digest.update(picture.digest().encode())
        return digest.hexdigest()

    def soundtrack(self, header: MediaHeader) -> tuple[MediaPart | None, bool]:
        held = getattr(header, "audio", None)
        if self.sound is None or held is None or isinstance(self.source, list | tuple):
            return None, False
        assert isinstance(self.source, str | Path | bytes)
        track = Audio(self.source, start=self.start, end=self.end)
        return track, self.sound == "interleaved"

    def _pictures(self) -> list[Image]:
        assert isinstance(self.source, list | tuple)
        return [held if isinstance(held, Image) else Image(held) for held in self.source]

    def _facts(self, limits: Limits) -> tuple[FilmFacts, AudioHeader | None]:
        if not isinstance(self.source, str | Path | bytes):
            first = self._pictures()[0].header(limits)
            fps = self.fps or 1.0
            seconds = len(self.source) / fps
            return FilmFacts(seconds, first.width, first.height, fps, "pictures", first.bytes), None
        size = size_of(self.source, "video", limits.max_video_bytes)
        if is_animated(self.source):
            with Animated(self.source) as animated:
                return replace(animated.facts(), bytes=size), None
        with opened(self.source, "video") as container:
            facts = replace(film_facts(container), bytes=size)
            if self.sound is None or not container.streams.audio:
                return facts, None
            sound = sound_header(container, size, limits)
        return facts, sound

    def _frames(
        self, times: Sequence[float], limits: Limits
    ) -> list[tuple[float, NDArray[np.uint8]]]:
        """(when the frame begins, its pixels) at each time, which do not decrease."""
        if not isinstance(self.source, str | Path | bytes):
            pictures, fps = self._pictures(), self.fps or 1.0
            places = [min(int(at * fps + 1e-6), len(pictures) - 1) for at in times]
            return [(place / fps, pictures[place].decode(limits)) for place in places]
        if is_animated(self.source):
            with Animated(self.source) as animated:
                return animated.frames_at(times)
        with opened(self.source, "video") as container:
            return frames_at(container, times)

    def _error(self, message: str) -> MediaError:
        return MediaError(message, Origin(file=self.file))

"""Films: paths, bytes, lists of frames and animated pictures, of which single frames are read."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from plait.errors import MediaError, Origin
from plait.modalities import containers
from plait.modalities.animated import animation_facts, is_animation, read_animation
from plait.modalities.audio import Audio, AudioHeader
from plait.modalities.film import film_facts, read_film
from plait.modalities.frames import Facts, Frames, FrameSampling
from plait.modalities.image import Image
from plait.modalities.limits import Limits
from plait.modalities.part import MediaHeader, MediaPart
from plait.modalities.sources import (
    STORED,
    Stored,
    check_cut,
    cut_name,
    digest_of,
    name_of,
    reading,
    size_of,
)

VideoSource = Stored | Sequence[Any]


@dataclass(frozen=True, slots=True)
class VideoHeader(MediaHeader):
    """Width and height in pixels as the film is meant to be seen; `audio` is its sound,
    where it has one and the sample asks for it.

    `sampling` is the sample's own wish, which comes before the encoder's.
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
class Video(MediaPart):
    """A film.

    Args:
        source: A path, a file's bytes, an animated WebP, GIF or PNG, or a list of pictures, each
            anything that `Image` takes, all of one size.
        start, end: Seconds; None is the film's own end.
        sampling: Which frames to read, where it is not the encoder's to say.
        sound: Where the film's own sound is read: "interleaved" second by second with the frames,
            "after" them, or None for not at all.
        fps: Of a list of pictures; 1 a second by default.

    Raises:
        MediaError: the source is none of these, or the cut has no length.
    """

    source: VideoSource
    start: float = 0.0
    end: float | None = None
    sampling: FrameSampling | None = None
    sound: Literal["interleaved", "after"] | None = None
    fps: float | None = None

    medium: ClassVar[str] = "video"

    def __post_init__(self) -> None:
        if not isinstance(self.source, (*STORED, Sequence)):
            raise self._error(
                "a film must be a path, bytes or a list of pictures; it is "
                f"{type(self.source).__name__}"
            )
        if self.sound not in (None, "interleaved", "after"):
            raise self._error(
                f"a film's sound is 'interleaved', 'after' or None; it is {self.sound!r}"
            )
        check_cut(self.file, "film", self.start, self.end)
        if isinstance(self.source, STORED):
            if self.fps is not None:
                raise self._error("a film's file says its own rate; leave out fps")
            return
        if not self.source:
            raise self._error("a film must have frames; this list is empty; give pictures")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise self._error(f"a list's fps must be above 0; it is {self.fps}; mend the row")
        if self.sound is not None:
            raise self._error("a list of pictures has no sound; leave sound out")
        object.__setattr__(self, "source", tuple(self.source))

    def __eq__(self, other: object) -> bool:
        """Paths and bytes compare by value, with what is read of them; lists picture by picture."""
        if not isinstance(other, Video):
            return NotImplemented
        return self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[Any, ...]:
        where: Any = self.source
        if isinstance(where, tuple):
            where = tuple(map(_picture, where))
        how = (self.start, self.end, self.sampling, self.sound, self.fps)
        return type(self.source), where, *how

    @property
    def file(self) -> str:
        if isinstance(self.source, STORED):
            return name_of(self.source)
        first = self.source[0] if isinstance(self.source, Sequence) and self.source else None
        if isinstance(first, STORED):
            return name_of(first)
        return "<list of pictures>"

    @property
    def cut(self) -> str:
        wish = "" if self.sampling is None else f" {self.sampling!r}"
        rate = "" if self.fps is None else f" {self.fps!r} fps"
        return cut_name(self.start, self.end) + wish + rate

    @property
    def in_memory(self) -> bool:
        return isinstance(self.source, tuple) and all(
            _picture(picture).in_memory for picture in self.source
        )

    def header(self, limits: Limits = Limits()) -> VideoHeader:  # noqa: B008  (frozen)
        """Length, size, rate and sound; at most one frame is decoded, to learn how the film lies.

        Raises:
            MediaError: the file is missing, empty, over a limit or holds no film.
        """
        facts = self._facts(limits)
        end = facts.seconds if self.end is None else min(self.end, facts.seconds)
        seconds = end - self.start
        if not seconds > 0:
            raise self._error(
                f"a film must have frames between its start and end; this one is "
                f"{facts.seconds:g} s long, and is read from {self.start:g} s; mend the row"
            )
        if seconds > limits.max_video_seconds:
            raise self._error(
                f"a film must have at most {limits.max_video_seconds:g} s; this one has "
                f"{seconds:g} s; cut it by start and end, or raise max_video_seconds"
            )
        header = VideoHeader(
            seconds, facts.width, facts.height, facts.fps, facts.format, facts.bytes,
            self._sound(limits), self.sampling,
        )  # fmt: skip
        if self.sampling is not None:
            self._check_frames(self.sampling, header, limits)
        return header

    def load(self, limits: Limits, wanted: FrameSampling | None = None) -> Frames:
        """The frames that `wanted` (or the sample, or one a second) asks for, found by seeking.

        Raises:
            MediaError: as for `header`, or the film is cut off, or cannot be decoded.
        """
        header = self.header(limits)
        sampling = self.sampling or wanted or FrameSampling()
        self._check_frames(sampling, header, limits)
        times = np.array(sampling.times(header.seconds)) + self.start
        if isinstance(self.source, tuple):
            return self._stills(times, header, limits)
        source = self._stored()
        facts = Facts(
            self.start + header.seconds, header.width, header.height, header.fps, header.format,
            header.bytes,
        )  # fmt: skip
        with reading(source, "film", "decoded"):
            if self._animated():
                return read_animation(source, times, facts)
            return read_film(source, times, facts, limits)

    def soundtrack(self, header: MediaHeader) -> tuple[Audio | None, bool]:
        """The film's own sound, over the same cut, where the sample asks and the film has some."""
        assert isinstance(header, VideoHeader)
        if self.sound is None or header.audio is None:
            return None, False
        return Audio(self._stored(), None, self.start, self.end), self.sound == "interleaved"

    def digest(self) -> str:
        """SHA-256, in hex, of the file's bytes, or of the digests of a list's pictures."""
        if not isinstance(self.source, tuple):
            return digest_of(self._stored(), "film")
        digest = hashlib.sha256(b"plait frames")
        for picture in self.source:
            digest.update(bytes.fromhex(_picture(picture).digest()))
        return digest.hexdigest()

    @property
    def _rate(self) -> float:
        """Of a list, in pictures a second."""
        return self.fps or 1.0

    def _stored(self) -> Stored:
        assert isinstance(self.source, STORED)
        return self.source

    def _animated(self) -> bool:
        return is_animation(self._stored())

    def _facts(self, limits: Limits) -> Facts:
        if isinstance(self.source, tuple):
            first = _picture(self.source[0]).header(limits)
            seconds = len(self.source) / self._rate
            return Facts(seconds, first.width, first.height, self._rate, "pictures", first.bytes)
        source = self._stored()
        size = size_of(source, "film", limits.max_video_bytes, "max_video_bytes")
        with reading(source, "film", "read"):
            if self._animated():
                return animation_facts(source, size, limits)
            with containers.opened(source, "film", limits) as container:
                return film_facts(container, size, limits)

    def _sound(self, limits: Limits) -> AudioHeader | None:
        """The header of the sound that is read beside the frames; None where there is none."""
        if self.sound is None or isinstance(self.source, tuple) or self._animated():
            return None
        with containers.opened(self._stored(), "film", limits) as container:
            if containers.sound_stream(container) is None:
                return None
        return Audio(self._stored(), None, self.start, self.end).header(limits)

    def _stills(self, times: Any, header: VideoHeader, limits: Limits) -> Frames:
        assert isinstance(self.source, tuple)
        numbers = np.floor(times * self._rate + 1e-6).astype(int).clip(0, len(self.source) - 1)
        pixels = np.empty((len(times), header.height, header.width, 3), np.uint8)
        for at, number in enumerate(numbers):
            picture = _picture(self.source[number]).load(limits)
            if picture.shape != pixels.shape[1:]:
                raise self._error(
                    f"a film's pictures must have one size; picture {number} is "
                    f"{picture.shape[1]} x {picture.shape[0]}, the first is {header.width} x "
                    f"{header.height}; resize them"
                )
            pixels[at] = picture
        return Frames(pixels, numbers / self._rate)

    def _check_frames(self, sampling: FrameSampling, header: VideoHeader, limits: Limits) -> None:
        number = sampling.frames(header.seconds)
        memory = number * header.width * header.height * 3
        if number > limits.max_video_frames:
            raise self._error(
                f"a film must be read with at most {limits.max_video_frames:,} frames; its "
                f"sampling asks for {number:,}; ask for fewer or raise max_video_frames"
            )
        if memory > limits.max_video_memory:
            raise self._error(
                f"the frames of a film must fit in {limits.max_video_memory:,} bytes; {number:,} "
                f"of {header.width} x {header.height} take {memory:,}; ask for fewer or raise "
                "max_video_memory"
            )

    def _error(self, message: str) -> MediaError:
        return MediaError(message, Origin(file=self.file))


def _picture(picture: Any) -> Image:
    return picture if isinstance(picture, Image) else Image(picture)


__all__ = ["FrameSampling", "Frames", "Video", "VideoHeader"]

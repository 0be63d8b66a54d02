"""Films: paths, bytes, lists of frames and animated pictures, of which single frames are read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from plait.modalities.audio import AudioHeader
from plait.modalities.limits import Limits
from plait.modalities.part import MediaHeader, MediaPart

VideoSource = str | Path | bytes | Sequence[Any]


@dataclass(frozen=True, slots=True)
class FrameSampling:
    """Which frames are read: `count` uniform ones, or `fps` a second and `max_frames` at most."""

    fps: float | None = 1.0
    max_frames: int | None = 64
    count: int | None = None

    def times(self, seconds: float) -> tuple[float, ...]:
        """The times, in seconds, of the frames read of a film of so many seconds."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class VideoHeader(MediaHeader):
    """Width and height in pixels as the film is meant to be seen; `audio` is its sound, if any.

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
class Frames:
    """Decoded frames: `pixels` uint8 (F, H, W, 3) and `seconds` float64 (F,), when each is seen.

    F is the number of times that the sampling gives for the header's seconds.
    """

    pixels: NDArray[np.uint8]
    seconds: NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Video(MediaPart):
    """A film.

    Args:
        source: A path, a file's bytes, an animated WebP or GIF, or a list of pictures.
        start, end: Seconds; None is the film's own end.
        sampling: Which frames to read, where it is not the encoder's to say.
        sound: Where the film's own sound is read: "interleaved" second by second with the frames,
            "after" them, or None for not at all.
        fps: Of a list of pictures.
    """

    source: VideoSource
    start: float = 0.0
    end: float | None = None
    sampling: FrameSampling | None = None
    sound: Literal["interleaved", "after"] | None = None
    fps: float | None = None

    medium: ClassVar[str] = "video"

    @property
    def file(self) -> str:
        raise NotImplementedError

    def header(self, limits: Limits = Limits()) -> VideoHeader:  # noqa: B008
        raise NotImplementedError

    def load(self, limits: Limits, wanted: FrameSampling | None = None) -> Frames:
        raise NotImplementedError

    def digest(self) -> str:
        raise NotImplementedError

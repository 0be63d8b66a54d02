"""Which frames of a film are read, and what reading them gives."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from plait.errors import ConfigError

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class FrameSampling:
    """Which frames are read: `count` uniform ones, or `fps` a second and `max_frames` at most.

    Raises:
        ConfigError: a number is not above 0, or neither `fps` nor `count` is given.
    """

    fps: float | None = 1.0
    max_frames: int | None = 64
    count: int | None = None

    def __post_init__(self) -> None:
        for name in ("fps", "max_frames", "count"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} of frames must be above 0; it is {value}")
        if self.fps is None and self.count is None:
            raise ConfigError("frames are read by fps or by count; both are None: give one")

    def frames(self, seconds: float) -> int:
        """How many frames are read of a film of so many seconds."""
        if self.count is not None:
            return self.count
        assert self.fps is not None
        # A film of 2 s at 30 fps holds 60 frames, whatever rounding says of 2 * 30.
        there = max(1, math.ceil(seconds * self.fps - 1e-6))
        return there if self.max_frames is None else min(there, self.max_frames)

    def times(self, seconds: float) -> tuple[float, ...]:
        """The times, in seconds, of the frames read of a film of so many seconds.

        By `fps` from 0 on; by `count`, and where those would be too many, the middles of so many
        equal parts.
        """
        number = self.frames(seconds)
        if self.count is None and self.fps is not None and number >= seconds * self.fps - 1e-6:
            return tuple(at / self.fps for at in range(number))
        return tuple((at + 0.5) * seconds / number for at in range(number))


@dataclass(frozen=True, slots=True, eq=False)
class Frames:
    """Decoded frames: `pixels` uint8 (F, H, W, 3) and `seconds` float64 (F,), when each is seen.

    F is the number of times that the sampling gives for the header's seconds. A frame is seen from
    its own time stamp on, which is at or before the time that was asked for. Times count from the
    film's own beginning, a cut's start included.
    """

    pixels: Pixels
    seconds: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Facts:
    """What a film's header says of the whole file: seconds, upright size in pixels, and format."""

    seconds: float
    width: int
    height: int
    fps: float
    format: str
    bytes: int

"""Sounds: paths, bytes and arrays, all read to mono float32 at the rate that an encoder asks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from plait.modalities.limits import Limits
from plait.modalities.part import MediaHeader, MediaPart

AudioSource = str | Path | bytes | NDArray[Any]


@dataclass(frozen=True, slots=True)
class AudioHeader(MediaHeader):
    """`samples` at `rate` Hz in one channel, after the cut that the part asks for.

    `decode` gives exactly these many samples, resampled: `ceil(samples * wanted.rate / rate)`.
    """

    samples: int
    rate: int
    channels: int
    format: str
    bytes: int

    @property
    def seconds(self) -> float:
        return self.samples / self.rate

    def samples_at(self, rate: int) -> int:
        """How many samples decoding at `rate` Hz gives."""
        return -(-self.samples * rate // self.rate)


@dataclass(frozen=True, slots=True)
class AudioRequest:
    """The sampling rate, in Hz, that an encoder reads."""

    rate: int


@dataclass(frozen=True, slots=True, eq=False)
class Audio(MediaPart):
    """A sound.

    Args:
        source: A path, a file's bytes, or an array (samples,) or (channels, samples).
        rate: Of an array, in Hz; files say their own.
        start, end: Seconds; only what lies between is decoded. None is the file's own end.
    """

    source: AudioSource
    rate: int | None = None
    start: float = 0.0
    end: float | None = None

    medium: ClassVar[str] = "audio"

    @property
    def file(self) -> str:
        raise NotImplementedError

    def header(self, limits: Limits = Limits()) -> AudioHeader:  # noqa: B008
        raise NotImplementedError

    def load(self, limits: Limits, wanted: AudioRequest | None = None) -> NDArray[np.float32]:
        raise NotImplementedError

    def digest(self) -> str:
        raise NotImplementedError

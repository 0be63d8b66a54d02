"""Log-mel frames in patches, as features: whatever is learned is learned by the projector.

Shape letters: S samples, T frames, M mel bins, N patches.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchaudio.functional import melscale_fbanks

from plait.encoders.base import Encoder, Grid, Inputs
from plait.errors import ConfigError, MediaError, UnknownNameError
from plait.modalities import AudioHeader, AudioRequest
from plait.stream import Encoded

_FLOOR = 1e-10
"""Power below this is silence."""


class Mel(Encoder):
    """Patches of `patch` log-mel frames, flattened; no parameters.

    Args:
        rate: Hz.
        bins: Mel bins between 0 and half the rate.
        window, hop: Of a frame, in seconds. Frame t is centred at t hops, with silence before the
            sound and behind it.
        patch: Frames of a position.
        normalise: "item" gives each sound zero mean and unit variance over all its frames and
            bins, so that loudness does not count; "fixed" is (log10(power) + 4) / 4. The last
            patch is filled up with the mean in the one case, with silence in the other.

    Raises:
        ConfigError: a number is out of range, or the window is too short to tell the bins apart.
    """

    medium = "audio"

    def __init__(
        self,
        rate: int = 16_000,
        bins: int = 80,
        window: float = 0.025,
        hop: float = 0.01,
        patch: int = 8,
        normalise: str = "item",
        name: str = "mel",
    ) -> None:
        super().__init__(name)
        _check_whole("rate", rate, 1_000, 384_000)
        _check_whole("bins", bins, 1, 1_024)
        _check_whole("patch", patch, 1, 10_000)
        if normalise not in _NORMALISE:
            raise UnknownNameError("normalise", normalise, _NORMALISE)
        self.rate, self.bins, self.patch, self.normalise = rate, bins, patch, normalise
        self.window = _samples("window", window, rate)
        self.hop = _samples("hop", hop, rate)
        self.width = bins * patch
        self.filters = _filters(rate, bins, self.window)

    def wanted(self, header: AudioHeader) -> AudioRequest:  # noqa: ARG002
        return AudioRequest(self.rate)

    def plan(self, header: AudioHeader) -> Grid:
        return self._patches(header.samples_at(self.rate)), 1, 1

    def seconds(self, header: AudioHeader, grid: Grid) -> tuple[float, ...]:  # noqa: ARG002
        return self._times(grid[0])

    def process(self, sound: NDArray[np.float32]) -> dict[str, Tensor]:
        """(S,) -> (N, patch * M)."""
        patches = self._patches(len(sound))
        samples = torch.from_numpy(np.ascontiguousarray(sound))
        count = -(-len(samples) // self.hop)
        before = self.window // 2
        behind = max(0, (count - 1) * self.hop + self.window - before - len(samples))
        frames = F.pad(samples, (before, behind)).unfold(0, self.window, self.hop)[:count]
        power = torch.fft.rfft(frames * torch.hann_window(self.window)).abs().square()
        logs = torch.log10((power @ self.filters).clamp_min(_FLOOR))
        normal, filling = _NORMALISE[self.normalise](logs)
        missing = patches * self.patch - count
        filled = torch.cat([normal, filling.expand(missing, self.bins)])
        return {"patches": filled.reshape(patches, self.width)}

    def forward(self, inputs: Sequence[Inputs]) -> list[Encoded]:
        rows = [item["patches"] for item in inputs]
        return [Encoded(row, (), (len(row), 1, 1), self._times(len(row))) for row in rows]

    def processing(self) -> str:
        return (
            f"log-mel {self.bins} bins at {self.rate} Hz, window {self.window}, hop {self.hop}, "
            f"patches of {self.patch}, normalised {self.normalise}"
        )

    def _patches(self, samples: int) -> int:
        if samples < 1:
            raise MediaError(
                f"a sound must hold at least one sample; the one for encoder {self.name!r} is "
                "empty: leave it out"
            )
        return -(-samples // (self.hop * self.patch))

    def _times(self, patches: int) -> tuple[float, ...]:
        return tuple(number * self.patch * self.hop / self.rate for number in range(patches))


def _fixed(logs: Tensor) -> tuple[Tensor, Tensor]:
    """(T, M) normalised, and (1, 1) what fills the last patch: silence."""
    silence = torch.full((1, 1), np.log10(_FLOOR))
    return (logs + 4) / 4, (silence + 4) / 4


def _per_item(logs: Tensor) -> tuple[Tensor, Tensor]:
    """(T, M) of zero mean and unit variance, and (1, 1) what fills the last patch: the mean."""
    normal = (logs - logs.mean()) / (logs.std(correction=0) + 1e-5)
    return normal, torch.zeros(1, 1)


_NORMALISE = {"item": _per_item, "fixed": _fixed}


def _filters(rate: int, bins: int, window: int) -> Tensor:
    """(window / 2 + 1, M) triangles of equal area, as Whisper's.

    Raises:
        ConfigError: a bin falls between two frequencies of the window.
    """
    filters: Tensor = melscale_fbanks(
        window // 2 + 1, 0.0, rate / 2, bins, rate, norm="slaney", mel_scale="slaney"
    )
    if not bool(filters.sum(dim=0).all()):
        raise ConfigError(
            f"a window of {window} samples at {rate} Hz cannot tell {bins} mel bins apart; take "
            "fewer bins or a longer window"
        )
    return filters


def _check_whole(name: str, value: int, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ConfigError(f"{name} is a whole number from {least} to {most}; got {value!r}")


def _samples(name: str, seconds: float, rate: int) -> int:
    """A length of at most a second, in samples."""
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not number or not 2 / rate <= seconds <= 1:
        raise ConfigError(f"{name} is in seconds, from two samples to 1; got {seconds!r}")
    return round(seconds * rate)

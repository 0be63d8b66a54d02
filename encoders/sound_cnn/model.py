"""The network of aiSFX without its classifiers, and the spectrogram that it was trained on.

Source: Ma et al., "Representation Learning for the Automatic Indexing of Sound Effects Libraries"
(ISMIR 2022). Shape letters: B blocks, T frames, M mel bins, S samples, C channels.
"""

import re
from functools import cache
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from plait.errors import FetchError

WIDTH = 512
RATE = 44_100
FRAME, HOP, BINS = 2048, 1024, 96
BLOCK = 100
"""Frames that the network reads at once, 2.3 seconds."""

_HIGHEST = 9.457798957824707
"""The largest value of the spectrograms that it was trained on."""


def frame_count(samples: int) -> int:
    """Frames of so many samples: centred at 0, at HOP, and so on past the end."""
    return -(-samples // HOP) + 1


def spectrogram(sound: Tensor) -> Tensor:
    """(S,) -> (T, M) between 0 and about 1; silence is 0.

    As Essentia makes it, on which the weights were trained (its librosa stand-in in the package
    differs): frames from half a frame before the sound, a symmetric Hann window, triangles in mel.
    """
    count = frame_count(len(sound))
    padded = F.pad(sound.double(), (HOP, count * HOP + FRAME - HOP - len(sound)))
    frames = padded.unfold(0, FRAME, HOP)[:count]
    window = torch.hann_window(FRAME, periodic=False, dtype=torch.float64)
    power = torch.fft.rfft(frames * window).abs().square()
    mel = power @ torch.from_numpy(mel_filters()).T
    return (torch.log10(1e4 * mel + 1) / _HIGHEST).float()


@cache
def mel_filters() -> NDArray[np.float64]:
    """(M, FRAME / 2 + 1): triangles whose slopes are straight in mel; each sums to 1."""
    highest = _mel(np.asarray(RATE / 2))
    edges = np.linspace(0.0, highest, BINS + 2)[:, None]
    at = _mel(np.arange(FRAME // 2 + 1) * RATE / FRAME)[None]
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    rising, falling = (at - low) / (centre - low), (high - at) / (high - centre)
    filters: NDArray[np.float64] = np.maximum(0, np.minimum(rising, falling))
    filters /= filters.sum(axis=1, keepdims=True)
    return filters


def _mel(hertz: NDArray[np.float64]) -> NDArray[np.float64]:
    scaled: NDArray[np.float64] = 2595 * np.log10(1 + hertz / 700)
    return scaled


class Block(nn.Module):
    """Two convolutions with BatchNorm and ReLU, then the largest of `pool` x `pool`."""

    def __init__(self, inputs: int, outputs: int, pool: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.max_pool2d(x, self.pool)


class SoundNet(nn.Module):
    """(B, T, M) -> (B, 512): the mean over what is left of the bins, the largest over time."""

    def __init__(self) -> None:
        super().__init__()
        channels = [1, 64, 128, 256, WIDTH]
        self.blocks = nn.Sequential(
            *(
                Block(inputs, outputs, 1 if outputs == WIDTH else 2)
                for inputs, outputs in pairwise(channels)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        maps: Tensor = self.blocks(x[:, None])
        return maps.mean(dim=3).amax(dim=2)


def convert_reference_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of `aisfx` to ours; its classifiers are dropped.

    Raises:
        FetchError: a weight of `SoundNet` is absent, of another shape, or unknown.
    """
    converted = {
        re.sub(r"^embedding_net\.conv_block(\d)\.", _block_name, name): tensor
        for name, tensor in state.items()
        if not name.startswith("fc.")
    }
    expected = {name: tensor.shape for name, tensor in SoundNet().state_dict().items()}
    wrong = sorted(expected.keys() ^ converted.keys()) or [
        name for name, shape in expected.items() if converted[name].shape != shape
    ]
    if wrong:
        raise FetchError(
            f"weights must be those of aiSFX: {wrong[0]!r} and {len(wrong) - 1} more are absent, "
            "unknown or of another shape; use aisfx"
        )
    return converted


def _block_name(match: re.Match[str]) -> str:
    return f"blocks.{int(match[1]) - 1}."

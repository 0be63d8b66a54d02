"""The sound-effect network as an encoder: a feature of 512 channels for every block of frames."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from plait.encoders.base import Encoder, Grid, Inputs, weights_folder
from plait.encoders.sound_cnn.model import (
    BINS,
    BLOCK,
    HOP,
    RATE,
    WIDTH,
    SoundNet,
    frame_count,
    spectrogram,
)
from plait.errors import ConfigError, MediaError
from plait.modalities import AudioHeader, AudioRequest
from plait.stream import Encoded

ARCHITECTURE = "aisfx"
_AT_ONCE = 64
"""Blocks that are convolved together: 64 take half a gigabyte."""


class SoundCnn(Encoder):
    """Frozen or trained aiSFX; a sound takes a feature for each block of 2.3 seconds.

    The last block is filled up with silence.

    Args:
        weights: A folder with `model.safetensors` and `config.json`, or any name that
            `plait.encoders.weights.resolve` knows.
        hop: From one block to the next, as a fraction of a block; 0.5 is the published one.

    Raises:
        ConfigError: the folder does not hold these weights, or the hop is not between 0.01 and 1.
    """

    medium = "audio"
    width = WIDTH

    def __init__(self, weights: str | Path, hop: float = 0.5, name: str = "sound_cnn") -> None:
        super().__init__(name)
        number = isinstance(hop, int | float) and not isinstance(hop, bool)
        if not number or not 1 / BLOCK <= hop <= 1:
            raise ConfigError(
                f"hop is a fraction of a block of {BLOCK} frames, 0.01 to 1; got {hop!r}"
            )
        self.hop = round(BLOCK * hop)
        self.model = SoundNet()
        _load_weights(self.model, weights_folder(weights))

    def wanted(self, header: AudioHeader) -> AudioRequest:  # noqa: ARG002
        return AudioRequest(RATE)

    def plan(self, header: AudioHeader) -> Grid:
        return self._blocks(header.samples_at(RATE)), 1, 1

    def seconds(self, header: AudioHeader, grid: Grid) -> tuple[float, ...]:  # noqa: ARG002
        return self._times(grid[0])

    def process(self, sound: NDArray[np.float32]) -> dict[str, Tensor]:
        """The frames of all blocks, without repeating those that blocks share."""
        blocks = self._blocks(len(sound))
        frames = torch.zeros((blocks - 1) * self.hop + BLOCK, BINS)
        made = spectrogram(torch.from_numpy(np.ascontiguousarray(sound)))
        frames[: len(made)] = made[: len(frames)]
        return {"frames": frames}

    def forward(self, inputs: Sequence[Inputs]) -> list[Encoded]:
        # (blocks, bins, frames) -> (blocks, frames, bins)
        blocks = [
            item["frames"].to(self.device, self.dtype).unfold(0, BLOCK, self.hop).transpose(1, 2)
            for item in inputs
        ]
        features = torch.cat(
            [self.model(part) for part in torch.split(torch.cat(blocks), _AT_ONCE)]
        )
        return [
            Encoded(part, grid=(len(part), 1, 1), seconds=self._times(len(part)))
            for part in torch.split(features, [len(item) for item in blocks])
        ]

    def processing(self) -> str:
        return f"aisfx spectrogram, blocks of {BLOCK} every {self.hop} frames, last one padded"

    def _times(self, blocks: int) -> tuple[float, ...]:
        return tuple(number * self.hop * HOP / RATE for number in range(blocks))

    def _blocks(self, samples: int) -> int:
        """Blocks that cover all frames; the reference's count where it drops no partial block."""
        if samples < 1:
            raise MediaError(
                f"a sound must hold at least one sample; the one for encoder {self.name!r} is "
                "empty: leave it out"
            )
        return max(1, -(-(frame_count(samples) - BLOCK) // self.hop) + 1)


def _load_weights(model: SoundNet, folder: Path) -> None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise ConfigError(
            "encoder 'sound_cnn' needs a folder with the config.json and model.safetensors that "
            f"`plait fetch` makes; {str(folder)!r} is not one: {error}"
        ) from error
    if config.get("architecture") != ARCHITECTURE:
        raise ConfigError(
            f"encoder 'sound_cnn' needs a config.json with architecture {ARCHITECTURE!r}; that of "
            f"{str(folder)!r} has {config.get('architecture')!r}"
        )

"""Any Whisper, wav2vec2, HuBERT or WavLM checkpoint as an encoder.

Shape letters: S samples, T positions, C channels.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from plait.encoders.base import Encoder, Grid, Inputs, weights_folder
from plait.encoders.hf_audio.model import load_tower
from plait.encoders.hf_vision.encoder import DTYPES
from plait.errors import ConfigError, MediaError, UnknownNameError
from plait.modalities import AudioHeader, AudioRequest
from plait.stream import Encoded

_WINDOW_SECONDS = 30.0


class HfAudio(Encoder):
    """The positions of a transformers sound tower, as many as the sound is long.

    A sound longer than a window is read in windows, each as if it were alone, one after another.

    Args:
        weights: A checkpoint folder, or a hub id or other name that
            `plait.encoders.weights.resolve` knows. Only its sound tower is kept in memory.
        layer: -1 is the tower's output with its final norm, where it has one; -2 what enters its
            last layer, without that norm. Later layers are not loaded.
        window_seconds: The most that is read at once; None is 30, or what the checkpoint was
            trained with if that is less. Whisper allows no more than that.
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        ConfigError: the weights, the layer or the window cannot be used.
    """

    medium = "audio"

    def __init__(
        self,
        weights: str | Path,
        layer: int = -1,
        window_seconds: float | None = None,
        dtype: str = "float32",
        name: str = "hf_audio",
    ) -> None:
        super().__init__(name)
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise UnknownNameError("dtype", dtype, DTYPES)
        self.tower = load_tower(weights_folder(weights), layer, DTYPES[dtype])
        self.layer = layer
        self.width = self.tower.width
        self.window = self._window_samples(window_seconds)

    def _window_samples(self, seconds: float | None) -> int:
        """The samples of a window: a multiple of the stride, so that times stay on one raster."""
        tower = self.tower
        longest = tower.longest * tower.stride / tower.rate
        if seconds is None:
            seconds = min(_WINDOW_SECONDS, longest)
        number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
        samples = 0
        if number and 0 < seconds <= longest:  # not so for NaN
            samples = round(seconds * tower.rate) // tower.stride * tower.stride
        if not tower.positions(samples):
            raise ConfigError(
                f"window_seconds must give at least one position, of {tower.stride / tower.rate:g} "
                f"s, and at most {longest:g} s for this tower; got {seconds!r}"
            )
        return samples

    def wanted(self, header: AudioHeader) -> AudioRequest:  # noqa: ARG002
        return AudioRequest(self.tower.rate)

    def plan(self, header: AudioHeader) -> Grid:
        counts = self._counts(header.samples_at(self.tower.rate))
        return sum(counts), 1, 1

    def seconds(self, header: AudioHeader, grid: Grid) -> tuple[float, ...]:  # noqa: ARG002
        return self._times(self._counts(header.samples_at(self.tower.rate)))

    def process(self, sound: NDArray[np.float32]) -> dict[str, Tensor]:
        """The prepared windows one behind another, and the rows of each."""
        counts = self._counts(len(sound))
        starts = range(0, len(counts) * self.window, self.window)
        windows = [self.tower.prepare(sound[start : start + self.window]) for start in starts]
        return {
            "values": torch.cat(windows),
            "lengths": torch.tensor([len(window) for window in windows]),
        }

    def forward(self, inputs: Sequence[Inputs]) -> list[Encoded]:
        lengths = [item["lengths"].tolist() for item in inputs]
        windows = [
            window
            for item, parts in zip(inputs, lengths, strict=True)
            for window in torch.split(item["values"].to(self.device, self.dtype), parts)
        ]
        features = iter(self.tower(windows))
        made = []
        for parts in lengths:
            embeddings = torch.cat([next(features) for _ in parts])
            times = self._times([self.tower.prepared_positions(rows) for rows in parts])
            made.append(Encoded(embeddings, grid=(len(embeddings), 1, 1), seconds=times))
        return made

    def processing(self) -> str:
        return f"layer {self.layer}, windows of {self.window}\n{self.tower.settings()}"

    def _counts(self, samples: int) -> list[int]:
        """The positions of each window of a sound.

        A rest that is too short for a position is left out, as a convolution leaves out the end
        of a sound that does not fill its kernel.
        """
        full, rest = divmod(samples, self.window)
        counts = [self.tower.positions(self.window)] * full
        if last := self.tower.positions(rest):
            counts.append(last)
        if not counts:
            raise MediaError(
                f"a sound must be long enough for one position of encoder {self.name!r}; this one "
                f"has {samples} samples at {self.tower.rate} Hz: leave it out, or add silence"
            )
        return counts

    def _times(self, counts: Sequence[int]) -> tuple[float, ...]:
        return tuple(
            (number * self.window + position * self.tower.stride) / self.tower.rate
            for number, count in enumerate(counts)
            for position in range(count)
        )

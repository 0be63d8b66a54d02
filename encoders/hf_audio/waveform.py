"""Towers that read the waveform itself: wav2vec2, HuBERT and WavLM.

Shape letters: B windows, S samples, T positions, C channels.
"""

from collections.abc import Sequence
from itertools import groupby
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from plait.encoders.attention import attending, stretches
from plait.encoders.hf_audio.tower import Tower, padding_mask
from plait.errors import ConfigError

_LONGEST_SECONDS = 600
"""Nothing in these towers ends with time, but attention over a longer window takes gigabytes."""


class WaveformTower(Tower):
    """The stem and the encoder of the model, called without masking of spans and dropped layers.

    The stem reads windows of one length at a time, since a group norm counts its padding; the
    encoder reads padded windows with a mask.
    """

    def __init__(self, model: Any, config: Any, extractor: Any) -> None:
        super().__init__()
        for refused in ("add_adapter", "conv_pos_batch_norm"):
            if getattr(config, refused, False):
                raise ConfigError(
                    "a waveform tower may have neither an adapter behind its features nor a batch "
                    f"norm over positions; this checkpoint has {refused}=True: take another one"
                )
        self.extractor = extractor
        self.stem, self.projection = model.feature_extractor, model.feature_projection
        self.encoder = model.encoder
        self.kernels, self.strides = tuple(config.conv_kernel), tuple(config.conv_stride)
        self.rate, self.stride = int(extractor.sampling_rate), prod(self.strides)
        self.longest = _LONGEST_SECONDS * self.rate // self.stride
        self.rows_per_second = self.rate
        self.width = int(config.hidden_size)
        self.norm_is_last = bool(config.do_stable_layer_norm)

    def positions(self, samples: int) -> int:
        for kernel, stride in zip(self.kernels, self.strides, strict=True):
            if samples < kernel:
                return 0
            samples = (samples - kernel) // stride + 1
        return samples

    def prepare(self, window: NDArray[np.float32]) -> Tensor:
        """(S,) -> (S,), normalised where the checkpoint's preprocessor says so."""
        made = self.extractor(window, sampling_rate=self.rate, padding=False, return_tensors="pt")
        values: Tensor = made["input_values"][0]
        return values

    def prepared_positions(self, rows: int) -> int:
        return self.positions(rows)

    def encode(self, windows: Sequence[Tensor]) -> list[Tensor]:
        """B windows (S,), the longest first."""
        hidden: list[Tensor] = []
        for _, equal in groupby(windows, key=len):
            stemmed = self.stem(torch.stack(list(equal))).transpose(1, 2)
            projected = self.projection(stemmed)
            # HuBERT returns the projection alone, the others also what entered it.
            hidden.extend(projected[0] if isinstance(projected, tuple) else projected)
        lengths = [len(item) for item in hidden]
        mask = padding_mask(lengths, hidden[0].device)  # what is padding becomes 0 there
        rows = pad_sequence(hidden, batch_first=True)
        with attending(stretches(lengths, rows.shape[1], rows.device)):
            made = self.encoder(rows, attention_mask=mask)
        return [item[:length] for item, length in zip(made.last_hidden_state, lengths, strict=True)]

    @property
    def depth(self) -> int:
        return len(self.encoder.layers)

    def cut(self, layer: int) -> None:
        del self.encoder.layers[layer + 1 :]
        if self.norm_is_last:
            self.encoder.layer_norm = nn.Identity()

    def settings(self) -> str:
        return str(self.extractor.to_json_string())

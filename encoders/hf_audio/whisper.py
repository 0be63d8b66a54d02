"""Whisper's encoder over sounds of their true length; the README says what that means exactly.

Shape letters: B windows, M mel bins, F mel frames, T positions, C channels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from plait.encoders.attention import attending, packed
from plait.encoders.hf_audio.tower import Tower
from plait.errors import ConfigError

_FRAMES = 2
"""Mel frames of a position: the stride of the second convolution."""


class WhisperTower(Tower):
    """The parts of transformers' `WhisperEncoder`, called without its demand for 3000 frames."""

    def __init__(self, model: Any, config: Any, extractor: Any) -> None:
        super().__init__()
        if extractor.dither or extractor.feature_size != config.num_mel_bins:
            raise ConfigError(
                f"Whisper needs mel frames of {config.num_mel_bins} bins without dither; the "
                f"checkpoint's preprocessor has feature_size={extractor.feature_size} and "
                f"dither={extractor.dither}: change its preprocessor_config.json"
            )
        self.extractor = extractor
        self.conv1, self.conv2 = model.conv1, model.conv2
        self.layers, self.norm = model.layers, model.layer_norm
        # Fixed sinusoids: a buffer, so that a trained tower leaves them as they are.
        self.register_buffer("embed_positions", model.embed_positions.weight.detach().clone())
        self.rate, self.hop = int(extractor.sampling_rate), int(extractor.hop_length)
        self.stride = _FRAMES * self.hop
        self.longest = min(extractor.n_samples // self.stride, config.max_source_positions)
        self.rows_per_second = self.rate // self.hop
        self.width = int(config.d_model)
        self.dropout = float(config.dropout)

    def positions(self, samples: int) -> int:
        return -(-samples // self.stride)

    def prepare(self, window: NDArray[np.float32]) -> Tensor:
        """(S,) -> (F, M): the frames of the window and, where silence follows, one of that.

        What the extractor makes of the window padded to its full 30 seconds, cut. Only as much
        silence is added as a frame can reach, so the work goes with the true length.
        """
        frames = _FRAMES * self.positions(len(window))
        full = self.longest * self.stride
        # The last frame kept begins at frames * hop and is n_fft long around it.
        reach = frames * self.hop + self.extractor.n_fft
        padded = min(-(-reach // self.hop) * self.hop, full)
        mel: Tensor = self.extractor(
            np.pad(window, (0, padded - len(window))),
            sampling_rate=self.rate,
            padding=False,
            truncation=False,
            return_tensors="pt",
        )["input_features"][0]
        return mel[:, : min(frames + 1, full // self.hop)].T.contiguous()

    def prepared_positions(self, rows: int) -> int:
        return rows // _FRAMES

    def encode(self, windows: Sequence[Tensor]) -> list[Tensor]:
        """B windows (F, M); the convolutions read them padded, the layers one behind another.

        No frame of padding reaches a position that is kept: position p reads frames 2p - 2 to
        2p + 2, and a window brings them all.
        """
        lengths = [self.prepared_positions(len(window)) for window in windows]
        mel = pad_sequence(list(windows), batch_first=True).transpose(1, 2)
        hidden = F.gelu(self.conv2(F.gelu(self.conv1(mel))))[:, :, : max(lengths)].transpose(1, 2)
        positions: Any = self.embed_positions
        hidden = F.dropout(hidden + positions[: max(lengths)], self.dropout, self.training)
        kept = [item[:length] for item, length in zip(hidden, lengths, strict=True)]
        row = torch.cat(kept)[None]
        with attending(packed(lengths, row.device)):
            for layer in self.layers:
                row = layer(row, None)
        return list(self.norm(row)[0].split(lengths))

    @property
    def depth(self) -> int:
        return len(self.layers)

    def cut(self, layer: int) -> None:
        del self.layers[layer + 1 :]
        self.norm = nn.Identity()

    def settings(self) -> str:
        return str(self.extractor.to_json_string())

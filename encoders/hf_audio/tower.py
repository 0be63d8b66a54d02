"""What the sound towers of transformers have in common.

Shape letters: S samples, L rows of a prepared window, D values of a row, T positions, C channels.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

_SECONDS_AT_ONCE = 480
"""Sixteen windows of 30 seconds: an hour of sound must not fill the memory."""


class Tower(nn.Module, ABC):
    """Reads windows of sound, each as if it were alone.

    `rate` is in Hz; `stride` the samples from one position to the next; `longest` the most
    positions of a window; `rows_per_second` what `prepare` makes; `width` the channels.
    """

    rate: int
    stride: int
    longest: int
    rows_per_second: int
    width: int

    @abstractmethod
    def positions(self, samples: int) -> int:
        """The features of a window of so many samples; 0 where it is too short for one."""

    @abstractmethod
    def prepare(self, window: NDArray[np.float32]) -> Tensor:
        """(S,) samples -> (L,) or (L, D): what the checkpoint's own preprocessing makes."""

    @abstractmethod
    def prepared_positions(self, rows: int) -> int:
        """`positions` of a window whose `prepare` gave so many rows."""

    @abstractmethod
    def encode(self, windows: Sequence[Tensor]) -> list[Tensor]:
        """Features (T, C) of prepared windows, the longest of which comes first, in one batch."""

    def forward(self, windows: Sequence[Tensor]) -> list[Tensor]:
        """Features (T, C) of each prepared window."""
        features: dict[int, Tensor] = {}
        most = _SECONDS_AT_ONCE * self.rows_per_second
        for batch in alike([len(window) for window in windows], most):
            made = self.encode([windows[index] for index in batch])
            features.update(zip(batch, made, strict=True))
        return [features[index] for index in range(len(windows))]

    @property
    @abstractmethod
    def depth(self) -> int:
        """How many layers there are."""

    @abstractmethod
    def cut(self, layer: int) -> None:
        """End after layer `layer`, counted from the end, without the final norm."""

    @abstractmethod
    def settings(self) -> str:
        """Every setting of `prepare`, as a stable string."""


def alike(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Indices in batches, the longest first.

    The longest of a batch is at most twice the shortest, so that padding never takes more than
    what is read; and a batch of several takes at most `most` rows, padded.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        longest = lengths[batch[0]] if batch else 0
        if batch and (longest > 2 * lengths[index] or longest * (len(batch) + 1) > most):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def padding_mask(lengths: Sequence[int], device: torch.device) -> Tensor | None:
    """(B, T) bool, True where there is something to read; None where there is no padding."""
    if len(set(lengths)) == 1:
        return None
    ends = torch.tensor(lengths, device=device)
    return torch.arange(max(lengths), device=device) < ends[:, None]

"""What the sound towers of transformers have in common.

Shape letters: S samples, L rows of a prepared window, D values of a row, T positions, C channels.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


class Tower(nn.Module, ABC):
    """Reads windows of sound, each as if it were alone.

    `rate` is in Hz; `stride` the samples from one position to the next; `longest` the most
    positions of a window; `width` the channels.
    """

    rate: int
    stride: int
    longest: int
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
    def forward(self, windows: Sequence[Tensor]) -> list[Tensor]:
        """Features (T, C) of each prepared window."""

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


def alike(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices in batches of which the longest is at most twice the shortest.

    Padding then never takes more than what is read.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batch and lengths[batch[0]] > 2 * lengths[index]:
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

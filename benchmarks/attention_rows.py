"""Rows for the attention benchmarks: documents of the `vlm` mix, each picture a group."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.packing import vlm

PICTURES = (256, 576, 1024)
"""Positions of a picture."""


@dataclass(frozen=True, slots=True)
class Row:
    """Query i sees keys [lo[i], hi[i]); `bounds` are (start, stop) of its documents."""

    lo: Tensor
    hi: Tensor
    bounds: list[tuple[int, int]]

    @property
    def length(self) -> int:
        return len(self.lo)

    @property
    def pairs(self) -> int:
        """Positions that see one another."""
        return int((self.hi - self.lo).sum())

    def dense(self) -> Tensor:
        """(T, T) bool, True where seen."""
        key = torch.arange(self.length, device=self.lo.device)
        return (key >= self.lo[:, None]) & (key < self.hi[:, None])

    def to(self, device: str) -> "Row":
        return Row(self.lo.to(device), self.hi.to(device), self.bounds)


def packed_with_groups(length: int, seed: int = 0) -> Row:
    """Documents until `length` is full, the last one cut; their pictures see themselves both ways.

    Lengths are drawn from the `vlm` mix of `benchmarks.packing`. A document begins with a few
    words; pictures follow one another for as long as they fit in half of it.
    """
    random = np.random.default_rng(seed)
    bounds, groups, start = [], [], 0
    for drawn in random.permutation(vlm()).tolist():
        stop = min(start + drawn, length)
        bounds.append((start, stop))
        at = start + 8
        while at < start + (stop - start) // 2:
            size = int(random.choice(PICTURES, p=(0.5, 0.3, 0.2)))
            if at + size > stop:
                break
            groups.append((at, at + size))
            at += size + 4
        start = stop
        if start == length:
            break
    return _row(bounds, groups)


def causal_documents(length: int, documents: int) -> Row:
    """So many documents of one length, without groups."""
    size = length // documents
    return _row([(n * size, (n + 1) * size) for n in range(documents)], [])


def _row(bounds: list[tuple[int, int]], groups: list[tuple[int, int]]) -> Row:
    lo = torch.cat([torch.full((stop - start,), start) for start, stop in bounds])
    hi = torch.arange(1, len(lo) + 1)
    for start, stop in groups:
        hi[start:stop] = stop
    return Row(lo, hi, bounds)

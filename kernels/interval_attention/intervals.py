"""Key intervals of a row of queries, and the tiles that a CPU kernel walks.

Shape letters: T queries, S keys.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

TILE_QUERIES = 256
"""Queries a tile may hold: wide enough for a matrix product, small enough for its mask."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries [start, stop) read keys [key_start, key_stop).

    `mask` (queries, keys) is True where a query sees a key; None when `causal` or all are seen.
    """

    start: int
    stop: int
    key_start: int
    key_stop: int
    causal: bool
    mask: Tensor | None


@dataclass(slots=True, eq=False)
class Intervals:
    """`lo`, `hi` (T,) int64: query i sees keys [lo[i], hi[i]). Built once per batch.

    Args:
        lo, hi: Both never decrease; every query sees at least one key.
        own: (T,) the key that each query itself is, for sliding windows; queries are keys 0..T-1
            where it is not given.
    """

    lo: Tensor
    hi: Tensor
    own: Tensor | None = None
    _tiles: dict[int | None, list[Tile]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.lo.shape != self.hi.shape or self.lo.ndim != 1:
            raise ValueError(
                f"lo and hi must both be (T,); got {tuple(self.lo.shape)} and "
                f"{tuple(self.hi.shape)}"
            )
        decreasing = (self.lo.diff() < 0).any() or (self.hi.diff() < 0).any()
        if decreasing or (self.hi <= self.lo).any() or (self.lo < 0).any():
            raise ValueError(
                "intervals must be non-empty, start at 0 or later, and never decrease; order the "
                "queries by document and position"
            )

    def bounds(self, window: int | None = None) -> tuple[Tensor, Tensor]:
        """(lo, hi) with a sliding window of `window` keys, its own included, applied."""
        if window is None:
            return self.lo, self.hi
        own = torch.arange(len(self.lo)) if self.own is None else self.own
        return torch.maximum(self.lo, own - window + 1), self.hi

    def tiles(self, window: int | None = None) -> list[Tile]:
        """The tiles of this row, remembered per window."""
        if window not in self._tiles:
            lo, hi = self.bounds(window)
            self._tiles[window] = [
                _tile(lo, hi, start, stop) for start, stop in _cuts(lo.tolist(), hi.tolist())
            ]
        return self._tiles[window]


def _cuts(lo: list[int], hi: list[int]) -> list[tuple[int, int]]:
    """Query ranges to run together: runs of one `lo`, joined while little area is wasted."""
    runs: list[tuple[int, int]] = []
    start = 0
    for i in range(1, len(lo) + 1):
        full = i - start == TILE_QUERIES
        if i == len(lo) or lo[i] != lo[start] or full:
            runs.append((start, i))
            start = i
    joined: list[tuple[int, int]] = []
    used = 0
    for start, stop in runs:
        area = (stop - start) * (hi[stop - 1] - lo[start])
        if joined:
            first = joined[-1][0]
            together = (stop - first) * (hi[stop - 1] - lo[first])
            small = together <= TILE_QUERIES**2 and stop - first <= TILE_QUERIES
            if small and (together <= 2 * (used + area) or together <= 64**2):
                joined[-1] = (first, stop)
                used += area
                continue
        joined.append((start, stop))
        used = area
    return joined


def _tile(lo: Tensor, hi: Tensor, start: int, stop: int) -> Tile:
    key_start, key_stop = int(lo[start]), int(hi[stop - 1])
    queries, keys = stop - start, key_stop - key_start
    one_start = bool((lo[start:stop] == key_start).all())
    steps = torch.arange(1, queries + 1) + key_start
    if one_start and queries == keys and bool((hi[start:stop] == steps).all()):
        return Tile(start, stop, key_start, key_stop, causal=queries > 1, mask=None)
    if one_start and bool((hi[start:stop] == key_stop).all()):
        return Tile(start, stop, key_start, key_stop, causal=False, mask=None)
    index = torch.arange(key_start, key_stop)
    mask = (index >= lo[start:stop, None]) & (index < hi[start:stop, None])
    return Tile(start, stop, key_start, key_stop, causal=False, mask=mask)

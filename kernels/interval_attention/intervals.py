"""Which keys each query of a row attends, and what the kernels walk over because of it.

Shape letters: T queries, S keys, B blocks of queries or of keys.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

TILE_QUERIES = 256
"""Queries a CPU tile may hold: wide enough for a matrix product, small enough for its mask."""


class Tile(NamedTuple):
    """Queries [start, stop) read keys [key_start, key_stop), and all of them [full_lo, full_hi).

    `causal` says that query start + i sees keys key_start to key_start + i, both included.
    """

    start: int
    stop: int
    key_start: int
    key_stop: int
    full_lo: int
    full_hi: int
    causal: bool

    @property
    def full(self) -> bool:
        """Whether every query sees every key of the tile."""
        return self.full_lo <= self.key_start and self.full_hi >= self.key_stop


class BlockMap(NamedTuple):
    """What a GPU kernel reads of intervals: their ends (T,) int32, and where its loops turn.

    `queries` (B, 4) int32, for each block of queries: keys [0, 1) need a mask, [1, 2) are seen by
    all of them, [2, 3) need a mask again. `keys` (B, 4) int32 says the same of the queries that
    see a block of keys. Every end is a multiple of the other side's block.
    """

    lo: Tensor
    hi: Tensor
    queries: Tensor
    keys: Tensor


class Linked(NamedTuple):
    """Keys that some queries see besides their own interval: `queries` (P,) int64, and the
    intervals of these P, in an order in which they never decrease.
    """

    queries: Tensor
    intervals: "Intervals"


@dataclass(slots=True, eq=False)
class Intervals:
    """`lo`, `hi` (T,) int64: query i sees keys [lo[i], hi[i]). Built once per batch.

    What the kernels need besides is made when it is first asked for, and kept.

    Args:
        lo, hi: Both never decrease. A query whose interval is empty sees nothing: its output is 0
            and its lse is -inf.
        own: (T,) the key that each query itself is, for sliding windows; queries are keys 0..T-1
            where it is not given.
        route: How attention over these intervals is computed; see `routes.ROUTES`.
        checked: The rule above was checked already; on a GPU, checking would wait for it.
        links: Further keys of some queries, none of which they see already: a prompt that several
            sequences continue. Not together with a window.
    """

    lo: Tensor
    hi: Tensor
    own: Tensor | None = None
    route: str = "auto"
    checked: bool = False
    stop: int | None = None
    """No query sees this key or one behind it; None where it was not checked."""

    links: tuple[Linked, ...] = ()

    _bounds: dict[int | None, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _tiles: dict[int | None, list[Tile]] = field(default_factory=dict)
    _maps: dict[tuple[int | None, int, int, int], BlockMap] = field(default_factory=dict)
    _documents: list[tuple[Tensor, int] | None] = field(default_factory=list)
    _kept: dict[Hashable, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.lo.shape != self.hi.shape or self.lo.ndim != 1:
            raise ValueError(
                f"lo and hi must both be (T,); got {tuple(self.lo.shape)} and "
                f"{tuple(self.hi.shape)}"
            )
        if self.checked:
            return
        decreasing = (self.lo.diff() < 0).any() | (self.hi.diff() < 0).any()
        if bool(decreasing | (self.hi < self.lo).any() | (self.lo < 0).any()):
            raise ValueError(
                "intervals must start at 0 or later, end where they start or later, and never "
                "decrease; order the queries by document and position"
            )
        self.checked = True
        self.stop = int(self.hi[-1]) if len(self.hi) else 0

    @property
    def length(self) -> int:
        """T."""
        return len(self.lo)

    def to(self, device: torch.device) -> "Intervals":
        """The same intervals on another device; itself where it is there already."""
        if self.lo.device == device:
            return self
        own = None if self.own is None else self.own.to(device, non_blocking=True)
        lo, hi = (t.to(device, non_blocking=True) for t in (self.lo, self.hi))
        links = tuple(
            Linked(queries.to(device, non_blocking=True), intervals.to(device))
            for queries, intervals in self.links
        )
        return Intervals(lo, hi, own, self.route, self.checked, self.stop, links)

    def bounds(self, window: int | None = None) -> tuple[Tensor, Tensor]:
        """(lo, hi) with a sliding window of `window` keys, its own included, applied.

        It ends what a query sees before it, of its own group too; what it sees behind it in its
        group stays, as in Gemma 3.
        """
        if window is None:
            return self.lo, self.hi
        if window not in self._bounds:
            own = self.own
            if own is None:
                own = torch.arange(self.length, device=self.lo.device)
            self._bounds[window] = torch.maximum(self.lo, own - window + 1), self.hi
        return self._bounds[window]

    def documents(self) -> tuple[Tensor, int] | None:
        """(N + 1,) int32 where N causal documents start and end, and the longest; None where the
        intervals are anything else. On a GPU the first call waits for it.
        """
        if not self._documents:
            self._documents.append(_causal_documents(self.lo, self.hi))
        return self._documents[0]

    def keep(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """What a kernel makes of these intervals, made once."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def tiles(self, window: int | None = None) -> list[Tile]:
        """The tiles of queries that the CPU kernel walks."""
        if window not in self._tiles:
            self._tiles[window] = _tiles(*self.bounds(window))
        return self._tiles[window]

    def block_map(self, window: int | None, keys: int, block_q: int, block_k: int) -> BlockMap:
        """The loops of a GPU kernel over `keys` keys, made on the device without waiting for it."""
        wanted = (window, keys, block_q, block_k)
        if wanted not in self._maps:
            lo, hi = self.bounds(window)
            key = torch.arange(keys, device=lo.device)
            # Key j is seen by the queries with lo <= j < hi, which are neighbours.
            first = torch.searchsorted(hi, key, right=True)
            after = torch.searchsorted(lo, key, right=True)
            self._maps[wanted] = BlockMap(
                lo.to(torch.int32),
                hi.to(torch.int32),
                _loops(lo, hi, block_q, block_k),
                _loops(first, after, block_k, block_q),
            )
        return self._maps[wanted]


def _loops(lo: Tensor, hi: Tensor, own_block: int, other_block: int) -> Tensor:
    """(B, 4): the ends of the loops over [lo, hi) of each block of `own_block` rows."""
    if len(lo) == 0:
        return torch.zeros(0, 4, dtype=torch.int32, device=lo.device)
    first = torch.arange(0, len(lo), own_block, device=lo.device)
    last = (first + own_block - 1).clamp(max=len(lo) - 1)
    start = lo[first] // other_block * other_block
    stop = -(-hi[last] // other_block) * other_block
    stop = torch.maximum(start, stop)
    full_lo = torch.maximum(-(-lo[last] // other_block) * other_block, start)
    full_hi = torch.minimum(hi[first] // other_block * other_block, stop)
    none = full_lo >= full_hi
    full_lo = torch.where(none, stop, full_lo)
    full_hi = torch.where(none, stop, full_hi)
    return torch.stack([start, full_lo, full_hi, stop], dim=1).to(torch.int32)


def _causal_documents(lo: Tensor, hi: Tensor) -> tuple[Tensor, int] | None:
    """`lo` is where the document begins that a position is of, and `hi` the next position."""
    position = torch.arange(len(lo), device=lo.device)
    begins = lo == position
    latest = torch.where(begins, position, 0).cummax(0).values if len(lo) else position
    if len(lo) == 0 or not bool(((hi == position + 1) & (lo == latest)).all()):
        return None
    starts = torch.cat([begins.nonzero()[:, 0], position[-1:] + 1])
    return starts.to(torch.int32), int(starts.diff().max())


def _tiles(lo: Tensor, hi: Tensor) -> list[Tile]:
    cuts = _cuts(lo, hi)
    if not cuts:
        return []
    start, stop = torch.tensor(cuts).T
    last = stop - 1
    # Causal from its first key: one `lo`, and every `hi` one more than the last.
    steps = torch.cat([hi.new_ones(1), hi.diff()]) == 1
    broken = torch.cat([lo.new_zeros(1), (~steps).cumsum(0)])
    unbroken = broken[stop] == broken[start + 1]
    causal = unbroken & (hi[start] == lo[start] + 1) & (lo[start] == lo[last])
    columns = (start, stop, lo[start], hi[last], lo[last], hi[start], causal)
    return [Tile(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]


def _cuts(lo: Tensor, hi: Tensor) -> list[tuple[int, int]]:
    """Query ranges to run together: those of one document, joined while little area is wasted."""
    length = len(lo)
    if length == 0:
        return []
    # Within a document a window moves `lo` by one; only the next document moves it by more.
    begins = [0, *((lo.diff() > 1).nonzero()[:, 0] + 1).tolist(), length]
    runs = [
        (start, min(start + TILE_QUERIES, end))
        for begin, end in pairwise(begins)
        for start in range(begin, end, TILE_QUERIES)
    ]
    ends = torch.tensor(runs).T
    first, after = lo[ends[0]].tolist(), hi[ends[1] - 1].tolist()
    joined: list[tuple[int, int]] = []
    used = opened = 0
    for (start, stop), low, high in zip(runs, first, after, strict=True):
        area = (stop - start) * (high - low)
        if joined:
            together = (stop - joined[-1][0]) * (high - opened)
            small = together <= TILE_QUERIES**2 and stop - joined[-1][0] <= TILE_QUERIES
            # Single queries, as in decoding, have a tile each: it reads no key for nothing.
            tiny = together <= 64**2 and stop - start > 1
            if small and (together <= 2 * (used + area) or tiny):
                joined[-1] = (joined[-1][0], stop)
                used += area
                continue
        joined.append((start, stop))
        used, opened = area, low
    return joined

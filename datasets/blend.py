"""Mixtures: several datasets drawn in given shares, each through its own shuffled epochs.

Every draw has a moment: the k-th row of a dataset with weight w stands at (k + 1/2) / w, and the
blend is all draws in the order of their moments. So at any point the rows drawn so far stand in
the ratio of the weights to within one row, nothing is left to chance, and where a dataset has had
all its epochs the others simply go on. A stretch of the blend is computed from its place alone.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate
from math import floor
from typing import overload

import numpy as np

from plait.datasets.columns import IntColumn
from plait.errors import ConfigError
from plait.stream import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One dataset of a blend: its name, its rows' numbers, and how much of it is drawn.

    Args:
        weight: Its share of the rows drawn, relative to the others' weights.
        epochs: Passes over it at most, after which its share goes to the others; None: any number.
    """

    name: str
    rows: range
    weight: float = 1.0
    epochs: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise ConfigError(
                f"a weight must be a number above 0; that of dataset {self.name} is {self.weight}"
            )
        if self.epochs is not None and self.epochs < 1:
            raise ConfigError(
                f"epochs must be at least 1; those of dataset {self.name} are {self.epochs}"
            )


class Joined(Sequence[Sample]):
    """Sequences of samples one after another, numbered through."""

    def __init__(self, parts: Sequence[Sequence[Sample]]) -> None:
        self.parts = tuple(parts)
        self.starts = [0, *accumulate(len(part) for part in self.parts)]

    def __len__(self) -> int:
        return self.starts[-1]

    @overload
    def __getitem__(self, row: int) -> Sample: ...
    @overload
    def __getitem__(self, row: slice) -> list[Sample]: ...
    def __getitem__(self, row: int | slice) -> Sample | list[Sample]:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        number = row + len(self) if row < 0 else row
        if not 0 <= number < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        part = bisect_right(self.starts, number) - 1
        return self.parts[part][number - self.starts[part]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """What is drawn from one dataset: its units `first`, `first + 1`, ... in shuffled epochs."""

    name: str
    first: int
    units: int
    weight: float = 1.0
    epochs: int | None = None

    @property
    def most(self) -> float:
        """Draws at most."""
        return float("inf") if self.epochs is None else float(self.epochs * self.units)

    def moment(self, draw: int) -> float:
        """When a draw comes in the blend."""
        return (draw + 0.5) / self.weight

    def drawn_by(self, moment: float) -> int:
        """How many draws come up to and at a moment."""
        count = max(0, floor(min(moment * self.weight + 0.5, self.most)))
        while count > 0 and self.moment(count - 1) > moment:
            count -= 1
        while count < self.most and self.moment(count) <= moment:
            count += 1
        return count


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """A stretch of a blend: units in order, the own epoch of each, and the epochs that begin.

    `begun` holds (place in the pools, epoch).
    """

    units: IntColumn
    epochs: IntColumn
    begun: tuple[tuple[int, int], ...]


def drawn_before(pools: Sequence[Pool], total: int) -> list[int]:
    """How many draws of each pool are among the first `total` of the blend."""
    if sum(pool.most for pool in pools) <= total:
        return [int(pool.most) for pool in pools]
    low, high = 0.0, 1.0
    while sum(pool.drawn_by(high) for pool in pools) < total:
        high *= 2
    while low < (middle := (low + high) / 2) < high:
        enough = sum(pool.drawn_by(middle) for pool in pools) >= total
        low, high = (low, middle) if enough else (middle, high)
    counts = [pool.drawn_by(high) for pool in pools]
    # Of draws at the same moment, those of earlier pools come first.
    for number in reversed(range(len(pools))):
        pool, count = pools[number], counts[number]
        if sum(counts) > total and count and pool.moment(count - 1) == high:
            counts[number] -= 1
    return counts


def draw(pools: Sequence[Pool], start: int, stop: int, *, seed: int, shuffle: bool = True) -> Draws:
    """The draws from number `start` up to `stop` of a blend; fewer where it ends."""
    before, after = drawn_before(pools, start), drawn_before(pools, stop)
    units: list[IntColumn] = []
    epochs: list[IntColumn] = []
    moments: list[np.ndarray] = []
    begun: list[tuple[int, int]] = []
    for number, (pool, low, high) in enumerate(zip(pools, before, after, strict=True)):
        draws = np.arange(low, high, dtype=np.int64)
        own = draws // pool.units
        for epoch in range(low // pool.units, -(-high // pool.units)):
            begins = epoch * pool.units
            order = _order(pool, epoch, seed, shuffle)
            units.append(pool.first + order[max(low - begins, 0) : high - begins])
            if begins >= low:
                begun.append((number, epoch))
        epochs.append(own)
        moments.append((draws + 0.5) / pool.weight)
    # Stable: of draws at the same moment, those of earlier pools come first.
    order = np.argsort(np.concatenate(moments), kind="stable")
    found = np.concatenate([np.zeros(0, dtype=np.int64), *units])
    return Draws(found[order], np.concatenate(epochs)[order], tuple(begun))


def _order(pool: Pool, epoch: int, seed: int, shuffle: bool) -> IntColumn:
    """The order of a pool's units in one of its epochs: of seed, dataset and epoch alone."""
    if not shuffle:
        return np.arange(pool.units)
    name = int.from_bytes(sha256(pool.name.encode()).digest()[:8])
    return np.random.default_rng([seed, epoch, name]).permutation(pool.units)

"""The plan: which rows share a pack, in which order; a pure function of rows, seed and block.

A block is as many rows as all datasets have together. Of a single dataset it is an epoch; of a
blend each row has the epoch of its own dataset. A plan is recomputed, never stored.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import overload

import numpy as np

from plait.datasets.blend import Draws, Pool, Share, draw
from plait.datasets.columns import IntColumn, Measured, RefusedRow
from plait.datasets.packing import cost_stream, decreasing_packs, fill_of, stream_packs
from plait.datasets.planning import Units, costs_of, units_of
from plait.datasets.settings import LoaderSettings, PackLimits
from plait.errors import DataError

_CHUNK = 65_536


@dataclass(frozen=True, slots=True, eq=False)
class Block(Sequence[tuple[int, ...]]):
    """The packs of a block, as places among the measured rows.

    `epochs[d]` is the epoch of `places[d]` in its own dataset, and pack p holds the places from
    `starts[p]` to `starts[p + 1]`. `begun` holds (share, epoch) of the epochs that begin here.
    """

    places: IntColumn
    epochs: IntColumn
    starts: IntColumn
    begun: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, pack: int) -> tuple[int, ...]: ...
    @overload
    def __getitem__(self, pack: slice) -> list[tuple[int, ...]]: ...
    def __getitem__(self, pack: int | slice) -> tuple[int, ...] | list[tuple[int, ...]]:
        if isinstance(pack, slice):
            return [self[number] for number in range(*pack.indices(len(self)))]
        return tuple(place for place, _ in self.drawn(range(len(self))[pack]))

    def drawn(self, pack: int) -> Iterator[tuple[int, int]]:
        """The places of a pack, each with its own epoch."""
        held = slice(self.starts[pack], self.starts[pack + 1])
        return zip(self.places[held].tolist(), self.epochs[held].tolist(), strict=True)


class Schedule:
    """Plans blocks of screened rows.

    Args:
        shares: The datasets of a blend, which together hold all rows; none is a single dataset.

    Raises:
        DataError: a dataset of the blend has no usable row, or a row is over a budget.
    """

    def __init__(
        self, measured: Measured, settings: LoaderSettings, shares: Sequence[Share] = ()
    ) -> None:
        self.measured, self.settings = measured, settings
        self._units = units_of(measured)
        limits = settings.given()
        self._limits = tuple(limits.values())
        self._costs = self._units.sums(costs_of(measured, settings))
        if (self._costs > np.array(self._limits)).any():
            raise DataError(
                "a plan needs rows that a pack can hold, and some are over a budget; screen them"
            )
        self._pools = _pools(measured, self._units, shares)

    def block(self, number: int) -> Block:
        """The packs of a block; none where all datasets have had all their epochs."""
        settings = self.settings
        random = np.random.default_rng([settings.seed, number])
        drawn = self._draws(number, random)
        costs = self._costs[drawn.units]
        if settings.packing == "decreasing":
            packs = decreasing_packs(costs, self._limits)
        else:
            packs = list(stream_packs(cost_stream(costs), self._limits, settings.window))
        # Shuffled after packing too, so that the emptiest packs are not always last.
        order = random.permutation(len(packs)) if settings.shuffle else np.arange(len(packs))
        chosen = [packs[pack] for pack in order.tolist()]
        return _block(self._units, drawn, chosen)

    def ends_before(self, number: int) -> bool:
        """Whether all datasets have had all their epochs before a block."""
        return sum(pool.most for pool in self._pools) <= number * len(self._units)

    def _draws(self, number: int, random: np.random.Generator) -> Draws:
        pools, size = self._pools, len(self._units)
        if len(pools) > 1:
            start, seed, shuffle = number * size, self.settings.seed, self.settings.shuffle
            return draw(pools, start, start + size, seed=seed, shuffle=shuffle)
        if self.ends_before(number):
            nothing = np.zeros(0, dtype=np.int64)
            return Draws(nothing, nothing, ())
        units = random.permutation(size) if self.settings.shuffle else np.arange(size)
        return Draws(units, np.full(size, number), ((0, number),))

    def fingerprint(self) -> str:
        """What the sequence of packs depends on, hashed; ids tell rows of equal lengths apart."""
        s, measured = self.settings, self.measured
        limits = [s.capacity, s.max_documents, s.max_patches, s.max_frames, s.max_squares]
        facts = [s.seed, limits, s.views, s.shuffle, s.packing, s.window]
        pools = [astuple(pool) for pool in self._pools]
        digest = hashlib.sha256(json.dumps([facts, pools, list(measured.datasets)]).encode())
        for name in ("row", "dataset", "group", "patches", "frames", "cut"):
            digest.update(measured.columns[name].tobytes())
        digest.update(measured.lengths.tobytes())
        digest.update(json.dumps([str(group) for group in measured.groups]).encode())
        for at in range(0, len(measured), _CHUNK):
            digest.update(json.dumps(measured.ids[at : at + _CHUNK].tolist()).encode())
        return digest.hexdigest()


def _block(units: Units, drawn: Draws, packs: Sequence[Sequence[int]]) -> Block:
    """Packs of numbers of draws, as packs of rows."""
    counts = np.fromiter((len(pack) for pack in packs), dtype=np.int64, count=len(packs))
    order = np.fromiter(
        (number for pack in packs for number in pack), dtype=np.int64, count=int(counts.sum())
    )
    chosen = drawn.units[order]
    sizes = units.sizes[chosen]
    ends = np.concatenate([[0], np.cumsum(sizes)])[np.concatenate([[0], np.cumsum(counts)])]
    epochs = np.repeat(drawn.epochs[order], sizes)
    return Block(units.rows_of(chosen), epochs, ends, drawn.begun)


def _pools(measured: Measured, units: Units, shares: Sequence[Share]) -> list[Pool]:
    """The units of each share; rows of one dataset stand together, and so do its units."""
    if not shares:
        return [Pool(name="", first=0, units=len(units))]
    first_rows = measured.columns["row"][units.places[units.starts[:-1]]]
    pools = []
    for share in shares:
        first = int(np.searchsorted(first_rows, share.rows.start))
        count = int(np.searchsorted(first_rows, share.rows.stop)) - first
        if not count:
            raise DataError(
                f"a dataset of a blend needs a usable row; {share.name} has none: mend it or take "
                "it out"
            )
        pool = Pool(
            name=share.name, first=first, units=count, weight=share.weight, epochs=share.epochs
        )
        pools.append(pool)
    return pools


def over_ranks(
    packs: Sequence[Sequence[int]], measured: Measured, ranks: int
) -> list[list[tuple[int, ...]]]:
    """The packs of each rank: as many for each, none twice, all together the same rows.

    Ranks step together, so each takes one of every `ranks` packs that follow one another: the
    longest goes to the rank that had the fewest positions so far. Where the packs do not divide
    evenly the longest are halved, and where nothing can be halved the last ones are empty.
    """
    lengths, groups = measured.lengths, measured.columns["group"]

    def length(pack: Sequence[int]) -> int:
        return int(lengths[list(pack)].sum())

    evened = _evened([tuple(pack) for pack in packs], lengths, groups, ranks)
    found: list[list[tuple[int, ...]]] = [[] for _ in range(ranks)]
    taken = [0] * ranks
    for at in range(0, len(evened), ranks):
        step = sorted(evened[at : at + ranks], key=length, reverse=True)
        behind = sorted(range(ranks), key=lambda rank: taken[rank])
        for rank, pack in zip(behind, step, strict=True):
            found[rank].append(pack)
            taken[rank] += length(pack)
    return found


def _evened(
    packs: list[tuple[int, ...]], lengths: IntColumn, groups: IntColumn, ranks: int
) -> list[tuple[int, ...]]:
    """Packs of which `ranks` divides the number; what was halved stands last."""
    missing = -len(packs) % ranks
    longest = sorted(range(len(packs)), key=lambda p: -int(lengths[list(packs[p])].sum()))
    halves: list[tuple[int, ...]] = []
    for number in longest if missing else ():
        pack = packs[number]
        # A group is never parted: a pack is halved where another unit begins.
        cuts = [
            at for at in range(1, len(pack))
            if groups[pack[at]] < 0 or groups[pack[at]] != groups[pack[at - 1]]
        ]  # fmt: skip
        if len(halves) == missing:
            break
        if cuts:
            middle = cuts[len(cuts) // 2]
            packs[number] = pack[:middle]
            halves.append(pack[middle:])
    return packs + halves + [()] * (missing - len(halves))


@dataclass(frozen=True, slots=True)
class PlanSummary:
    """What `plait plan` prints about the data.

    `fill` counts every pack in full, the emptiest too. `largest_pack` is in positions.
    """

    samples: Mapping[str, int]
    positions: Mapping[str, int]
    capacity: int
    packs: int
    fill: float
    largest_pack: int
    refused: tuple[RefusedRow, ...]
    cut: int = 0
    """Rows that are cut to fit."""

    def reasons(self) -> dict[str, dict[str, int]]:
        """How many rows were refused, by status and reason."""
        found: dict[str, dict[str, int]] = {}
        for row in self.refused:
            by_reason = found.setdefault(row.status, {})
            by_reason[row.reason] = by_reason.get(row.reason, 0) + 1
        return found


def summarise(
    measured: Measured, packs: Sequence[Sequence[int]], *, limits: PackLimits
) -> PlanSummary:
    """Add up a plan: `packs` are places in `measured.rows`, as `Schedule.block` gives them."""
    lengths = measured.lengths
    taken = [int(lengths[list(pack)].sum()) for pack in packs]
    rows = np.bincount(measured.columns["dataset"], minlength=len(measured.datasets)).tolist()
    return PlanSummary(
        samples={name: n for name, n in zip(measured.datasets, rows, strict=True) if n},
        positions={medium: int(column.sum()) for medium, column in measured.positions.items()},
        capacity=limits.capacity,
        packs=len(packs),
        fill=fill_of(taken, limits.capacity),
        largest_pack=max(taken, default=0),
        refused=measured.refused,
        cut=int((measured.columns["cut"] > 0).sum()),
    )

"""From rows to packs, before anything is decoded.

    samples ──measure──> Measured ──screen──> rows that fit ──plan_epoch──> packs of row numbers

Lengths come from headers and texts, through a counter that the caller brings. The plan of an epoch
is a pure function of lengths, seed and epoch: it is recomputed, never stored.
"""

import threading
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np

from plait.datasets.executor import Executor
from plait.datasets.ledger import Status
from plait.datasets.packing import WINDOW, Unit, best_fit, fill_of, make_units
from plait.datasets.policy import FailurePolicy
from plait.errors import DataError, Origin
from plait.stream import Document, Sample

Counter = Callable[[Sample], Mapping[str, int]]
"""Positions of a sample by medium ({"text": 12, "image": 9}), from headers alone; thread-safe."""

_ROWS_A_BATCH = 32


@dataclass(frozen=True, slots=True)
class MeasuredRow:
    """A row that can be packed. `group` is (dataset, group), or None; `id` is the sample's."""

    row: int
    origin: Origin
    positions: Mapping[str, int]
    group: Hashable | None = None
    id: str = ""

    @property
    def length(self) -> int:
        return sum(self.positions.values())


@dataclass(frozen=True, slots=True)
class RefusedRow:
    """A row that is in no plan, and why."""

    row: int
    origin: Origin
    status: Status
    reason: str
    group: Hashable | None = None


@dataclass(frozen=True, slots=True)
class _BrokenRow:
    """A row whose positions could not be counted."""

    row: int
    error: DataError
    group: Hashable | None


@dataclass(frozen=True, slots=True)
class Measured:
    """Rows that can be used, and rows that cannot, in the order of their numbers."""

    rows: tuple[MeasuredRow, ...]
    refused: tuple[RefusedRow, ...] = ()

    @property
    def lengths(self) -> list[int]:
        """Positions of each usable row."""
        return [row.length for row in self.rows]

    @property
    def groups(self) -> list[Hashable | None]:
        """The group of each usable row, for `plan_epoch`."""
        return [row.group for row in self.rows]


def positions_by_medium(document: Document) -> dict[str, int]:
    """How many of a document's positions each medium fills; the rest is text."""
    found: dict[str, int] = {}
    for item in document.items:
        found[item.part.medium] = found.get(item.part.medium, 0) + item.plan.length
    return {"text": document.length - sum(found.values()), **found}


def origin_of(sample: Sample, row: int) -> Origin:
    """The sample's origin; where that has neither number nor file, `row` is its number."""
    origin = sample.origin
    return replace(origin, row=row) if origin.row is None and not origin.file else origin


def placed(error: DataError, origin: Origin) -> DataError:
    """`error` with its row's dataset and number.

    The file that the error names is kept, unless the row itself is only known by its file.
    """
    if origin.row is not None:
        return error.at(origin)
    return type(error)(error.message, origin)


def unread(error: DataError, row: int) -> DataError:
    """The error of a row that could not even be parsed, with a place if it has none."""
    origin = error.origin
    known = origin.row is not None or origin.file
    return error if known else error.at(replace(origin, row=row))


def measure(
    samples: Sequence[Sample],
    count: Counter,
    *,
    indices: Iterable[int] | None = None,
    policy: FailurePolicy | None = None,
    workers: int = 2,
) -> Measured:
    """Count the positions of each row in threads; rows that break are told to the policy in order.

    Args:
        indices: Rows to measure; None is all. `samples[row]` is read by one thread at a time.

    Raises:
        DataError, FailureBudgetError: as the policy says.
    """
    policy = policy or FailurePolicy()
    rows = sorted(range(len(samples)) if indices is None else indices)
    reading = threading.Lock()

    def one(row: int) -> MeasuredRow | _BrokenRow:
        try:
            with reading:
                sample = samples[row]
        except DataError as error:
            return _BrokenRow(row, unread(error, row), None)
        origin = origin_of(sample, row)
        group = None if sample.group is None else (origin.dataset, sample.group)
        try:
            return MeasuredRow(row, origin, dict(count(sample)), group, sample.id)
        except DataError as error:
            return _BrokenRow(row, placed(error, origin), group)

    usable: list[MeasuredRow] = []
    refused: list[RefusedRow] = []
    batches = (rows[at : at + _ROWS_A_BATCH] for at in range(0, len(rows), _ROWS_A_BATCH))
    with closing(Executor(workers).map(one, batches)) as measured:
        for found in (done.result() for batch in measured for done in batch):
            if isinstance(found, MeasuredRow):
                policy.success()
                usable.append(found)
                continue
            policy.failure(found.error)
            origin, reason = found.error.origin, found.error.message
            refused.append(RefusedRow(found.row, origin, "broken", reason, found.group))
    return Measured(tuple(usable), tuple(refused))


def screen(
    measured: Measured, *, capacity: int, max_documents: int | None, policy: FailurePolicy
) -> Measured:
    """Refuse what no pack can hold: rows and groups too long, and groups with a broken row.

    Raises:
        DataError: a row or group is too long and the policy calls that an error.
    """
    by_group: dict[Hashable, list[MeasuredRow]] = {}
    for row in measured.rows:
        by_group.setdefault(("row", row.row) if row.group is None else row.group, []).append(row)
    incomplete = {row.group: row.row for row in measured.refused if row.group is not None}
    kept: list[MeasuredRow] = []
    refused = list(measured.refused)
    for group, rows in by_group.items():
        reason = _too_long(rows, capacity, max_documents)
        if group in incomplete:
            reason = f"row {incomplete[group]} of its group cannot be used"
        elif reason and policy.too_long == "error":
            raise DataError(
                f"{reason}; raise the capacity, shorten the row, or set too_long to drop",
                rows[0].origin,
            )
        if reason:
            refused += [RefusedRow(r.row, r.origin, "dropped", reason, r.group) for r in rows]
        else:
            kept += rows
    kept.sort(key=lambda row: row.row)
    refused.sort(key=lambda row: row.row)
    return Measured(tuple(kept), tuple(refused))


def _too_long(rows: Sequence[MeasuredRow], capacity: int, max_documents: int | None) -> str:
    length = sum(row.length for row in rows)
    subject = "an item" if len(rows) == 1 else f"a group of {len(rows)} items"
    if length > capacity:
        return f"{subject} longer than the pack: {length} positions, and a pack holds {capacity}"
    if max_documents is not None and len(rows) > max_documents:
        return f"{subject} does not fit in one pack of at most {max_documents} documents"
    return ""


def plan_epoch(
    lengths: Sequence[int],
    *,
    seed: int,
    epoch: int,
    capacity: int,
    max_documents: int | None = None,
    groups: Sequence[Hashable | None] | None = None,
    shuffle: bool = True,
    window: int = WINDOW,
) -> list[tuple[int, ...]]:
    """The packs of an epoch, as places in `lengths`; the same arguments give the same packs.

    Rows are shuffled before packing and packs after it, so that the emptiest are not always last.

    Raises:
        DataError: a row or group that no pack can hold; `screen` refuses them first.
    """
    units: list[Unit[int]] = make_units(range(len(lengths)), lengths, groups)
    random = np.random.default_rng([seed, epoch])
    if shuffle:
        units = [units[place] for place in random.permutation(len(units)).tolist()]
    packs = [
        tuple(pack)
        for pack in best_fit(units, capacity=capacity, max_documents=max_documents, window=window)
    ]
    return [packs[p] for p in random.permutation(len(packs)).tolist()] if shuffle else packs


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

    def reasons(self) -> dict[str, dict[str, int]]:
        """How many rows were refused, by status and reason."""
        found: dict[str, dict[str, int]] = {}
        for row in self.refused:
            by_reason = found.setdefault(row.status, {})
            by_reason[row.reason] = by_reason.get(row.reason, 0) + 1
        return found


def summarise(measured: Measured, packs: Sequence[Sequence[int]], *, capacity: int) -> PlanSummary:
    """Add up a plan: `packs` are places in `measured.rows`, as `plan_epoch` gives them."""
    samples: dict[str, int] = {}
    positions: dict[str, int] = {}
    for row in measured.rows:
        samples[row.origin.dataset] = samples.get(row.origin.dataset, 0) + 1
        for medium, number in row.positions.items():
            positions[medium] = positions.get(medium, 0) + number
    lengths = measured.lengths
    taken = [sum(lengths[place] for place in pack) for pack in packs]
    return PlanSummary(
        samples=samples,
        positions=positions,
        capacity=capacity,
        packs=len(packs),
        fill=fill_of(taken, capacity),
        largest_pack=max(taken, default=0),
        refused=measured.refused,
    )

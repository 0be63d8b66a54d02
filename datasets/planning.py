"""From rows to what they take of a pack, before anything is decoded.

    samples ──measure──> Measured ──screen──> rows that fit ──plan_block──> packs of row numbers

Counts come from headers and texts, through a counter that the caller brings. The plan itself is
made in `plait.datasets.schedule`.
"""

import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np

from plait.datasets.columns import (
    NONE,
    IntColumn,
    Measured,
    MeasuredBuilder,
    MeasuredRow,
    RefusedRow,
    RowCounts,
)
from plait.datasets.executor import Executor
from plait.datasets.policy import FailurePolicy
from plait.datasets.settings import PackLimits
from plait.datasets.truncation import cut_to_fit
from plait.errors import DataError, Origin
from plait.stream import Document, Sample

Counter = Callable[[Sample], RowCounts]
"""What a sample takes, from headers alone; called by one thread at a time."""

_ROWS_A_BATCH = 32


@dataclass(frozen=True, slots=True)
class _BrokenRow:
    """A row whose positions could not be counted."""

    row: int
    error: DataError
    group: Hashable | None


def counts_of(document: Document) -> RowCounts:
    """What a document takes of each budget."""
    positions: dict[str, int] = {}
    patches = frames = 0
    for item in document.items:
        medium, length = item.part.medium, item.plan.length
        positions[medium] = positions.get(medium, 0) + length
        patches += length if medium == "image" else 0
        frames += item.plan.frames
    learned = np.flatnonzero(document.weights)
    return RowCounts(
        positions={"text": document.length - sum(positions.values()), **positions},
        patches=patches,
        frames=frames,
        media_end=max((span.stop for span in document.spans), default=0),
        learned=int(learned[0]) + 1 if len(learned) else document.length + 1,
    )


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
    prepare: Callable[[Sample], None] | None = None,
) -> Measured:
    """Count what each row takes; rows that break are told to the policy in order.

    Args:
        indices: Rows to measure; None is all. `samples[row]` is read by one thread at a time.
        prepare: Called before a row is counted, by many threads at once: reads its headers.

    Raises:
        DataError, FailureBudgetError: as the policy says.
    """
    policy = policy or FailurePolicy()
    rows = sorted(range(len(samples)) if indices is None else indices)
    reading, counting = threading.Lock(), threading.Lock()

    def one(row: int) -> MeasuredRow | _BrokenRow:
        try:
            with reading:
                sample = samples[row]
        except DataError as error:
            return _BrokenRow(row, unread(error, row), None)
        origin = origin_of(sample, row)
        group = None if sample.group is None else (origin.dataset, sample.group)
        try:
            if prepare is not None:
                prepare(sample)
            with counting:
                return MeasuredRow(row, origin, count(sample), group, sample.id)
        except DataError as error:
            return _BrokenRow(row, placed(error, origin), group)

    usable = MeasuredBuilder()
    refused: list[RefusedRow] = []
    batches = (rows[at : at + _ROWS_A_BATCH] for at in range(0, len(rows), _ROWS_A_BATCH))
    with closing(Executor(workers).map(one, batches)) as measured:
        for found in (done.result() for batch in measured for done in batch):
            if isinstance(found, MeasuredRow):
                policy.success()
                usable.add(found)
                continue
            policy.failure(found.error)
            origin, reason = found.error.origin, found.error.message
            refused.append(RefusedRow(found.row, origin, "broken", reason, found.group))
    return usable.done(refused)


@dataclass(frozen=True, slots=True, eq=False)
class Units:
    """What is packed whole, in order of first appearance: rows without a group, and groups.

    `places[starts[u] : starts[u + 1]]` are the rows of unit u.
    """

    places: IntColumn
    starts: IntColumn

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def sizes(self) -> IntColumn:
        """Documents of each unit."""
        return np.diff(self.starts)

    def sums(self, costs: IntColumn) -> IntColumn:
        """Of (rows, budgets) for each unit."""
        if not len(self):
            return np.zeros((0, costs.shape[1]), dtype=np.int64)
        sums: IntColumn = np.add.reduceat(costs[self.places], self.starts[:-1], axis=0)
        return sums

    def rows_of(self, units: IntColumn) -> IntColumn:
        """The rows of some units, one unit after another."""
        sizes = self.sizes[units]
        before = np.cumsum(sizes) - sizes
        within = np.arange(sizes.sum()) + np.repeat(self.starts[units] - before, sizes)
        rows: IntColumn = self.places[within]
        return rows


def units_of(measured: Measured) -> Units:
    """The units of the usable rows."""
    group, rows = measured.columns["group"], np.arange(len(measured))
    if not measured.groups:
        return Units(rows, np.arange(len(measured) + 1))
    keys = np.where(group == NONE, rows, len(rows) + group)
    _, first, inverse, sizes = np.unique(
        keys, return_index=True, return_inverse=True, return_counts=True
    )
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return Units(
        np.argsort(rank[inverse], kind="stable"), np.concatenate([[0], np.cumsum(sizes[order])])
    )


def costs_of(measured: Measured, limits: PackLimits) -> IntColumn:
    """(rows, budgets): what each row takes of what `limits.given()` names."""
    lengths = measured.lengths
    costs = {
        "positions": lengths,
        "documents": np.ones_like(lengths),
        "patches": measured.columns["patches"],
        "frames": measured.columns["frames"],
        "squares": lengths * lengths,
    }
    return np.stack([costs[name] for name in limits.given()], axis=1)


def screen(measured: Measured, *, limits: PackLimits, policy: FailurePolicy) -> Measured:
    """Refuse or shorten what no pack can hold: long rows and groups, groups with a broken row.

    Raises:
        DataError: a row or group is too long and the policy calls that an error.
    """
    units, costs = units_of(measured), costs_of(measured, limits)
    most = np.array(list(limits.given().values()))
    incomplete = {row.group: row.row for row in measured.refused if row.group is not None}
    broken = [n for n, group in enumerate(measured.groups) if group in incomplete]
    lost = np.isin(measured.columns["group"], broken).astype(np.int64)
    over = (units.sums(costs) > most).any(axis=1) | units.sums(lost[:, None]).any(axis=1)
    keep = np.ones(len(measured), dtype=bool)
    refused, cuts = list(measured.refused), dict[int, int]()
    rows = measured.rows
    for unit in np.flatnonzero(over).tolist():
        places = units.places[units.starts[unit] : units.starts[unit + 1]].tolist()
        held = [rows[place] for place in places]
        group = held[0].group
        if group in incomplete:
            reason = f"row {incomplete[group]} of its group cannot be used"
        elif policy.too_long == "truncate":
            found, reason = cut_to_fit(held, limits)
            cuts |= dict(zip(places, found, strict=True)) if found else {}
        else:
            reason = _too_long(costs[places].sum(axis=0).tolist(), len(held), limits)
            _refuse_long(reason, held[0].origin, policy)
        if reason:
            keep[places] = False
            refused += [RefusedRow(r.row, r.origin, "dropped", reason, r.group) for r in held]
    refused.sort(key=lambda row: row.row)
    return _shortened(measured, cuts).taken(keep, refused)


def _shortened(measured: Measured, cuts: dict[int, int]) -> Measured:
    """The rows without the positions that are cut off the ends of some."""
    if not any(cuts.values()):
        return measured
    cut, text = measured.columns["cut"].copy(), measured.positions["text"].copy()
    places, counts = np.array(list(cuts)), np.array(list(cuts.values()))
    cut[places] += counts
    text[places] -= counts
    return replace(
        measured,
        columns={**measured.columns, "cut": cut},
        positions={**measured.positions, "text": text},
    )


def _refuse_long(reason: str, origin: Origin, policy: FailurePolicy) -> None:
    if policy.too_long == "error":
        raise DataError(
            f"{reason}; raise the limit, shorten the row, or set too_long to drop or truncate",
            origin,
        )


def _too_long(costs: Sequence[int], documents: int, limits: PackLimits) -> str:
    """Why no pack can hold what takes `costs`."""
    subject = "an item" if documents == 1 else f"a group of {documents} items"
    for (name, limit), cost in zip(limits.given().items(), costs, strict=True):
        if cost <= limit:
            continue
        if name == "positions":
            return f"{subject} longer than the pack: {cost} positions, and a pack holds {limit}"
        if name == "documents":
            return f"{subject} does not fit in one pack of at most {limit} documents"
        return f"{subject} does not fit in one pack of at most {limit} {name}: it has {cost}"
    return ""

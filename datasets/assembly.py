"""A micro-batch put together: what loaded, what broke, and what had to go with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from plait.datasets.columns import MeasuredRow
from plait.datasets.executor import Done
from plait.datasets.ledger import Status
from plait.errors import DataError, DecodeTimeoutError, Origin
from plait.stream import Document, ItemInputs


@dataclass(frozen=True, slots=True)
class RowOutcome:
    """What became of one row of a pack. `epoch` is that of its own dataset."""

    origin: Origin
    status: Status
    reason: str = ""
    error: DataError | None = None
    epoch: int = 0

    @property
    def trained(self) -> bool:
        """Whether the row is in the pack."""
        return self.status in ("used", "truncated")


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """One micro-batch: documents, the loaded inputs of their items, and their row numbers.

    `epoch` counts passes over all rows: of a blend, its blocks. `index` counts the packs of it,
    those that came to nothing included. `outcomes` says what became of every row that was planned
    for this pack.
    """

    index: int
    epoch: int
    documents: tuple[Document, ...]
    inputs: tuple[tuple[ItemInputs, ...], ...]
    rows: tuple[int, ...]
    outcomes: tuple[RowOutcome, ...] = ()

    @property
    def length(self) -> int:
        """Positions of all documents."""
        return sum(document.length for document in self.documents)


@dataclass(frozen=True, slots=True)
class Task:
    """A row of a pack, to be rendered and loaded. `epoch` is that of its own dataset."""

    block: int
    index: int
    row: MeasuredRow
    epoch: int
    view: int


Loaded = tuple[Document, tuple[ItemInputs, ...]]
"""A rendered row and the inputs of its items."""


def bytes_of(loaded: Loaded) -> int:
    """What a row holds in memory until its pack is used."""
    document, inputs = loaded
    total = document.token_ids.nbytes + document.targets.nbytes + document.weights.nbytes
    for item in inputs:
        for tensor in (item.inputs or {}).values():
            total += tensor.nbytes
        if item.features is not None:
            held = (item.features.embeddings, *item.features.layers)
            total += sum(tensor.nbytes for tensor in held)
    return total


def view_of(seed: int, epoch: int, row: int, views: int) -> int:
    """The view of a row in an epoch: a seeded start, then each view in turn."""
    start = int(np.random.default_rng([seed, row]).integers(views))
    return (start + epoch) % views


def assemble(batch: Sequence[Done[Task, Loaded]]) -> Pack:
    """The pack of what loaded; the rest of a broken row's group goes with it.

    Raises:
        Exception: what a row raised, where that is not a DataError: a bug, not bad data.
    """
    broken = _broken_groups(batch)
    kept: list[Loaded] = []
    rows: list[int] = []
    outcomes: list[RowOutcome] = []
    for done in batch:
        row, epoch = done.task.row, done.task.epoch
        if isinstance(done.error, DataError):
            error = done.error
            # The bytes of a row that timed out may be whole: it is dropped, and may not be again.
            status: Status = "dropped" if isinstance(error, DecodeTimeoutError) else "broken"
            outcomes.append(RowOutcome(error.origin, status, error.message, error, epoch))
        elif (row.group, epoch) in broken:
            reason = f"row {broken[row.group, epoch]} of its group broke"
            outcomes.append(RowOutcome(row.origin, "dropped", reason, epoch=epoch))
        else:
            kept.append(done.result())
            rows.append(row.row)
            outcomes.append(_trained(row, epoch))
    return Pack(
        index=batch[0].task.index,
        epoch=batch[0].task.block,
        documents=tuple(document for document, _ in kept),
        inputs=tuple(inputs for _, inputs in kept),
        rows=tuple(rows),
        outcomes=tuple(outcomes),
    )


def _broken_groups(batch: Sequence[Done[Task, Loaded]]) -> dict[tuple[Any, int], int]:
    """The groups, each in its epoch, of which a row broke, and which row."""
    broken: dict[tuple[Any, int], int] = {}
    for done in batch:
        if done.error is not None:
            if not isinstance(done.error, DataError):
                raise done.error
            if done.task.row.group is not None:
                broken.setdefault((done.task.row.group, done.task.epoch), done.task.row.row)
    return broken


def _trained(row: MeasuredRow, epoch: int) -> RowOutcome:
    if not row.cut:
        return RowOutcome(row.origin, "used", epoch=epoch)
    reason = f"{row.cut} of {row.length + row.cut} positions were cut off its end"
    return RowOutcome(row.origin, "truncated", reason, epoch=epoch)

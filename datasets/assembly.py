"""A micro-batch put together: what loaded, what broke, and what had to go with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from plait.datasets.executor import Done
from plait.datasets.ledger import Status
from plait.datasets.planning import MeasuredRow
from plait.errors import DataError, Origin
from plait.stream import Document, ItemInputs


@dataclass(frozen=True, slots=True)
class RowOutcome:
    """What became of one row of a pack."""

    origin: Origin
    status: Status
    reason: str = ""
    error: DataError | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """One micro-batch: documents, the loaded inputs of their items, and their row numbers.

    `index` counts the packs of the epoch, those that came to nothing included. `outcomes` says
    what became of every row that was planned for this pack.
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
    """A row of a pack, to be rendered and loaded."""

    epoch: int
    index: int
    row: MeasuredRow
    view: int


Loaded = tuple[Document, tuple[ItemInputs, ...]]
"""A rendered row and the inputs of its items."""


def view_of(seed: int, epoch: int, row: int, views: int) -> int:
    """The view of a row in an epoch: a seeded start, then each view in turn."""
    start = int(np.random.default_rng([seed, row]).integers(views))
    return (start + epoch) % views


def assemble(batch: Sequence[Done[Task, Loaded]]) -> Pack:
    """The pack of what loaded; the rest of a broken row's group goes with it.

    Raises:
        Exception: what a row raised, where that is not a DataError: a bug, not bad data.
    """
    broken: dict[Any, int] = {}
    for done in batch:
        if done.error is not None:
            if not isinstance(done.error, DataError):
                raise done.error
            if done.task.row.group is not None:
                broken.setdefault(done.task.row.group, done.task.row.row)
    kept: list[Loaded] = []
    rows: list[int] = []
    outcomes: list[RowOutcome] = []
    for done in batch:
        row = done.task.row
        if isinstance(done.error, DataError):
            error = done.error
            outcomes.append(RowOutcome(error.origin, "broken", error.message, error))
        elif row.group in broken:
            reason = f"row {broken[row.group]} of its group broke"
            outcomes.append(RowOutcome(row.origin, "dropped", reason))
        else:
            kept.append(done.result())
            rows.append(row.row)
            outcomes.append(RowOutcome(row.origin, "used"))
    return Pack(
        index=batch[0].task.index,
        epoch=batch[0].task.epoch,
        documents=tuple(document for document, _ in kept),
        inputs=tuple(inputs for _, inputs in kept),
        rows=tuple(rows),
        outcomes=tuple(outcomes),
    )

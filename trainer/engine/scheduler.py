"""Whose turn it is: commands of each run in their order, runs by how much they have had."""

from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from plait.trainer.engine.commands import (
    CancelSample,
    Command,
    CreateRun,
    CreateView,
    DocumentResult,
    DropRun,
    DropView,
    ForwardBackward,
    Sample,
)

_AT_ONCE = (Sample, CancelSample, DropRun, DropView)
"""Commands that take next to no time, and that others wait for."""


@dataclass(slots=True, eq=False)
class Queued:
    """A command on its way, and how much of it is computed."""

    command: Command
    future: "Future[Any]"
    taken: int = 0
    """Micro-batches that some rank computes, or has computed."""

    computed: int = 0
    results: list[DocumentResult | None] = field(default_factory=list)
    error: Exception | None = None

    @property
    def owner(self) -> str:
        """Whose order it stands in: its run's, or its view's."""
        return str(getattr(self.command, "run", None) or getattr(self.command, "view", ""))

    @property
    def waits(self) -> bool:
        """Whether some of its micro-batches are nobody's yet."""
        return isinstance(self.command, ForwardBackward) and (
            self.taken < len(self.command.micro_batches)
        )

    @property
    def batch(self) -> list[int]:
        """Indices of the documents that are next."""
        assert isinstance(self.command, ForwardBackward)
        return self.command.micro_batches[self.taken]

    @property
    def positions(self) -> int:
        """Of the documents that are next."""
        assert isinstance(self.command, ForwardBackward)
        return sum(self.command.documents[i].length for i in self.batch)

    @property
    def whole(self) -> bool:
        """Whether nothing of it is left to compute."""
        assert isinstance(self.command, ForwardBackward)
        return self.computed == len(self.command.micro_batches)


class Taken(NamedTuple):
    """A micro-batch that is to be computed now."""

    queued: Queued
    number: int


class Kind(NamedTuple):
    """What a run's micro-batches may share."""

    model: Hashable
    """Ranks that read together read rows of one model."""

    row: Hashable | None
    """A row holds runs of one kind; None is a row of its own."""


class Scheduler:
    """Queues of runs and views; only those with something to do are kept.

    Among them, the one that has had the fewest positions is next, and its row is filled with
    micro-batches of others that may stand beside it, while they fit. One that comes back begins
    with as much as the least of those that are there: nobody saves up turns. What is not a
    `forward_backward` (a step, a save) comes before the rows, for it holds nobody up for long; but
    a run that has queued many of them does one for each row that waits.

    Args:
        capacity: Positions of a row at most.
        max_documents: Documents of a row at most; None is no limit.
        kind_of: Tells a run's kind.
        rows: How many are computed at the same time.
        one_model: Whether all of these rows must be read by one model.
    """

    def __init__(
        self,
        capacity: int,
        max_documents: int | None,
        kind_of: Callable[[str], Kind],
        rows: int = 1,
        one_model: bool = False,
    ) -> None:
        self.capacity, self.max_documents = capacity, max_documents
        self._kind_of, self._rows, self._one_model = kind_of, rows, one_model
        self._queues: dict[str, deque[Queued]] = {}
        self._served: dict[str, int] = {}
        self._let_in: set[str] = set()
        """Whose commands came before the next row."""

    def __bool__(self) -> bool:
        return bool(self._queues)

    def put(self, queued: Queued) -> None:
        owner = queued.owner
        if owner not in self._queues:
            self._queues[owner] = deque()
            self._served[owner] = min(self._served.values(), default=0)
        self._queues[owner].append(queued)

    def next(self) -> Queued | list[list[Taken]]:
        """What to do next: one command, or rows of micro-batches to compute at the same time.

        Commands stay queued until `done`.
        """
        heads = [self._queues[owner][0] for owner in self._order()]
        others = [head for head in heads if not isinstance(head.command, ForwardBackward)]
        rows_wait = len(others) < len(self._queues)
        for first in others:
            at_once = isinstance(first.command, _AT_ONCE)
            # Each creation is of an owner of its own: all of them are one.
            turn = "" if isinstance(first.command, CreateRun | CreateView) else first.owner
            if at_once or not rows_wait or turn not in self._let_in:
                if not at_once:
                    self._let_in.add(turn)
                return first
        self._let_in.clear()
        rows = [self._row(None)]
        model = self._kind_of(rows[0][0].queued.owner).model if self._one_model else None
        while len(rows) < self._rows and (row := self._row(model)):
            rows.append(row)
        return rows

    def _order(self) -> list[str]:
        return sorted(self._queues, key=lambda owner: self._served[owner])

    def _row(self, model: Hashable | None) -> list[Taken]:
        """The next row, of runs of `model` if it is given; empty where nothing waits."""
        waiting = [owner for owner in self._order() if self._queues[owner][0].waits]
        if model is not None:
            waiting = [owner for owner in waiting if self._kind_of(owner).model == model]
        if not waiting:
            return []
        kind = self._kind_of(waiting[0])
        row: list[Taken] = []
        positions = documents = 0
        for owner in waiting if kind.row is not None else waiting[:1]:
            more = self._queues[owner][0]
            if self._kind_of(owner) != kind:
                continue
            positions += more.positions
            documents += len(more.batch)
            over = positions > self.capacity or documents > (self.max_documents or documents)
            if over and row:
                positions -= more.positions
                documents -= len(more.batch)
                continue
            row.append(self._take(more))
        return row

    def _take(self, queued: Queued) -> Taken:
        self._served[queued.owner] += queued.positions
        taken = Taken(queued, queued.taken)
        queued.taken += 1
        return taken

    def under_way(self) -> list[Queued]:
        """Commands of which a part is computed."""
        return [queue[0] for queue in self._queues.values() if queue[0].taken]

    def done(self, queued: Queued) -> None:
        """A command has ended, one way or the other."""
        queue = self._queues[queued.owner]
        queue.remove(queued)
        if not queue:
            del self._queues[queued.owner], self._served[queued.owner]

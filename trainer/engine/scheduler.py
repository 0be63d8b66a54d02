"""Whose turn it is: commands of each run in their order, runs by how much they have had."""

from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from plait.trainer.engine.commands import Command, DocumentResult, ForwardBackward


@dataclass(slots=True, eq=False)
class Queued:
    """A command on its way, and how much of it is computed."""

    command: Command
    future: "Future[Any]"
    next_batch: int = 0
    results: list[DocumentResult | None] = field(default_factory=list)

    @property
    def owner(self) -> str:
        """Whose order it stands in: its run's, or its view's."""
        return str(getattr(self.command, "run", None) or getattr(self.command, "view", ""))

    @property
    def batch(self) -> list[int]:
        """Indices of the documents that are next."""
        assert isinstance(self.command, ForwardBackward)
        return self.command.micro_batches[self.next_batch]

    @property
    def positions(self) -> int:
        """Of the documents that are next."""
        assert isinstance(self.command, ForwardBackward)
        return sum(self.command.documents[i].length for i in self.batch)


Together = Callable[[str], Hashable | None]
"""What a run's micro-batches may share a row with: all that answers the same. None is nobody."""


class Scheduler:
    """Queues of runs and views; only those with something to do are kept.

    Among them, the one that has had the fewest positions is next, and its row is filled with
    micro-batches of others that may stand beside it, while they fit. One that comes back begins
    with as much as the least of those that are there: nobody saves up turns.

    Args:
        capacity: Positions of a row at most.
        max_documents: Documents of a row at most; None is no limit.
    """

    def __init__(self, capacity: int, max_documents: int | None, together: Together) -> None:
        self.capacity, self.max_documents = capacity, max_documents
        self._together = together
        self._queues: dict[str, deque[Queued]] = {}
        self._served: dict[str, int] = {}

    def __bool__(self) -> bool:
        return bool(self._queues)

    def put(self, queued: Queued) -> None:
        owner = queued.owner
        if owner not in self._queues:
            self._queues[owner] = deque()
            self._served[owner] = min(self._served.values(), default=0)
        self._queues[owner].append(queued)

    def next(self) -> list[Queued]:
        """What to do next: one command, or the next micro-batches of several.

        They stay queued until `done`.
        """
        order = sorted(self._queues, key=lambda owner: self._served[owner])
        for owner in order:  # quick ones first: they wait for nothing and hold nobody up
            if not isinstance(self._queues[owner][0].command, ForwardBackward):
                return [self._queues[owner][0]]
        first = self._queues[order[0]][0]
        row, positions, documents = [first], first.positions, len(first.batch)
        kind = self._together(first.owner)
        for owner in order[1:] if kind is not None else ():
            more = self._queues[owner][0]
            if self._together(owner) != kind:
                continue
            positions += more.positions
            documents += len(more.batch)
            if positions > self.capacity or documents > (self.max_documents or documents):
                positions -= more.positions
                documents -= len(more.batch)
                continue
            row.append(more)
        for queued in row:
            self._served[queued.owner] += queued.positions
        return row

    def done(self, queued: Queued) -> None:
        """A command has ended, one way or the other."""
        queue = self._queues[queued.owner]
        queue.remove(queued)
        if not queue:
            del self._queues[queued.owner], self._served[queued.owner]

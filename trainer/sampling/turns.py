"""Whose turn it is, among owners that share a sampler."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from heapq import heapify, heappop, heappush
from operator import attrgetter

from plait.trainer.sampling.requests import Job

_NUMBER = attrgetter("number")


class Queues:
    """Jobs that wait, those of each owner in the order of their arrival."""

    def __init__(self) -> None:
        self.by_owner: dict[str, list[Job]] = {}
        """Of owners that wait, and no others."""

    def __bool__(self) -> bool:
        return bool(self.by_owner)

    def __contains__(self, job: Job) -> bool:
        queue = self.by_owner.get(job.request.owner, [])
        at = bisect_left(queue, job.number, key=_NUMBER)
        return at < len(queue) and queue[at] is job

    def __iter__(self) -> Iterator[Job]:
        for queue in self.by_owner.values():
            yield from queue

    @property
    def owners(self) -> Set[str]:
        """Those that wait."""
        return self.by_owner.keys()

    def add(self, job: Job) -> None:
        """Queue the latest arrival."""
        self.by_owner.setdefault(job.request.owner, []).append(job)

    def discard(self, job: Job) -> None:
        """Take a job out, if it is in."""
        if job in self:
            queue = self.by_owner[job.request.owner]
            del queue[bisect_left(queue, job.number, key=_NUMBER)]
            if not queue:
                del self.by_owner[job.request.owner]


class Turns:
    """Serves owners in turn, however many requests each of them has."""

    def __init__(self) -> None:
        self._served: dict[str, int] = {}
        self._clock = 0

    def order(self, jobs: Iterable[Job], held: Mapping[str, int] | None = None) -> Iterator[Job]:
        """The first job of each owner, then the second of each; of equals that of the owner who
        was served longest ago.

        Args:
            held: What owners have of it already: so many of their turns are over.
        """
        by_owner: dict[str, list[Job]] = {}
        for job in jobs:
            by_owner.setdefault(job.request.owner, []).append(job)
        return self.order_of(by_owner, held)

    def order_of(
        self, by_owner: Mapping[str, Sequence[Job]], held: Mapping[str, int] | None = None
    ) -> Iterator[Job]:
        """As `order`, of queues that may be thousands long: costs what is taken from it, not what
        waits. A job may leave its queue as soon as it has come.
        """
        if len(self._served) > 2 * len(by_owner) + 64:  # most of them are gone for good
            self._served = {o: self._served[o] for o in by_owner if o in self._served}
        for owner in by_owner:  # a new one comes behind those that wait already
            self._served.setdefault(owner, self._clock)
        over = Counter(held)
        heads = [
            (over[owner], self._served[owner], queue[0].number, 0, queue)
            for owner, queue in by_owner.items()
        ]
        heapify(heads)
        while heads:
            place, served, _, at, queue = heappop(heads)
            if at >= len(queue):  # what was to come has left
                continue
            job = queue[at]
            yield job
            at += at < len(queue) and queue[at] is job
            if at < len(queue):
                heappush(heads, (place + 1, served, queue[at].number, at, queue))

    def serve(self, job: Job) -> None:
        """Note that a job's owner has had a turn."""
        self._clock += 1
        self._served[job.request.owner] = self._clock

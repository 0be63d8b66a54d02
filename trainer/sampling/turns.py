"""Whose turn it is, among owners that share a sampler."""

from collections import Counter
from collections.abc import Mapping, Sequence

from plait.trainer.sampling.requests import Job


class Turns:
    """Serves owners in turn, however many requests each of them has."""

    def __init__(self) -> None:
        self._served: dict[str, int] = {}
        self._clock = 0

    def order(self, jobs: Sequence[Job], held: Mapping[str, int] | None = None) -> list[Job]:
        """The first job of each owner, then the second of each; of equals that of the owner who
        was served longest ago.

        Args:
            held: What owners have of it already: so many of their turns are over.
        """
        if not jobs:  # nobody has waited: turns begin anew
            self._served.clear()
        place = Counter(held)
        ranked = []
        for number, job in enumerate(jobs):
            owner = job.request.owner
            ranked.append((place[owner], self._served.get(owner, 0), number, job))
            place[owner] += 1
        return [job for *_, job in sorted(ranked, key=lambda one: one[:3])]

    def serve(self, job: Job) -> None:
        """Note that a job's owner has had a turn."""
        self._clock += 1
        self._served[job.request.owner] = self._clock

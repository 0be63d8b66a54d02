"""Room in the memory of keys: for prompts, which may begin with another's, and for their samples.

Whoever gets room has all that it may need until it is done: no request runs out of it half-way.
"""

from plait.trainer.sampling.memory import Memory, Place
from plait.trainer.sampling.prefixes import SHORTEST, Prefixes, last_cut
from plait.trainer.sampling.requests import Continuation, Job, Prompt


class Rooms:
    """Gives room to requests, and takes it back.

    Args:
        share: Whether prompts that begin alike are read once.
    """

    def __init__(self, memory: Memory, *, share: bool) -> None:
        self.memory = memory
        self.prefixes = Prefixes(memory)
        self._share = share

    def open(self, job: Job, prompt: Prompt, *, first: bool) -> bool | None:
        """Whether there was room for the prompt; None where waiting for another's is better.

        Args:
            first: Whether nothing else has room: what fits alone then gets it.
        """
        length, model = len(prompt.keys), job.request.model
        known, common = (None, 0)
        if self._share and job.scores is None:
            known, common = self.prefixes.find(model, prompt.keys)
            common = last_cut(prompt.hi.numpy(), min(common, length - 1))
        shared = 0
        if known is not None and common >= SHORTEST:
            shared = min(common, known.place.length)
            if shared < common:
                return None
        source = known.place if known is not None and shared else None
        if not self._reserve(job, prompt, source, shared):
            if not first:
                return False
            # Alone it fits, as `needed` said: perhaps not beside all of what it begins with, or
            # not between what others left.
            while self.prefixes.drop():
                pass
            shared = 0
            if not self._reserve(job, prompt, None, shared):
                return False
        assert prompt.place is not None
        if self._share and shared < length - 1:  # else the other serves later ones as well
            self.prefixes.keep(model, prompt.keys, prompt.place)
        return True

    def of_sample(self, job: Job, prompt: Prompt) -> Place | None:
        """Where the next sample's keys go; None where there is no room for it now."""
        assert prompt.place is not None
        if job.request.samples == 1:
            return prompt.place
        place = job.reserved or self._place(job.most - 1, prompt.place, len(prompt.hi))
        job.reserved = None
        return place

    def leave(self, sample: Continuation) -> None:
        """Take a sample's room back."""
        if sample.owns_place:
            self.memory.close(sample.place)

    def close(self, job: Job) -> None:
        """Take back all that a request has; what was read of its prompt serves later ones."""
        for sample in job.running:
            self.leave(sample)
        job.running.clear()
        if job.reserved is not None:
            self.memory.close(job.reserved)
            job.reserved = None
        if job.prompt is not None and job.prompt.place is not None:
            if job.prompt.end is None:  # nobody will read the rest of it
                self.prefixes.remove(job.prompt.place)
            # Who begins with this prompt does not need the room that its sample grew into.
            self.memory.close(job.prompt.place, job.prompt.read - job.prompt.place.before)
            job.prompt.place = None

    def _reserve(self, job: Job, prompt: Prompt, source: Place | None, shared: int) -> bool:
        """Whether there was room for a prompt behind `shared` positions of `source`."""
        length, alone = len(prompt.keys), job.request.samples <= 1
        if source is not None:
            source.users += 1  # so that making room does not take it
        try:
            place = self._place(length - shared + (job.most - 1) * alone, source, shared)
        finally:
            if source is not None:
                self.memory.close(source)
        if place is None:
            return False
        prompt.place, prompt.read = place, shared
        if not alone:
            # Its first sample's room at once: else prompts could take all of it, and none go on.
            job.reserved = self._place(job.most - 1, place, length)
            if job.reserved is None:
                self.memory.close(place)
                prompt.place, prompt.read = None, 0
                return False
        return True

    def _place(self, capacity: int, source: Place | None, length: int) -> Place | None:
        """Room, for which places that nobody uses are given up."""
        place = self.memory.open(capacity, source, length)
        while place is None and self.prefixes.drop():
            place = self.memory.open(capacity, source, length)
        return place

"""Prompts that begin alike: which positions are the same, and who has read them already.

Shape letters: T positions of a prompt.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import ReferenceType, ref

import numpy as np
from numpy.typing import NDArray

from plait.stream import Document, IntArray, ItemInputs
from plait.trainer.sampling.memory import Memory, Place

SHORTEST = 16
"""Fewer positions in common are read again: linking to them costs about as much."""


def position_keys(document: Document, inputs: Sequence[ItemInputs]) -> IntArray:
    """(T,) token ids, and below them a number for each position of each media item.

    Equal numbers in two documents mean equal embeddings under the same weights.

    Args:
        inputs: The document's media as they were loaded, whose content the numbers stand for.
    """
    keys = document.token_ids.astype(np.int64)
    for span in document.spans:
        fact = f"{inputs[span.item].digest()} {document.items[span.item].plan}"
        first = int.from_bytes(hashlib.sha256(fact.encode()).digest()[:6], "big") << 14
        offsets = np.arange(span.offset, span.offset + span.length)
        keys[span.start : span.stop] = -1 - (first + offsets)
    return keys


def cuts(hi: IntArray) -> NDArray[np.bool_]:
    """(T,) whether a prompt may be cut behind each position: none before it sees beyond it."""
    return hi <= np.arange(1, len(hi) + 1)


def last_cut(hi: IntArray, length: int) -> int:
    """The last place to cut at, `length` or before; 0 where there is none."""
    (ends,) = np.nonzero(cuts(hi)[:length])
    return int(ends[-1]) + 1 if len(ends) else 0


def next_cut(hi: IntArray, start: int, length: int) -> int:
    """Where to end a chunk that begins at `start`: `length` positions on or before, but behind the
    whole of a group where the first one is longer."""
    end = last_cut(hi, min(start + length, len(hi)))
    if end > start:
        return end
    return start + 1 + int(np.argmax(cuts(hi)[start:]))


@dataclass(slots=True, eq=False)
class Known:
    """A place, and the keys of the positions that it holds, or will hold soon."""

    weights: ReferenceType[object]
    """The model that read them. It may be gone, and its `id` another's."""

    keys: IntArray
    place: Place
    used: int = 0


class Prefixes:
    """Places that later prompts may begin with; those nobody uses go when room is needed."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._known: list[Known] = []
        self._clock = 0

    def keep(self, weights: object, keys: IntArray, place: Place) -> Known:
        """Remember a place until `drop` or `forget`; it stays open as long."""
        self._clock += 1
        place.users += 1
        known = Known(ref(weights), keys, place, self._clock)
        self._known.append(known)
        return known

    def find(self, weights: object, keys: IntArray) -> tuple[Known | None, int]:
        """Who begins most like `keys`, and for how many positions, read or not yet."""
        best: tuple[Known | None, int] = (None, 0)
        for known in self._known:
            if known.weights() is weights:
                length = _common(known.keys, keys)
                if length > best[1]:
                    best = known, length
        if best[0] is not None:
            self._clock += 1
            best[0].used = self._clock
        return best

    def drop(self) -> bool:
        """Give up the place that was not used for the longest time; False where all are in use."""
        idle = [known for known in self._known if known.place.users == 1]
        if not idle:
            return False
        self._remove(min(idle, key=lambda known: known.used))
        return True

    def forget(self, weights: object) -> None:
        """Give up all that these weights read."""
        for known in [known for known in self._known if known.weights() is weights]:
            self._remove(known)

    def remove(self, place: Place) -> None:
        """Give up a place that does not hold what it should."""
        for known in [known for known in self._known if known.place is place]:
            self._remove(known)

    def _remove(self, known: Known) -> None:
        self._known.remove(known)
        self._memory.close(known.place)


def _common(one: IntArray, other: IntArray) -> int:
    """How many first numbers are equal."""
    length = min(len(one), len(other))
    different = one[:length] != other[:length]
    return int(different.argmax()) if different.any() else length

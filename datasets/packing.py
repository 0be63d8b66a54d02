"""Packing: which samples share a row, chosen in one pass over a stream of lengths.

The packer holds back at most `window` samples. Each pack starts with the oldest of them and goes
on in order of arrival until a quarter of it is left; best fit (the longest held sample that still
fits) closes the rest. Order first keeps packs from becoming all long or all short when a whole
dataset fits into the window; the oldest first bounds how long a sample can wait.

Documents are isolated by `plait.stream.pack` and never split: this module only says who sits
where. It is a pure function of its input, so a plan is recomputed rather than stored.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from plait.errors import ConfigError, DataError, Origin

Key = TypeVar("Key", bound=Hashable)

WINDOW = 1024
"""Samples held back at most; what the published fills are measured with."""

_BEST_FIT_BELOW = 0.25
"""Share of a pack that best fit closes. On shared length mixes 0 fills 0.992 of video, 0.25 0.993
and 1 (best fit alone) 0.985, but 1 sorts small datasets by length."""


@dataclass(frozen=True, slots=True)
class Unit(Generic[Key]):
    """What is packed whole: one document, or all documents of one group. `length` in positions."""

    keys: tuple[Key, ...]
    length: int


def make_units(
    keys: Iterable[Key], lengths: Sequence[int], groups: Sequence[Hashable | None] | None = None
) -> list[Unit[Key]]:
    """One unit for each key without a group and each group, in order of first appearance."""
    members: dict[Hashable, list[tuple[Key, int]]] = {}
    for number, (key, length) in enumerate(zip(keys, lengths, strict=True)):
        group = groups[number] if groups is not None else None
        # The marks keep a lone row 3 apart from a group that is called 3.
        name = ("row", number) if group is None else ("group", group)
        members.setdefault(name, []).append((key, length))
    return [
        Unit(tuple(key for key, _ in unit), sum(length for _, length in unit))
        for unit in members.values()
    ]


def fill_of(lengths: Iterable[int], capacity: int) -> float:
    """The share of all packs' positions that documents take, from the packs' lengths.

    Every pack counts in full, the last and emptiest too. No packs fill 0.
    """
    taken = list(lengths)
    return sum(taken) / (len(taken) * capacity) if taken else 0.0


def best_fit(
    units: Iterable[Unit[Key]],
    *,
    capacity: int,
    max_documents: int | None = None,
    window: int = WINDOW,
) -> Iterator[list[Key]]:
    """Pack a stream of units, reading at most `window` documents ahead of what is given out.

    A group is read whole: where the last unit read is a group, it may exceed the window by its
    own documents less one.

    Args:
        units: In order; each is read once, only when the window has room.
        capacity: Positions of a pack.
        max_documents: Documents of a pack at most; None is no limit.

    Yields:
        The keys of one pack, in the order in which they were chosen.

    Raises:
        ConfigError: a limit below 1.
        DataError: a unit that no pack can hold, or one without positions.
    """
    for name, limit in [
        ("capacity", capacity),
        ("max_documents", max_documents),
        ("window", window),
    ]:
        if limit is not None and limit < 1:
            raise ConfigError(f"{name} must be at least 1, not {limit}")
    limit = max_documents or capacity  # a document has a position, so this many always suffice
    held: _Held[Key] = _Held()
    source = iter(units)
    while True:
        while held.documents < window and (unit := next(source, None)) is not None:
            _check(unit, capacity, max_documents)
            held.add(unit)
        if not held.documents:
            return
        yield _one_pack(held, capacity, limit)


def _one_pack(held: "_Held[Key]", capacity: int, limit: int) -> list[Key]:
    left, pack = capacity, list[Key]()
    while (unit := held.oldest()) is not None:
        if unit.length > left or len(unit.keys) > limit - len(pack):
            break
        held.take_oldest()
        pack += unit.keys
        left -= unit.length
        if left <= _BEST_FIT_BELOW * capacity:
            break
    while (unit := held.take_longest(left, limit - len(pack))) is not None:
        pack += unit.keys
        left -= unit.length
    return pack


def _check(unit: Unit[Key], capacity: int, max_documents: int | None) -> None:
    key = unit.keys[0] if unit.keys else None
    origin = Origin(row=key) if isinstance(key, int) else Origin()
    subject = "an item" if len(unit.keys) == 1 else f"a group of {len(unit.keys)} items"
    if not unit.keys or unit.length < 1:
        raise DataError(f"{subject} needs at least one position to be packed", origin)
    if unit.length > capacity:
        raise DataError(
            f"{subject} longer than the pack: {unit.length} positions, and a pack holds "
            f"{capacity}; raise the capacity, shorten the row, or drop rows that are too long",
            origin,
        )
    if max_documents is not None and len(unit.keys) > max_documents:
        raise DataError(
            f"{subject} does not fit in one pack of at most {max_documents} documents; raise "
            "max_documents or make the group smaller",
            origin,
        )


class _Held(Generic[Key]):
    """The units held back, in order of arrival and in order of length."""

    def __init__(self) -> None:
        self.documents = 0
        self._units: dict[int, Unit[Key]] = {}
        self._arrived: deque[int] = deque()
        # (length, -number): the last entry up to a length is the longest, of equals the oldest.
        self._by_length: list[tuple[int, int]] = []
        self._next = 0

    def add(self, unit: Unit[Key]) -> None:
        self._units[self._next] = unit
        self._arrived.append(self._next)
        insort(self._by_length, (unit.length, -self._next))
        self.documents += len(unit.keys)
        self._next += 1

    def oldest(self) -> Unit[Key] | None:
        while self._arrived and self._arrived[0] not in self._units:
            self._arrived.popleft()
        return self._units[self._arrived[0]] if self._arrived else None

    def take_oldest(self) -> None:
        number = self._arrived[0]
        at = bisect_left(self._by_length, (self._units[number].length, -number))
        self._take(at)

    def take_longest(self, length: int, documents: int) -> Unit[Key] | None:
        """The longest unit of at most `length` positions and `documents` documents."""
        for at in range(bisect_left(self._by_length, (length, 1)) - 1, -1, -1):
            if documents < 1:
                break
            if len(self._units[-self._by_length[at][1]].keys) <= documents:
                return self._take(at)
        return None

    def _take(self, at: int) -> Unit[Key]:
        _, number = self._by_length.pop(at)
        unit = self._units.pop(-number)
        self.documents -= len(unit.keys)
        return unit

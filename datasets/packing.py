"""Packing: which samples share a row, chosen under several budgets at once.

Two packers. `best_fit` reads a stream of lengths once and holds back at most `window` samples.
Each pack starts with the oldest of them and goes on in order of arrival until a quarter of it is
left; best fit (the longest held sample that still fits) closes the rest. Order first keeps packs
from becoming all long or all short when a whole dataset fits into the window; the oldest first
bounds how long a sample can wait: `window` packs at most. `decreasing` sees all lengths, and puts
the longest first, each into the fullest pack that can still take it.

Documents are isolated by `plait.stream.pack` and never split: this module only says who sits
where. It is a pure function of its input, so a plan is recomputed rather than stored.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from plait.errors import ConfigError, DataError, Origin

Key = TypeVar("Key", bound=Hashable)

WINDOW = 1024
"""Samples held back at most; what the published fills are measured with."""

_BEST_FIT_BELOW = 0.25
"""Share of a pack that best fit closes. On shared length mixes 0 fills 0.992 of video, 0.25 0.993
and 1 (best fit alone) 0.985, but 1 sorts small datasets by length."""

_TRIES = 16
"""Candidates that fit by length and are over another budget, before a pack is closed."""

_CHUNK = 65_536
_NUMBER = (1 << 48) - 1

Cost = tuple[int, ...]
"""Of a unit: positions, documents, and one number for each further budget."""


@dataclass(frozen=True, slots=True)
class Unit(Generic[Key]):
    """What is packed whole: one document, or all documents of one group.

    `length` in positions; `costs` are what it takes of each further budget.
    """

    keys: tuple[Key, ...]
    length: int
    costs: tuple[int, ...] = ()


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
    budgets: Sequence[int] = (),
) -> Iterator[list[Key]]:
    """Pack a stream of units, reading at most `window` documents ahead of what is given out.

    A group is read whole: where the last unit read is a group, it may exceed the window by its
    own documents less one.

    Args:
        units: In order; each is read once, only when the window has room.
        capacity: Positions of a pack.
        max_documents: Documents of a pack at most; None is no limit.
        budgets: What the units' `costs` of one pack may add up to.

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
    held: dict[int, tuple[Key, ...]] = {}

    def costs() -> Iterator[Cost]:
        for number, unit in enumerate(units):
            _check(unit, capacity, max_documents, budgets)
            held[number] = unit.keys
            yield (unit.length, len(unit.keys), *unit.costs)

    # A document has a position, so that `capacity` documents always suffice.
    for pack in stream_packs(costs(), (capacity, max_documents or capacity, *budgets), window):
        yield [key for number in pack for key in held.pop(number)]


def stream_packs(
    costs: Iterator[Cost], limits: Sequence[int], window: int = WINDOW
) -> Iterator[list[int]]:
    """`best_fit` on bare costs: the numbers of the units of each pack, in order of choice.

    Args:
        costs: Of each unit, none of them over a limit; read only when the window has room.
        limits: Of each cost, for one pack.
    """
    held = _Held()
    while True:
        while held.documents < window and (cost := next(costs, None)) is not None:
            held.add(cost)
        if not held.units:
            return
        yield _one_pack(held, limits)


def decreasing_packs(costs: NDArray[np.int64], limits: Sequence[int]) -> list[list[int]]:
    """Best fit decreasing: the numbers of the units of each pack, the largest first.

    With several budgets a unit is as large as the largest share that it takes of any, and a pack
    has the room of its scarcest one: what is put there always fits.

    Args:
        costs: (units, limits), none of them over its limit.
    """
    scale = limits[0]
    sizes = (-(-costs * scale // np.asarray(limits, dtype=np.int64))).max(axis=1, initial=1)
    order = np.argsort(-sizes, kind="stable")
    rooms = _Rooms(int(sizes.min(initial=scale)))
    packs: list[list[int]] = []
    left: list[list[int]] = []
    for at in range(0, len(order), _CHUNK):
        numbers = order[at : at + _CHUNK]
        given = zip(numbers.tolist(), sizes[numbers].tolist(), costs[numbers].tolist(), strict=True)
        for number, size, cost in given:
            place = rooms.take(size)
            if place is None:
                place = len(packs)
                packs.append([])
                left.append(list(limits))
            packs[place].append(number)
            left[place] = [a - b for a, b in zip(left[place], cost, strict=True)]
            shares = zip(left[place], limits, strict=True)
            rooms.put(place, min(room * scale // limit for room, limit in shares))
    return packs


class _Rooms:
    """The packs that can still take something, by the room that they have left."""

    def __init__(self, smallest: int) -> None:
        self._smallest = smallest
        self._sizes: list[int] = []
        self._packs: dict[int, list[int]] = {}

    def put(self, pack: int, room: int) -> None:
        if room < self._smallest:
            return
        if room not in self._packs:
            insort(self._sizes, room)
            self._packs[room] = []
        self._packs[room].append(pack)

    def take(self, size: int) -> int | None:
        """The fullest pack that has room for `size`."""
        at = bisect_left(self._sizes, size)
        if at == len(self._sizes):
            return None
        room = self._sizes[at]
        pack = self._packs[room].pop()
        if not self._packs[room]:
            del self._packs[room]
            del self._sizes[at]
        return pack


def cost_stream(costs: NDArray[np.int64]) -> Iterator[Cost]:
    """The rows of (units, limits) as tuples, a chunk of them in memory at a time."""
    for at in range(0, len(costs), _CHUNK):
        yield from map(tuple, costs[at : at + _CHUNK].tolist())


def _one_pack(held: "_Held", limits: Sequence[int]) -> list[int]:
    left, pack = list(limits), list[int]()
    enough = _BEST_FIT_BELOW * limits[0]
    while (number := held.oldest()) is not None:
        if not _fits(held.units[number], left):
            break
        held.take_oldest(left)
        pack.append(number)
        if left[0] <= enough:
            break
    while (number := held.take_longest(left)) is not None:
        pack.append(number)
    return pack


def _fits(cost: Cost, left: Sequence[int]) -> bool:
    if cost[0] > left[0] or cost[1] > left[1]:
        return False
    return len(cost) == 2 or all(a <= b for a, b in zip(cost[2:], left[2:], strict=True))


def _check(
    unit: Unit[Key], capacity: int, max_documents: int | None, budgets: Sequence[int]
) -> None:
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
    for need, budget in zip(unit.costs, budgets, strict=True):
        if need > budget:
            raise DataError(
                f"{subject} needs {need} of a budget of which a pack has {budget}; raise it", origin
            )


class _Held:
    """The units held back, in order of arrival and in order of length."""

    def __init__(self) -> None:
        self.documents = 0
        self.units: dict[int, Cost] = {}
        self._arrived: deque[int] = deque()
        # Length and number as one integer: the last entry up to a length is the longest, and of
        # equals the oldest.
        self._by_length: list[int] = []
        self._next = 0

    def add(self, cost: Cost) -> None:
        number = self._next
        self.units[number] = cost
        self._arrived.append(number)
        insort(self._by_length, (cost[0] << 48) + _NUMBER - number)
        self.documents += cost[1]
        self._next = number + 1

    def oldest(self) -> int | None:
        arrived, units = self._arrived, self.units
        while arrived and arrived[0] not in units:
            arrived.popleft()
        return arrived[0] if arrived else None

    def take_oldest(self, left: list[int]) -> None:
        number = self._arrived.popleft()
        entry = (self.units[number][0] << 48) + _NUMBER - number
        del self._by_length[bisect_left(self._by_length, entry)]
        self._take(number, left)

    def take_longest(self, left: list[int]) -> int | None:
        """The longest unit that fits into what is left of a pack; only so many are tried."""
        if left[1] < 1:
            return None
        start = bisect_left(self._by_length, (left[0] + 1) << 48) - 1
        for at in range(start, max(-1, start - _TRIES), -1):
            number = _NUMBER - (self._by_length[at] & _NUMBER)
            if _fits(self.units[number], left):
                del self._by_length[at]
                self._take(number, left)
                return number
        return None

    def _take(self, number: int, left: list[int]) -> None:
        cost = self.units.pop(number)
        self.documents -= cost[1]
        for budget, need in enumerate(cost):
            left[budget] -= need

"""Stretches never overlap, join again when they are given back, and are given back once."""

import numpy as np
import pytest

from plait.errors import ModelError
from plait.trainer.sampling.arena import Arena


class Slots:
    """Who holds each slot, as a plain list: what `Arena` must agree with."""

    def __init__(self, size: int) -> None:
        self.holders: list[int | None] = [None] * size
        self.held: dict[int, tuple[int, int]] = {}

    def free_stretches(self) -> list[tuple[int, int]]:
        """(length, start) of each, none touching the next."""
        found, start = [], None
        for slot, holder in enumerate([*self.holders, -1]):
            if holder is None and start is None:
                start = slot
            if holder is not None and start is not None:
                found.append((slot - start, start))
                start = None
        return found

    def take(self, length: int) -> int | None:
        fitting = [one for one in self.free_stretches() if one[0] >= length]
        return min(fitting)[1] if fitting else None

    def fill(self, start: int, length: int, holder: int | None) -> None:
        assert all((slot is None) != (holder is None) for slot in self.holders[start:][:length])
        self.holders[start : start + length] = [holder] * length


@pytest.mark.parametrize("seed", range(20))
def test_arena_agrees_with_a_list_of_slots(seed: int) -> None:
    generator = np.random.default_rng(seed)
    size = int(generator.integers(0, 40))
    arena, slots = Arena(size), Slots(size)
    for turn in range(300):
        action = generator.choice(["take", "give", "grow"], p=[0.55, 0.43, 0.02])
        if action == "take":
            length = int(generator.integers(1, 12))
            start = arena.take(length)
            assert start == slots.take(length)
            if start is not None:
                slots.fill(start, length, turn)
                slots.held[turn] = (start, length)
        elif action == "give" and slots.held:
            start, length = slots.held.pop(int(generator.choice(list(slots.held))))
            arena.give(start, length)
            slots.fill(start, length, None)
        elif action == "grow":
            size = len(slots.holders) + int(generator.integers(-5, 20))
            arena.grow(size)
            slots.holders += [None] * (size - len(slots.holders))
        assert arena.size == len(slots.holders)
        assert arena.free == slots.holders.count(None)
    for start, length in slots.held.values():
        arena.give(start, length)
    assert arena.free == arena.size and arena.take(arena.size) == 0


@pytest.mark.parametrize(
    ("start", "length"),
    [(2, 3), (0, 2), (3, 1), (1, 9), (4, 6), (9, 2), (-1, 1), (-2, 4), (12, 1)],
)
def test_what_is_free_or_not_there_is_not_given_back(start: int, length: int) -> None:
    arena = Arena(10)
    assert [arena.take(2), arena.take(3), arena.take(5)] == [0, 2, 5]
    arena.give(2, 3)
    if (start, length) == (0, 2):
        arena.give(0, 2)
    with pytest.raises(ModelError, match=f"slots {start} to {start + length} are given back"):
        arena.give(start, length)
    assert arena.take(3) is not None, "a refusal changes nothing"


def test_an_arena_of_no_slots_grows() -> None:
    arena = Arena(0)
    assert arena.take(1) is None and arena.free == 0
    arena.grow(3)
    arena.grow(2)
    assert arena.take(3) == 0 and arena.size == 3

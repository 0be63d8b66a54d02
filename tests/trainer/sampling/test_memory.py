"""Whatever stands where, and whoever reads it: a sequence reads its own positions, and no other's.

The models are of whole numbers (`conftest.py`), so that equal means equal.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from plait.errors import ModelError
from plait.stream import pack
from plait.trainer.sampling import memory as room
from plait.trainer.sampling.memory import KeyMemory, Memory, Piece, Place, RowMemory

KINDS: dict[str, dict[str, bool]] = {
    "links": {},
    "copies": {"window": True},  # a window's keys must lie in one stretch
    "rows": {"packs": False},
}


@dataclass(eq=False)
class Sequence:
    """A place, and the tokens that it has read."""

    place: Place
    tokens: list[int]
    room: int


class Shelf:
    """A memory, and what is kept in it by the tokens themselves."""

    def __init__(self, whole: Any, kind: str, slots: int, **options: Any) -> None:
        self.model = whole.model(**KINDS[kind], **options)
        make = RowMemory if kind == "rows" else KeyMemory
        self.memory: Memory = make(self.model.backbone, slots)
        self.whole = whole

    def open(self, room: int, source: Sequence | None = None, length: int = 0) -> Sequence | None:
        place = self.memory.open(room, source.place if source else None, length)
        before = source.tokens[:length] if source else []
        return None if place is None else Sequence(place, before, room)

    def piece(self, sequence: Sequence, tokens: list[int]) -> Piece:
        start = len(sequence.tokens)
        rows, _ = self.model.embed(pack([self.whole.prompt(tokens)], [[]]))
        later = torch.arange(start, start + len(tokens))
        return Piece(sequence.place, rows.embeddings, later, later + 1)

    def read(self, added: dict[Sequence, list[int]]) -> list[Tensor]:
        found = self.memory.read([self.piece(*one) for one in added.items()])
        for sequence, tokens in added.items():
            sequence.tokens = sequence.tokens + tokens
            sequence.room -= len(tokens)
        return found

    def expected(self, sequence: Sequence, count: int) -> Tensor:
        """The last `count` hidden states, of the whole sequence in one row."""
        rows, _ = self.model.embed(pack([self.whole.prompt(sequence.tokens)], [[]]))
        return self.model.backbone.read(rows)[-count:]

    def read_and_check(self, added: dict[Sequence, list[int]]) -> None:
        for made, (sequence, tokens) in zip(self.read(added), added.items(), strict=True):
            assert torch.equal(made, self.expected(sequence, len(tokens)))


def opened(place: Sequence | None) -> Sequence:
    assert place is not None
    return place


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(6))
def test_any_tree_of_sequences_reads_what_it_holds(whole: Any, kind: str, seed: int) -> None:
    """Opened, continued, grown in pieces and closed at random, in few slots that are used again."""
    generator = np.random.default_rng(seed)
    shelf = Shelf(whole, kind, slots=150)
    kept: list[Sequence] = []
    deepest = refused = 0
    for _ in range(120):
        if kept and generator.random() < 0.25:
            shelf.memory.close(kept.pop(int(generator.integers(len(kept)))).place)
        source = kept[int(generator.integers(len(kept)))] if kept else None
        length = int(generator.integers(0, len(source.tokens) + 1)) if source else 0
        one = shelf.open(int(generator.integers(1, 12)), source if length else None, length)
        if one is None:
            refused += 1
        else:
            kept.append(one)
            deepest = max(deepest, len(one.place.links))
        added = {}
        for sequence in kept:
            count = min(sequence.room, int(generator.integers(0, 5)))
            if count:
                added[sequence] = whole.random(generator, count)
        if added:
            shelf.read_and_check(added)
    assert refused > 5 and deepest == (room.MOST_LINKS if kind == "links" else 0)
    for sequence in kept:
        shelf.memory.close(sequence.place)
    one = shelf.open(150)
    assert one is not None, "all room is free again"


@pytest.mark.parametrize("kind", KINDS)
def test_samples_of_a_prompt_are_opened_before_it_is_read(whole: Any, kind: str) -> None:
    shelf = Shelf(whole, kind, slots=80)
    prompt = opened(shelf.open(6))
    samples = [shelf.memory.open(4, prompt.place, 6) for _ in range(3)]
    shelf.read_and_check({prompt: [5, 6, 7, 8, 9, 10]})
    grown = [Sequence(p, prompt.tokens, 4) for p in samples if p is not None]
    shelf.memory.close(prompt.place)  # they keep it
    for tokens in ([1, 2], [3]):
        shelf.read_and_check({one: [n + token for token in tokens] for n, one in enumerate(grown)})
    assert len(grown) == 3


@pytest.mark.parametrize("kind", ["links", "copies"])
def test_a_place_that_was_opened_from_an_unread_one_holds_its_tokens(whole: Any, kind: str) -> None:
    """The one between was to be copied when it is first read, and is closed before."""
    shelf = Shelf(whole, kind, slots=200)
    chain = [opened(shelf.open(5))]
    shelf.read_and_check({chain[0]: [3, 4, 5, 6, 7]})
    for level in range(room.MOST_LINKS):
        chain.append(opened(shelf.open(2, chain[-1], len(chain[-1].tokens))))
        shelf.read_and_check({chain[-1]: [20 + level, 21]})
    between = opened(shelf.open(4, chain[-1], len(chain[-1].tokens)))
    assert not between.place.links, "this one is copied"
    last = opened(shelf.open(4, between, len(between.tokens)))
    shelf.memory.close(between.place)
    for one in chain:
        shelf.memory.close(one.place)
    other = opened(shelf.open(20))
    shelf.read_and_check({other: list(range(1, 21))})
    shelf.read_and_check({last: [8, 9]})


def test_links_are_shared_and_copies_are_not(whole: Any) -> None:
    for kind, used in [("links", 10 + 3), ("copies", 10 + 10 + 3)]:
        shelf = Shelf(whole, kind, slots=100)
        assert isinstance(shelf.memory, KeyMemory)
        prompt = opened(shelf.open(10))
        shelf.read({prompt: list(range(1, 11))})
        before = shelf.memory.arena.free
        opened(shelf.open(3, prompt, 10))
        assert before - shelf.memory.arena.free == used - 10


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_stays_within_the_slots(whole: Any, kind: str) -> None:
    shelf = Shelf(whole, kind, slots=20)
    first = opened(shelf.open(12))
    assert shelf.open(9) is None
    second = opened(shelf.open(8))
    shelf.read_and_check({second: [4] * 8, first: [3] * 12})
    assert shelf.open(1) is None
    shelf.memory.close(first.place)
    third = opened(shelf.open(4, second, 8 if kind != "links" else 5))
    shelf.read_and_check({third: [1, 2, 3, 4]})
    assert shelf.open(9) is None


@pytest.mark.parametrize("kind", KINDS)
def test_room_that_is_needed_is_counted_as_it_is_taken(whole: Any, kind: str) -> None:
    """For all samples of a prompt at once, and for one of several."""
    for samples, at_once in [(1, 1), (3, 3), (3, 1)]:
        memory = Shelf(whole, kind, slots=0).memory
        needed = memory.needed(7, 4, samples, at_once)
        if samples == at_once:
            assert needed == memory.needed(7, 4, samples)
        for slots, fits in [(needed, True), (needed - 1, False)]:
            shelf = Shelf(whole, kind, slots=slots)
            prompt = shelf.open(11 if samples == 1 else 7)
            rest = 0 if samples == 1 else at_once
            places = [prompt and shelf.memory.open(4, prompt.place, 7) for _ in range(rest)]
            assert all([prompt, *places]) == fits, (samples, at_once)


@pytest.mark.parametrize("kind", KINDS)
def test_a_place_does_not_grow_over_its_neighbour(whole: Any, kind: str) -> None:
    shelf = Shelf(whole, kind, slots=20)
    first, second = opened(shelf.open(3)), opened(shelf.open(3))
    shelf.read({first: [1, 2], second: [3, 4, 5]})
    with pytest.raises(ModelError, match=r"may grow to the 3 positions .* it has 2, and 2 more"):
        shelf.read({second: [], first: [6, 7]})
    shelf.read_and_check({first: [8]})


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_could_not_be_read_is_read_again(whole: Any, kind: str) -> None:
    """Nothing counts as read of a row whose reading fails, however far it came."""
    shelf = Shelf(whole, kind, slots=60)
    prompt = opened(shelf.open(4))
    shelf.read({prompt: [1, 2, 3, 4]})
    one, two = (opened(shelf.open(3, prompt, 4)) for _ in range(2))
    read, calls = shelf.model.backbone.read, 0

    def failing(rows: Any, cache: Any = None) -> Tensor:
        nonlocal calls
        calls += 1
        found: Tensor = read(rows, cache)
        if calls == (2 if kind == "rows" else 1):
            raise MemoryError("no room on the device")
        return found

    shelf.model.backbone.read = failing
    with pytest.raises(MemoryError):
        shelf.read({one: [5, 6], two: [7]})
    shelf.model.backbone.read = read
    for added in ({one: [5, 6]}, {two: [7]}, {two: [8], one: [9]}):
        shelf.read_and_check(added)


def test_a_cache_that_cannot_grow_stays_usable(whole: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf(whole, "links", slots=5000)
    assert isinstance(shelf.memory, KeyMemory)
    first = opened(shelf.open(1000))
    shelf.read({first: list(range(1, 31)) * 10})
    layer = shelf.memory.cache.layers[1]
    with monkeypatch.context() as patch:
        patch.setattr(layer, "grow", lambda size: (_ for _ in ()).throw(MemoryError(size)))
        with pytest.raises(MemoryError):
            shelf.open(1500)
    small, large = opened(shelf.open(20)), opened(shelf.open(1025))
    shelf.read_and_check({small: [3, 4], large: list(range(1, 42)) * 25, first: [5]})


def test_buffers_grow_as_slots_are_needed(whole: Any) -> None:
    shelf = Shelf(whole, "links", slots=10_000)
    assert isinstance(shelf.memory, KeyMemory)
    sizes = []
    kept: list[Sequence] = []
    for count in (500, 500, 500, 3000, 5400, 101):
        one = shelf.open(count)
        if one is not None:
            kept.append(one)
        sizes.append(shelf.memory.arena.size)
        assert shelf.memory.cache.size == sizes[-1]
        shelf.read_and_check({sequence: [7, 8] for sequence in kept})
    assert sizes == [1024, 1024, 2048, 8192, 10_000, 10_000] and len(kept) == 5

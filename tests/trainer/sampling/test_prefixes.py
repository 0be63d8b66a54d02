"""Which positions of two prompts are the same, where they may be parted, and who is remembered."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from plait.stream import Document, Encoded, ItemInputs
from plait.trainer.sampling.memory import Place
from plait.trainer.sampling.prefixes import (
    Prefixes,
    cuts,
    last_cut,
    next_cut,
    position_keys,
)


def text(seed: int, length: int) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(1, 48, length).tolist()
    return ids


Loaded = tuple[Document, list[ItemInputs]]


def keys_of(loaded: Loaded) -> list[int]:
    keys: list[int] = position_keys(*loaded).tolist()
    return keys


def common(one: Loaded, other: Loaded) -> int:
    """How many first keys are equal."""
    pairs = zip(keys_of(one), keys_of(other), strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), len(keys_of(one)))


def test_keys_are_tokens_and_parts_of_items(whole: Any) -> None:
    def loaded(*parts: Any) -> Loaded:
        prompt = whole.prompt(*parts)
        return prompt, whole.inputs(prompt)

    keys = keys_of(loaded(text(1, 4), 2, text(2, 3), 4))
    assert keys[:4] == text(1, 4) and keys[10:13] == text(2, 3)
    assert max(keys[4:10]) < 0 and len(set(keys[4:10])) == 6
    assert not set(keys[4:10]) & set(keys[13:])
    again = loaded(text(1, 4), 2, text(2, 3), 4)
    assert keys_of(again) == keys, "of other objects with the same content"
    assert keys_of(loaded(2))[:6] == keys[4:10], "wherever it stands"


def test_items_that_are_read_otherwise_are_others(whole: Any) -> None:
    """Other content, which is what a view or a stretch of the same file is, or another plan."""
    prompt = whole.prompt(text(1, 4), 2, text(2, 3))
    (loaded,), item = whole.inputs(prompt), prompt.items[0]
    features = loaded.features.embeddings

    def planned(**facts: Any) -> Document:
        return replace(prompt, items=(replace(item, plan=replace(item.plan, **facts)),))

    def content(*layers: torch.Tensor, **tensors: torch.Tensor) -> list[ItemInputs]:
        made = Encoded(layers[0], layers[1:]) if layers else None
        return [ItemInputs(tensors or None, made)]

    others: list[Loaded] = [
        (prompt, [loaded]),
        *((planned(**facts), [loaded]) for facts in (
            {"encoder": "other"}, {"grid": (1, 3, 2)}, {"bidirectional": False},
        )),
        (prompt, content(features + 1)),
        (prompt, content(features, features)),
        (prompt, content(features.T)),
        (prompt, content(features.view(torch.int64))),
        (prompt, content(pixels=features)),
        (prompt, content(waves=features)),
        (prompt, content(waves=features.bfloat16())),
    ]  # fmt: skip
    for number, other in enumerate(others):
        assert all(common(other, rest) == 4 for rest in others[number + 1 :])


def test_media_are_hashed_once(whole: Any) -> None:
    """Many requests ask with the same loaded media."""
    (loaded,) = whole.inputs(whole.prompt(2))
    first = loaded.digest()
    loaded.features.embeddings.add_(1)  # never done; it shows that nobody looks again
    assert loaded.digest() == first


def test_cuts_never_part_positions_that_see_one_another(whole: Any) -> None:
    generator = np.random.default_rng(0)
    for _ in range(30):
        parts = [int(generator.integers(2, 9)) if generator.random() < 0.5
                 else text(int(generator.integers(99)), int(generator.integers(1, 7)))
                 for _ in range(5)]  # fmt: skip
        document = whole.prompt(*parts)
        hi = document.visible()[1]
        allowed = [n for n in range(document.length + 1)
                   if not any(s.group is not None and s.start < n < s.stop
                              for s in document.spans)]  # fmt: skip
        assert [n for n in range(1, document.length + 1) if cuts(hi)[n - 1]] == allowed[1:]
        for length in range(document.length + 1):
            assert last_cut(hi, length) == max(n for n in allowed if n <= length)
            for start in allowed[:-1]:
                beyond = [n for n in allowed if n > start]
                within = [n for n in beyond if n <= start + length]
                expected = max(within) if within else beyond[0]
                assert next_cut(hi, start, length) == expected


class Keeper:
    """A memory of which only closing is used."""

    def __init__(self) -> None:
        self.closed: list[Place] = []

    def close(self, place: Place) -> None:
        place.users -= 1
        self.closed.append(place)


class Weights:
    """Stands for a model."""


def kept_places(count: int) -> tuple[Any, Prefixes, list[Place], Weights]:
    """Places of nobody but the prefixes, in the order in which they came."""
    keeper, weights = Keeper(), Weights()
    prefixes = Prefixes(keeper)  # type: ignore[arg-type]
    places = [Place(0, 1) for _ in range(count)]
    for number, place in enumerate(places):
        prefixes.keep(weights, np.array([number, 1, 2, 3]), place)
        place.users -= 1
    return keeper, prefixes, places, weights


def test_the_longest_known_beginning_is_found() -> None:
    prefixes, weights = Prefixes(Keeper()), Weights()  # type: ignore[arg-type]
    known = [prefixes.keep(weights, np.array(keys), Place(0, 9))
             for keys in ([1, 2], [1, 2, 3, 9], [1, 2, 3, 4, 5], [7])]  # fmt: skip
    for keys, expected in [
        ([1, 2, 3, 4, 8], (known[2], 4)),
        ([1, 2, 3], (known[1], 3)),
        ([1, 2, 3, 4, 5, 6], (known[2], 5)),
        ([7, 7], (known[3], 1)),
        ([8], (None, 0)),
        ([], (None, 0)),
    ]:
        assert prefixes.find(weights, np.array(keys, dtype=np.int64)) == expected
    assert prefixes.find(Weights(), np.array([1, 2])) == (None, 0)


def test_what_was_not_used_for_the_longest_time_is_dropped_first() -> None:
    keeper, prefixes, places, weights = kept_places(4)
    prefixes.find(weights, np.array([0, 1]))
    places[2].users += 1
    assert [prefixes.drop() for _ in range(4)] == [True, True, True, False]
    assert keeper.closed == [places[1], places[3], places[0]]
    places[2].users -= 1
    assert prefixes.drop() and not prefixes.drop()


def test_places_are_forgotten_by_their_weights_or_one_by_one() -> None:
    keeper, prefixes, places, weights = kept_places(3)
    other = Weights()
    prefixes.keep(other, np.array([0, 1]), Place(0, 1))
    prefixes.remove(places[1])
    assert keeper.closed == [places[1]]
    prefixes.forget(weights)
    assert keeper.closed == [places[1], places[0], places[2]]
    assert prefixes.find(other, np.array([0, 1]))[1] == 2


def test_weights_that_are_gone_are_not_taken_for_others() -> None:
    """A new model may get the `id` of one that was deleted."""
    prefixes = Prefixes(Keeper())  # type: ignore[arg-type]
    for _ in range(20):
        gone: Any = Weights()
        assert prefixes.find(gone, np.array([1, 2])) == (None, 0)
        prefixes.keep(gone, np.array([1, 2]), Place(0, 1))
        del gone

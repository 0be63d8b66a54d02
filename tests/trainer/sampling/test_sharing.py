"""What prompts have in common is read once, and by nobody else than who may.

The models are of whole numbers (`conftest.py`): tokens are exact, and positions can be counted.
"""

from typing import Any

import numpy as np
import pytest

from plait.trainer.sampling import memory
from plait.trainer.sampling.prefixes import SHORTEST
from plait.trainer.sampling.sampler import Sampler

LONG = 2 * SHORTEST


def text(seed: int, length: int) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(1, 48, length).tolist()
    return ids


START, PICTURE = text(1, LONG), [text(2, SHORTEST), 2]
BEGINNINGS: dict[str, tuple[list[Any], list[Any], int, int]] = {
    "the same text": ([START], [START], 1, 1),
    "a longer text": ([START], [START, [3, 4, 5]], 3, 1),
    "a shorter text": ([START, [3, 4, 5]], [START], 1, 1),
    "another end": ([START, [3, 4]], [START, [5, 6, 7]], 3, 1),
    "a picture": ([*PICTURE, [3]], [*PICTURE, [4, 5]], 2, 1),
    "a picture at the end": (PICTURE, PICTURE, 6, 6),
    "a causal picture": ([START, 3], [START, 3], 1, 1),
    "a picture first": ([2, START, [1]], [2, START, [2]], 1, 1),
    "other pictures": ([2, START], [4, START], 6 + LONG, 1),
    "other pictures behind a text": ([START, 2, [3]], [START, 4, [3]], 7, 1),
    "too little": ([START], [START[: SHORTEST - 1], [1]], SHORTEST, SHORTEST),
    "just enough": ([START], [START[:SHORTEST], [1]], 1, 1),
    "nothing": ([START], [text(4, LONG)], LONG, 1),
}
"""The parts of two prompts, and how many positions of the second are read: beside the first, and
when it comes again."""


@pytest.mark.parametrize("name", BEGINNINGS)
@pytest.mark.parametrize("chunk", [5, None])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("window", [False, True])
def test_a_known_beginning_is_not_read_again(
    whole: Any, desk: Any, name: str, chunk: int | None, samples: int, window: bool
) -> None:
    one, other, beside, again = BEGINNINGS[name]
    model = whole.model(window=window)
    first, second = (
        whole.request(model, whole.prompt(*parts), samples, max_tokens=3) for parts in (one, other)
    )
    at = desk(Sampler(model.backbone, chunk=chunk))
    outcomes = at.answer(first, second)
    expected = first.prompt.length + beside + 4 * samples
    assert at.positions == expected
    outcomes += at.answer(second)
    assert at.positions == expected + again + 2 * samples
    for outcome, request in zip(outcomes, [first, second, second], strict=True):
        assert outcome.tokens == whole.expected(request)


def test_samplers_that_do_not_share_read_everything(whole: Any, desk: Any) -> None:
    model = whole.model()
    request = whole.request(model, whole.prompt(START), max_tokens=1)
    at = desk(Sampler(model.backbone, share=False))
    at.answer(request, request)
    at.answer(request)
    assert at.positions == 3 * LONG


def test_other_weights_read_for_themselves(whole: Any, desk: Any) -> None:
    """Adapters on one language model, and runs of the same one with encoders of their own."""
    base = whole.model()
    models = [base, whole.beside(base, "a"), whole.beside(base, "b"), whole.beside(base, "a")]
    requests = [whole.request(model, whole.prompt(START, 2), max_tokens=3) for model in models]
    at = desk(Sampler(base.backbone, chunk=20))
    outcomes = at.answer(*requests)
    assert at.positions == 4 * (LONG + 6 + 2)
    made = [outcome.tokens for outcome in outcomes]
    assert made == [whole.expected(request) for request in requests]
    assert made[1] == made[3] and len({str(tokens) for tokens in made}) == 3


@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("samples", [1, 2])
def test_beginnings_of_beginnings_are_shared_and_the_deepest_copied(
    whole: Any, desk: Any, poisoned: Any, window: bool, samples: int
) -> None:
    model = whole.model(window=window)
    at = desk(poisoned(Sampler(model.backbone, chunk=7)))
    ids = text(5, LONG)
    links = []
    for level in range(memory.MOST_LINKS + 3):
        request = whole.request(model, whole.prompt(ids), samples, max_tokens=4, seed=level)
        before = at.positions
        outcome = at.ask(request)
        at.step()
        links.append(len(outcome.job.prompt.place.links))
        at.finish()
        assert outcome.tokens == whole.expected(request)
        assert at.positions - before == (LONG if level == 0 else 20) + 3 * samples
        ids = ids + text(6 + level, 20)
    assert links == (5 * [0] if window else [0, 1, 2, 0, 1])


def test_who_comes_while_a_prompt_is_read_waits_for_it(whole: Any, desk: Any) -> None:
    """And only until what both have in common is read."""
    model = whole.model()
    at = desk(Sampler(model.backbone, chunk=10))
    first = whole.request(model, whole.prompt(text(1, 100)), max_tokens=2)
    second = whole.request(model, whole.prompt(text(1, 100)[:30], [1, 2]), max_tokens=2)
    other = whole.request(model, whole.prompt(text(9, 5)), max_tokens=2)
    outcomes = [at.ask(first)]
    at.step()
    outcomes += [at.ask(second), at.ask(other)]
    begun = []
    for _ in range(5):
        at.step()
        begun.append(outcomes[1].job.prompt.place is not None)
    assert begun == [False, False, True, True, True]
    at.finish()
    assert at.positions == 100 + 2 + 5 + 3
    assert [outcome.tokens for outcome in outcomes] == [
        whole.expected(request) for request in (first, second, other)
    ]


def test_repeating_a_prompt_remembers_it_once(whole: Any, desk: Any) -> None:
    """Else each step that looks for beginnings would cost what is done already."""
    model = whole.model()
    at = desk(Sampler(model.backbone))
    for seed in range(30):
        at.answer(whole.request(model, whole.prompt(START), max_tokens=5, seed=seed))
    assert len(at.sampler.rooms.prefixes._known) == 1
    assert at.sampler.memory.arena.size - at.sampler.memory.arena.free == LONG


@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("tokens", [1, 30])
def test_what_a_sample_grew_into_is_free_when_it_ends(
    whole: Any, desk: Any, poisoned: Any, emptied: Any, window: bool, tokens: int
) -> None:
    """Its prompt is kept, for those that begin with it before and after: nothing else is."""
    model = whole.model(window=window)
    at = desk(poisoned(Sampler(model.backbone, chunk=20)))
    first = at.ask(whole.request(model, whole.prompt(START), max_tokens=tokens))
    longer = whole.request(model, whole.prompt(START, text(3, 4)), max_tokens=60)
    at.step(3)
    second = at.ask(longer)
    while not first.over:
        at.step()
    arena = at.sampler.memory.arena
    own = longer.prompt.length - LONG * (not window) + 59
    assert not second.over and arena.size - arena.free in (LONG, LONG + own)
    at.finish()
    (third,) = at.answer(longer)
    assert arena.size - arena.free == longer.prompt.length + LONG * window
    assert second.tokens == third.tokens == whole.expected(longer)
    assert first.tokens == whole.expected(
        whole.request(model, whole.prompt(START), max_tokens=tokens)
    )
    assert emptied(at.sampler)


def test_a_cancelled_prompt_keeps_only_what_others_begin_with(
    whole: Any, desk: Any, poisoned: Any, emptied: Any
) -> None:
    model = whole.model()
    at = desk(poisoned(Sampler(model.backbone, chunk=10)))
    first = at.ask(whole.request(model, whole.prompt(text(1, 100)), max_tokens=50))
    at.step(4)
    request = whole.request(model, whole.prompt(text(1, 30), [1, 2]), max_tokens=50)
    second = at.ask(request)
    at.step()
    at.sampler.cancel(first.job)
    at.step()
    arena = at.sampler.memory.arena
    assert arena.size - arena.free == 50 + 2 + 49
    at.finish()
    assert second.tokens == whole.expected(request) and emptied(at.sampler)


def test_forgotten_weights_are_read_again(whole: Any, desk: Any, emptied: Any) -> None:
    model, other = whole.model(), None
    other = whole.beside(model, "other")
    at = desk(Sampler(model.backbone))
    for one in (model, other):
        at.answer(whole.request(one, whole.prompt(START), max_tokens=1))
    assert at.positions == 2 * LONG
    at.sampler.forget(model)
    at.answer(whole.request(other, whole.prompt(START), max_tokens=1))
    assert at.positions == 2 * LONG + 1
    at.answer(whole.request(model, whole.prompt(START), max_tokens=1))
    assert at.positions == 3 * LONG + 1
    for one in (model, other):
        at.sampler.forget(one)
    free = at.sampler.memory.arena
    assert free.free == free.size and emptied(at.sampler)


def test_forgetting_leaves_running_requests_alone(
    whole: Any, desk: Any, poisoned: Any, emptied: Any
) -> None:
    model = whole.model()
    at = desk(poisoned(Sampler(model.backbone, chunk=20, slots=300)))
    requests = [whole.request(model, whole.prompt(START, [n]), 2, max_tokens=9, seed=n)
                for n in range(3)]  # fmt: skip
    outcomes = [at.ask(request) for request in requests]
    for _ in range(4):
        at.step()
        at.sampler.forget(model)
    at.finish()
    for outcome, request in zip(outcomes, requests, strict=True):
        assert outcome.tokens == whole.expected(request)
    at.sampler.forget(model)
    assert emptied(at.sampler)


@pytest.mark.parametrize("samples", [1, 3])
def test_what_is_in_use_is_never_dropped(
    whole: Any, desk: Any, poisoned: Any, emptied: Any, samples: int
) -> None:
    """Sharing places of others in a cache so small that everything idle is dropped again."""
    model = whole.model()
    at = desk(poisoned(Sampler(model.backbone, chunk=8, slots=110)))
    requests = [
        whole.request(model, whole.prompt(text(n // 2 % 3, LONG), text(n, 4)), samples, seed=n)
        for n in range(20)
    ]
    outcomes = at.answer(*requests)
    for outcome, request in zip(outcomes, requests, strict=True):
        assert outcome.tokens == whole.expected(request)
    assert at.positions < sum(request.prompt.length + 5 * samples for request in requests)
    assert emptied(at.sampler)


@pytest.mark.parametrize("samples", [1, 2])
def test_what_fits_alone_is_not_refused_for_what_it_could_share(
    whole: Any, desk: Any, emptied: Any, samples: int
) -> None:
    """What is known, and what begins with it, do not both fit."""
    model = whole.model()
    at = desk(Sampler(model.backbone, slots=100))
    first = whole.request(model, whole.prompt(text(1, 40)), max_tokens=41)
    second = whole.request(model, whole.prompt(text(1, 40)), samples, max_tokens=61)
    outcomes = at.answer(first, second)
    assert [outcome.tokens for outcome in outcomes] == [whole.expected(r) for r in (first, second)]
    assert emptied(at.sampler)


def test_what_fits_alone_is_not_refused_for_the_hole_it_found(
    whole: Any, desk: Any, emptied: Any
) -> None:
    """Between the two places that its prompt begins with is room for it, but then for no sample."""
    model = whole.model()
    gone = whole.beside(model, "gone")
    at = desk(Sampler(model.backbone, slots=100))
    ids = text(1, 50)
    for one, tokens in ((model, ids[:20]), (gone, text(2, 50)), (model, ids)):
        at.answer(whole.request(one, whole.prompt(tokens), max_tokens=1))
    at.sampler.forget(gone)
    request = whole.request(model, whole.prompt(ids[:30]), 2, max_tokens=61)
    (outcome,) = at.answer(request)
    assert outcome.tokens == whole.expected(request)
    assert emptied(at.sampler)

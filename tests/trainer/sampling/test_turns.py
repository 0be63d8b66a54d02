"""Requests come, wait, go and fail; each gets its turn, and the others' tokens stay the same.

The models are of whole numbers (`conftest.py`), so that equal means equal.
"""

from collections import Counter
from concurrent.futures import CancelledError
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from plait.errors import DataError
from plait.trainer.sampling import choosing
from plait.trainer.sampling import sampler as sampling
from plait.trainer.sampling.requests import Request
from plait.trainer.sampling.sampler import Sampler


def text(seed: int, length: int) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(1, 48, length).tolist()
    return ids


class Crowd:
    """One model, and requests of any owner for it."""

    def __init__(self, whole: Any, desk: Any, **options: Any) -> None:
        kind = {name: options.pop(name) for name in ("packs", "window") if name in options}
        self.whole, self.model = whole, whole.model(**kind)
        self.at = desk(Sampler(self.model.backbone, **options))

    def request(self, seed: int, length: int, samples: int = 1, **options: Any) -> Request:
        request: Request = self.whole.request(
            self.model, self.whole.prompt(text(seed, length)), samples, seed=seed, **options
        )
        return request

    def ask(self, *numbers: int, **options: Any) -> Any:
        return self.at.ask(self.request(*numbers, **options))


# Fairness.


@pytest.mark.parametrize("slots", [30, 65, 100])
def test_a_queue_delays_another_owner_by_one_turn(whole: Any, desk: Any, slots: int) -> None:
    """There is room for one, two or three requests at a time."""
    crowd = Crowd(whole, desk, slots=slots, share=False)
    queue = [crowd.ask(seed, 20, owner="many", max_tokens=11) for seed in range(50)]
    crowd.at.step(3)
    running = slots // 30
    single = crowd.ask(99, 20, owner="one", max_tokens=11)
    crowd.at.finish()
    assert single.order <= 2 * running
    assert sorted(outcome.order for outcome in queue) == [n for n in range(51) if n != single.order]


def test_owners_take_turns(whole: Any, desk: Any) -> None:
    crowd = Crowd(whole, desk, slots=20, share=False)
    outcomes: dict[tuple[str, int], Any] = {}
    for owner, count in [("a", 4), ("b", 1), ("c", 3)]:
        for number in range(count):
            outcomes[owner, number] = crowd.ask(number, 18, owner=owner, max_tokens=2)
    crowd.at.finish()
    order = sorted(outcomes, key=lambda key: outcomes[key].order)
    names = "".join(owner for owner, _ in order)
    assert names == "abcacaca"
    for owner in "abc":
        assert [n for o, n in order if o == owner] == sorted(n for o, n in order if o == owner)


def test_long_prompts_do_not_hold_up_another_owners_short_one(whole: Any, desk: Any) -> None:
    """All have room; what is scarce is the row. The others go on growing meanwhile."""
    crowd = Crowd(whole, desk, chunk=10, share=False)
    growing = crowd.ask(7, 5, owner="early", max_tokens=30)
    crowd.at.step(2)
    for seed in range(20):
        crowd.ask(seed, 45, owner="many")
    crowd.at.step()
    single = crowd.ask(99, 18, owner="one", max_tokens=1)
    before, tokens = crowd.at.steps, len(growing.job.running[0].made.tokens)
    while not single.over:
        crowd.at.step()
    steps = crowd.at.steps - before
    assert steps <= 4, "a row for another after each of its own"
    assert len(growing.job.running[0].made.tokens) == tokens + steps


def test_a_request_of_many_samples_makes_room_for_another_owner(whole: Any, desk: Any) -> None:
    """What comes free goes to who waits for it; one sample at a time goes on."""
    crowd = Crowd(whole, desk, slots=100)
    many = crowd.ask(1, 20, 60, owner="many", max_tokens=11)
    crowd.at.step(4)
    assert len(many.job.running) == 8
    single = crowd.ask(2, 20, owner="one", max_tokens=11)
    crowd.at.finish()
    assert single.order == 0 and many.tokens == whole.expected(
        crowd.request(1, 20, 60, max_tokens=11)
    )


def test_one_owner_alone_uses_all_room(whole: Any, desk: Any) -> None:
    """Its other requests wait until its samples have begun."""
    crowd = Crowd(whole, desk, slots=100)
    first = crowd.ask(1, 20, 8, owner="many", max_tokens=11)
    second = crowd.ask(2, 20, 8, owner="many", max_tokens=11)
    crowd.at.step(3)
    assert len(first.job.running) + len(second.job.running) == 6
    crowd.at.finish()


@pytest.mark.parametrize("samples", [1, 3, 10])
def test_no_more_samples_grow_than_may(
    whole: Any, desk: Any, monkeypatch: pytest.MonkeyPatch, samples: int
) -> None:
    """And whose owner has fewer of them comes first."""
    monkeypatch.setattr(sampling, "MOST_RUNNING", 4)
    crowd = Crowd(whole, desk, share=False)
    requests = [crowd.request(seed, 6, samples, owner="many", max_tokens=8) for seed in range(12)]
    queue = [crowd.at.ask(request) for request in requests]
    most = 0
    single = None
    while crowd.at.sampler.busy:
        crowd.at.step()
        most = max(most, sum(len(job.running) for job in crowd.at.sampler._jobs))
        if single is None and crowd.at.steps == 3:
            single = crowd.ask(99, 6, owner="one", max_tokens=3)
    assert most == 4 and single is not None and single.order <= 4
    for outcome, request in zip(queue, requests, strict=True):
        assert outcome.tokens == whole.expected(request)


def test_whoever_has_fewer_samples_comes_first(
    whole: Any, desk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short samples of one owner take turns in the place that another's long ones leave."""
    monkeypatch.setattr(sampling, "MOST_RUNNING", 4)
    crowd = Crowd(whole, desk, share=False)
    long = [crowd.ask(n, 6, owner="long", max_tokens=10 * n) for n in range(1, 6)]
    short = [crowd.ask(n, 6, owner="short", max_tokens=2) for n in range(5)]
    while not long[-1].job.started:
        crowd.at.step()
    assert all(outcome.over for outcome in short)
    crowd.at.finish()


# Nothing hangs, and nobody's tokens depend on who else is there.


def a_request(crowd: Crowd, generator: np.random.Generator) -> Request:
    """Of any size that fits, often with a beginning that others have too."""
    whole = crowd.whole
    start = text(int(generator.integers(2)), int(generator.choice([0, 17, 30])))
    parts = [start, text(int(generator.integers(1000)), int(generator.integers(1, 9)))]
    if generator.random() < 0.5:
        parts.insert(1, int(generator.integers(2, 5)))
    request: Request = whole.request(
        crowd.model, whole.prompt(*parts),
        samples=int(generator.choice([1, 1, 2, 5])),
        owner=str(generator.choice(["a", "b", "c"])),
        max_tokens=int(generator.integers(1, 15)),
        temperature=float(generator.choice([0, 1])),
        seed=int(generator.integers(5)),
        stop=(3, 4, 5) if generator.random() < 0.5 else (),
    )  # fmt: skip
    return request


@pytest.mark.parametrize("kind", [{}, {"window": True}, {"packs": False}], ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_whatever_comes_ends_with_its_own_tokens(
    whole: Any, desk: Any, poisoned: Any, emptied: Any, kind: dict[str, bool], seed: int
) -> None:
    """Requests at random times, some cancelled, in room so small that most of them wait."""
    generator = np.random.default_rng(seed)
    slots = int(generator.choice([110, 130, 200, 1000]))
    chunk = generator.choice([1, 3, 7, 50, 0])
    crowd = Crowd(whole, desk, slots=slots, chunk=int(chunk) or None, **kind)
    if crowd.model.backbone.packs:
        poisoned(crowd.at.sampler)
    asked: list[tuple[Any, Request]] = []
    cancelled = []
    for _ in range(14):
        for _ in range(int(generator.integers(0, 4))):
            request = a_request(crowd, generator)
            asked.append((crowd.at.ask(request), request))
        if asked and generator.random() < 0.3:
            cancelled.append(asked[int(generator.integers(len(asked)))][0])
            crowd.at.sampler.cancel(cancelled[-1].job)
        for _ in range(int(generator.integers(0, 6))):
            progress(crowd.at)
    while crowd.at.sampler.busy:
        progress(crowd.at)
    for outcome, request in asked:
        if outcome.error is not None:
            assert outcome in cancelled and isinstance(outcome.error, CancelledError)
        else:
            assert outcome.tokens == whole.expected(request)
    assert all(outcome.over for outcome, _ in asked)
    if crowd.model.backbone.packs:
        assert emptied(crowd.at.sampler)
    else:
        assert crowd.at.sampler.memory._held == 0


def progress(at: Any) -> None:
    """A step, which does something while there is something to do."""

    def state() -> tuple[int, int, int]:
        begun = sum(outcome.job.started for outcome in at.outcomes)
        return at.positions, begun, sum(outcome.over for outcome in at.outcomes)

    busy, before = at.sampler.busy, state()
    at.step()
    assert not busy or state() > before


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 7, 9, 12, 16])
def test_a_request_may_be_cancelled_at_any_time(
    whole: Any, desk: Any, poisoned: Any, emptied: Any, samples: int, steps: int
) -> None:
    """While it waits, is read, grows, or is done; others that share its prompt stay as they are."""
    crowd = Crowd(whole, desk, slots=130, chunk=9)
    poisoned(crowd.at.sampler)
    requests = [crowd.request(1, 40, samples, owner=owner, max_tokens=6) for owner in "abc"]
    requests.append(crowd.request(2, 60, samples, owner="d", max_tokens=6))
    for victim in range(4):
        outcomes = [crowd.at.ask(request) for request in requests]
        crowd.at.step(steps)
        over = outcomes[victim].over
        crowd.at.sampler.cancel(outcomes[victim].job)
        crowd.at.step()
        assert outcomes[victim].over, "from the next step on"
        crowd.at.finish()
        for number, (outcome, request) in enumerate(zip(outcomes, requests, strict=True)):
            if number == victim and not over:
                assert isinstance(outcome.error, CancelledError) and outcome.rows is None
            else:
                assert outcome.tokens == whole.expected(request)
        assert emptied(crowd.at.sampler)


# One fails, and the others go on.


def failing_embedding(crowd: Crowd, request: Request) -> None:
    request.model = crowd.whole.beside(crowd.model, "broken")
    request.model.embed = lambda _: 1 / 0


def failing_read(crowd: Crowd, request: Request) -> None:
    """Whatever row the request takes part in cannot be read."""
    request.model = crowd.whole.beside(crowd.model, "broken")
    read = crowd.model.backbone.read

    def refusing(rows: Any, cache: Any = None) -> Any:
        found = read(rows, cache)
        return 1 / 0 if "broken" in rows.adapters else found

    crowd.model.backbone.read = refusing


def failing_growth(crowd: Crowd, request: Request) -> None:
    """Its prompt can be read, and its samples cannot."""
    request.model = crowd.whole.beside(crowd.model, "broken")
    read = crowd.model.backbone.read

    def refusing(rows: Any, cache: Any = None) -> Any:
        bounds = zip(rows.adapters, rows.bounds, strict=True)
        if any(name == "broken" and rows.positions[stop - 1] >= 41 for name, (_, stop) in bounds):
            raise ZeroDivisionError
        return read(rows, cache)

    crowd.model.backbone.read = refusing


def failing_listener(crowd: Crowd, request: Request) -> None:
    """It cannot bear a third token, whichever sample's that is."""
    del crowd
    told: Counter[int] = Counter()

    def listen(sample: int, token: int, logprob: float) -> None:
        del token, logprob
        told[sample] += 1
        if told[sample] == 3:
            raise ZeroDivisionError

    request.on_token = listen


FAILURES = [failing_embedding, failing_read, failing_growth, failing_listener]


@pytest.mark.parametrize("fail", FAILURES)
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("packs", [True, False])
def test_one_that_fails_leaves_the_others_alone(
    whole: Any, desk: Any, poisoned: Any, emptied: Any, fail: Any, samples: int, packs: bool
) -> None:
    crowd = Crowd(whole, desk, chunk=15, packs=packs)
    if packs:
        poisoned(crowd.at.sampler)
    requests = [crowd.request(seed, 40, samples, max_tokens=6) for seed in (1, 1, 2, 1)]
    expected = [whole.expected(request) for request in requests]
    fail(crowd, requests[1])
    outcomes = crowd.at.answer(*requests)
    assert isinstance(outcomes[1].error, ZeroDivisionError) and outcomes[1].rows is None
    for number in (0, 2, 3):
        assert outcomes[number].tokens == expected[number]
    if packs:
        assert emptied(crowd.at.sampler)


def test_a_device_that_was_full_once_costs_nobody_anything(whole: Any, desk: Any) -> None:
    """A row too large for it is read in parts, each request's by itself."""
    crowd = Crowd(whole, desk, chunk=15)
    read = crowd.model.backbone.read

    def small(rows: Any, cache: Any = None) -> Any:
        if len(rows.bounds) > 3:
            raise MemoryError(f"{len(rows.bounds)} pieces do not fit")
        return read(rows, cache)

    requests = [crowd.request(seed, 20, 3, max_tokens=6) for seed in range(4)]
    expected = [whole.expected(request) for request in requests]
    crowd.model.backbone.read = small
    outcomes = crowd.at.answer(*requests)
    assert [outcome.tokens for outcome in outcomes] == expected


@pytest.mark.parametrize("samples", [1, 2])
def test_a_cache_that_cannot_grow_refuses_only_who_needs_it(
    whole: Any, desk: Any, emptied: Any, monkeypatch: pytest.MonkeyPatch, samples: int
) -> None:
    """The prompt alone would have found room, its first sample does not."""
    crowd = Crowd(whole, desk, slots=8000)
    before = crowd.ask(1, 20)
    crowd.at.step()
    cache = crowd.at.sampler.memory.cache
    with monkeypatch.context() as patch:
        patch.setattr(cache, "grow", lambda size: 1 / (size - size))
        large = crowd.ask(2, 900, samples, max_tokens=400)
        crowd.at.step()
    assert isinstance(large.error, ZeroDivisionError)
    after = crowd.ask(2, 900, samples, max_tokens=400)
    crowd.at.finish()
    assert before.tokens == whole.expected(crowd.request(1, 20))
    assert len(after.tokens) == samples
    assert emptied(crowd.at.sampler)


def test_a_prompt_that_is_read_keeps_nothing_but_its_end(whole: Any, desk: Any) -> None:
    crowd = Crowd(whole, desk, chunk=50)
    outcome = crowd.ask(1, 200, 2, max_tokens=9)
    crowd.at.step(5)
    prompt = outcome.job.prompt
    assert outcome.job.running and prompt.end is not None
    assert prompt.end.untyped_storage().nbytes() == prompt.end.nbytes
    assert prompt.embeddings is None and prompt.deeper is None


def test_a_prompt_that_waits_is_not_embedded(whole: Any, desk: Any) -> None:
    """Embeddings are as many as there is room for keys, however many requests wait."""
    crowd = Crowd(whole, desk, slots=100, share=False)
    outcomes = [crowd.ask(seed, 60, owner="one", max_tokens=9) for seed in range(5)]
    crowd.at.step(2)
    waiting = [outcome.job.prompt for outcome in outcomes if not outcome.job.running]
    assert len(waiting) == 4
    assert all(prompt is None or prompt.embeddings is None for prompt in waiting)


def test_a_choice_that_fails_is_its_own_request_s(
    whole: Any, desk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a device cannot do with one row, the others are chosen, and as they would be."""
    crowd = Crowd(whole, desk, chunk=15)
    requests = [crowd.request(seed, 20, max_tokens=6) for seed in range(4)]
    expected = [whole.expected(request) for request in requests]

    tokens = [0]

    def choose(logits: Any, settings: Any, draws: Any, banned: Any) -> Any:
        chosen = choosing.choose(logits, settings, draws, banned)  # draws, and fails then
        tokens[0] += requests[2].settings in settings
        if requests[2].settings in settings and tokens[0] > 1:  # not as it begins, alone
            raise OverflowError("too large")
        return chosen

    requests[2].settings = replace(requests[2].settings, min_p=0.5)
    monkeypatch.setattr(sampling, "choose", choose)
    outcomes = crowd.at.answer(*requests)
    assert isinstance(outcomes[2].error, OverflowError)
    assert tokens[0] > 2, "it was among others"
    for number in (0, 1, 3):
        assert outcomes[number].tokens == expected[number]


def test_memory_that_ends_as_samples_begin_is_waited_for(whole: Any, desk: Any) -> None:
    crowd = Crowd(whole, desk, chunk=15)
    requests = [crowd.request(seed, 20, 3, max_tokens=6) for seed in range(2)]
    expected = [whole.expected(request) for request in requests]
    rooms, calls = crowd.at.sampler.rooms, [0]
    of_sample = rooms.of_sample

    def short(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] in (2, 4):
            raise MemoryError("no more")
        return of_sample(*args)

    rooms.of_sample = short  # type: ignore[method-assign]
    outcomes = crowd.at.answer(*requests)
    assert [outcome.tokens for outcome in outcomes] == expected


def test_scores_that_fail_are_their_own_requests(
    whole: Any, desk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    crowd = Crowd(whole, desk, chunk=15)
    monkeypatch.setattr(sampling, "score_prompt", lambda *_: 1 / 0)
    requests = [crowd.request(1, 20, prompt_logprobs=number == 1) for number in range(3)]
    outcomes = crowd.at.answer(*requests)
    assert isinstance(outcomes[1].error, ZeroDivisionError)
    assert outcomes[0].tokens == outcomes[2].tokens == whole.expected(requests[0])


@pytest.mark.parametrize("kind", [{}, {"window": True}, {"packs": False}], ids=str)
@pytest.mark.parametrize("samples", [1, 4])
def test_what_fits_exactly_is_sampled_and_one_more_is_refused(
    whole: Any, desk: Any, kind: dict[str, bool], samples: int
) -> None:
    """The last token is never read, and of several samples one runs at a time where need be."""
    again = 12 if samples > 1 and kind else 0  # of a prompt that is copied
    crowd = Crowd(whole, desk, slots=12 + again + 5, **kind)
    outcome = crowd.ask(1, 12, samples, max_tokens=6)
    with pytest.raises(DataError, match=f"holds {17 + again} positions; 12 tokens and 7 new ones"):
        crowd.ask(1, 12, samples, max_tokens=7)
    crowd.at.finish()
    assert outcome.tokens == whole.expected(crowd.request(1, 12, samples))

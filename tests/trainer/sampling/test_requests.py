"""What a request's listener is told, what may be asked for, and what is refused."""

from concurrent.futures import CancelledError
from typing import Any

import numpy as np
import pytest

from plait.errors import ConfigError, DataError
from plait.trainer.sampling import sampler as sampling
from plait.trainer.sampling.sampler import Sampler


def text(length: int) -> list[int]:
    ids: list[int] = np.random.default_rng(length).integers(1, 48, length).tolist()
    return ids


@pytest.mark.parametrize("samples", [1, 3])
def test_tokens_are_told_in_order_before_the_end(whole: Any, desk: Any, samples: int) -> None:
    model = whole.model()
    at = desk(Sampler(model.backbone, chunk=4))
    told: list[tuple[int, int, float]] = []
    request = whole.request(
        model, whole.prompt(text(9)), samples, max_tokens=7, stop=(5,),
        on_token=lambda *one: told.append(one),
    )  # fmt: skip
    outcome = at.ask(request)
    while not outcome.over:
        counts = [len(sample.made.tokens) for sample in outcome.job.running]
        assert len(told) == sum(counts) + sum(
            len(made.tokens) for made in outcome.job.finished.values()
        )
        at.step()
    for number, row in enumerate(outcome.rows):
        assert [one[1:] for one in told if one[0] == number] == list(
            zip(row.tokens, row.logprobs, strict=True)
        )
    at.step()
    assert len(told) == sum(len(row.tokens) for row in outcome.rows)


def test_a_listener_may_ask_and_cancel(whole: Any, desk: Any, emptied: Any) -> None:
    model = whole.model()
    at = desk(Sampler(model.backbone))
    asked = whole.request(model, whole.prompt(text(8)))
    later: list[Any] = []

    def listen(sample: int, token: int, logprob: float) -> None:
        del sample, token, logprob
        if not later:
            later.append(at.ask(asked))
        else:
            at.sampler.cancel(first.job)

    first = at.ask(whole.request(model, whole.prompt(text(9)), 2, on_token=listen))
    at.finish()
    assert isinstance(first.error, CancelledError)
    assert later[0].tokens == whole.expected(asked)
    at.sampler.cancel(first.job)
    at.step()
    assert emptied(at.sampler)


def test_the_context_bounds_a_request(whole: Any, desk: Any, monkeypatch: Any) -> None:
    model = whole.model(context=20)
    at = desk(Sampler(model.backbone))
    prompt = whole.prompt(text(12))
    outcomes = at.answer(*(whole.request(model, prompt, max_tokens=n) for n in (8, None)))
    assert [len(outcome.tokens[0]) for outcome in outcomes] == [8, 8]
    with pytest.raises(DataError, match="context of 20 tokens; this asks for 12 and 9 new ones"):
        at.ask(whole.request(model, prompt, max_tokens=9))
    with pytest.raises(DataError, match="this asks for 20: shorten it"):
        at.ask(whole.request(model, whole.prompt(text(20)), max_tokens=None))
    monkeypatch.setattr(sampling, "MOST_TOKENS", 3)
    model.backbone.context = None
    for context in (None, 20):
        model.backbone.context = context
        (outcome,) = at.answer(whole.request(model, prompt, max_tokens=None))
        assert len(outcome.tokens[0]) == 3


def test_requests_that_cannot_be_are_refused(whole: Any, desk: Any) -> None:
    model = whole.model()
    at = desk(Sampler(model.backbone))
    prompt = whole.prompt(text(5))
    with pytest.raises(ConfigError, match=r"^samples must be a whole number .* it is 0"):
        at.ask(whole.request(model, prompt, 0))
    with pytest.raises(DataError, match="a prompt must hold a position"):
        at.ask(whole.request(model, whole.prompt([])))
    for count in (-1, 49):
        with pytest.raises(ConfigError, match=f"^top_prompt_logprobs .* it is {count}"):
            at.ask(whole.request(model, prompt, top_prompt_logprobs=count))
    assert not at.sampler.busy

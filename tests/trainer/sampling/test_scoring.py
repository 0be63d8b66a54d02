"""A prompt's own logprobs are the model's, however the prompt is read."""

from typing import Any

import pytest
import torch

from plait.stream import Document, pack
from plait.trainer.build import Built
from plait.trainer.sampling.requests import Request
from plait.trainer.sampling.sampler import Sampler
from plait.trainer.sampling.settings import SamplerSettings

ONE = SamplerSettings(max_tokens=2, stop=(), temperature=0)
COMMON = "the shape of a big yellow cross . "
PROMPTS: list[tuple[str | int, ...]] = [
    (COMMON, 1, " what is it"),
    (COMMON, 1, 2, "and", 3),
    (2, " a disc"),
    ("a red disc",),
]
"""Texts, and pictures by their seeds: in the middle, beside one another, first, none."""


@pytest.fixture(scope="module", params=[True, False], ids=["packs", "rows"])
def built(lab: Any, request: pytest.FixtureRequest) -> Built:
    made: Built = lab.build(bidirectional=True, lora=None, train=("projector",))
    with torch.no_grad():
        made.model.output_weight.mul_(8)
    made.model.backbone.packs = request.param
    return made


def raw(built: Built, prompt: Document, inputs: Any) -> torch.Tensor:
    """(T, V) logprobs of what follows each position, of a plain forward."""
    with torch.no_grad():
        logits = built.model.logits(built.model.hidden(pack([prompt], [inputs]))[0])
    return logits.double().log_softmax(-1)


def asked(built: Built, prompt: Document, inputs: Any, **options: Any) -> Request:
    return Request(built.model, built.tokenizer, built.layout, prompt, inputs, ONE, **options)


@pytest.mark.parametrize("chunk", [1, 3, 7, None])
@pytest.mark.parametrize("top", [0, 4])
def test_scores_are_those_of_a_plain_forward(
    lab: Any, desk: Any, built: Built, chunk: int | None, top: int
) -> None:
    """None where nothing predicts a token: at the first position, and where media stand."""
    samples = [lab.sample("", *parts) for parts in PROMPTS]
    prompts, inputs = lab.documents(built, samples, for_generation=True)
    at = desk(Sampler(built.model.backbone, chunk=chunk))
    outcomes = at.answer(*(
        asked(built, *both, samples=samples, prompt_logprobs=True, top_prompt_logprobs=top)
        for both in zip(prompts, inputs, strict=True) for samples in (0, 1, 2)
    ))  # fmt: skip
    for number, outcome in enumerate(outcomes):
        prompt = prompts[number // 3]
        assert len(outcome.tokens) == number % 3
        expected = raw(built, prompt, inputs[number // 3])
        media = {p for s in prompt.spans for p in range(s.start, s.stop)}
        assert len(outcome.scores.logprobs) == len(outcome.scores.top) == prompt.length
        for place in range(prompt.length):
            value, likely = outcome.scores.logprobs[place], outcome.scores.top[place]
            if place == 0 or place in media:
                assert value is None and likely is None
                continue
            row = expected[place - 1]
            assert value == pytest.approx(float(row[prompt.token_ids[place]]), abs=1e-4)
            if top == 0:
                assert likely is None
                continue
            values, ids = zip(*((score, token) for token, score in likely), strict=True)
            assert values == pytest.approx(row.topk(top).values.tolist(), abs=1e-4)
            assert values == pytest.approx(row[list(ids)].tolist(), abs=1e-4)
            assert len(set(ids)) == top


def test_scores_come_also_where_the_prompt_is_known(lab: Any, desk: Any, built: Built) -> None:
    """What others have read has no hidden states: the prompt is read again."""
    (prompt,), (inputs,) = lab.documents(built, [lab.sample("", COMMON, 1)], for_generation=True)
    at = desk(Sampler(built.model.backbone, chunk=8))
    unscored = asked(built, prompt, inputs)
    scored = asked(built, prompt, inputs, prompt_logprobs=True)
    outcomes = at.answer(unscored, scored, unscored) + at.answer(scored)
    expected = raw(built, prompt, inputs)
    assert outcomes[0].scores is None and outcomes[2].scores is None
    for outcome in (outcomes[1], outcomes[3]):
        assert outcome.scores.logprobs[1] == pytest.approx(
            float(expected[0, prompt.token_ids[1]]), abs=1e-4
        )
        assert len(outcome.scores.logprobs) == prompt.length
    assert len({str(outcome.tokens) for outcome in outcomes}) == 1


def test_the_likeliest_tokens_alone_are_scores_too(lab: Any, desk: Any, built: Built) -> None:
    (prompt,), (inputs,) = lab.documents(built, [lab.sample("", COMMON)], for_generation=True)
    at = desk(Sampler(built.model.backbone))
    (outcome,) = at.answer(asked(built, prompt, inputs, top_prompt_logprobs=1))
    best = raw(built, prompt, inputs).argmax(-1).tolist()
    assert [row and row[0][0] for row in outcome.scores.top] == [None, *best[:-1]]


def test_a_prompt_of_one_position_has_nothing_to_score(desk: Any, lab: Any, built: Built) -> None:
    (prompt,), _ = lab.documents(built, [lab.sample("", "a")], for_generation=True)
    short = lab.extended(prompt, [])
    single = Document(
        short.token_ids[:1], short.targets[:1], short.weights[:1], short.positions[:1]
    )
    at = desk(Sampler(built.model.backbone))
    (outcome,) = at.answer(asked(built, single, [], prompt_logprobs=True, top_prompt_logprobs=2))
    assert outcome.scores.logprobs == [None] and outcome.scores.top == [None]
    assert len(outcome.tokens[0]) == 2

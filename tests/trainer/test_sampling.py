"""Guarantee 9 and more: the cache changes nothing, logprobs are the trainer's, bans hold."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from plait.errors import ConfigError, DataError
from plait.stream import Document, pack
from plait.trainer.build import Built
from plait.trainer.sampling import sampler
from plait.trainer.sampling.generating import generate
from plait.trainer.sampling.requests import Generated
from plait.trainer.sampling.settings import SamplerSettings

STEPS = 6


@pytest.fixture(params=["llama", "mistral"])
def built(lab: Any, request: pytest.FixtureRequest, tmp_path: Any) -> Built:
    """With pictures read in both directions, so that prompts are more than causal."""
    folder = lab.language
    if request.param == "mistral":  # its sliding window is shorter than the prompts
        folder = tmp_path / "mistral"
        config = MistralConfig(
            vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
            num_attention_heads=4, num_key_value_heads=2, sliding_window=5,
        )  # fmt: skip
        torch.manual_seed(5)
        MistralForCausalLM(config).save_pretrained(folder)
        PreTrainedTokenizerFast.from_pretrained(lab.language).save_pretrained(folder)
    made: Built = lab.build(language=str(folder), bidirectional=True)
    return spread(made)


def spread(built: Built) -> Built:
    """Larger logits: random models find every token about as likely."""
    with torch.no_grad():
        built.model.output_weight.mul_(8)
    return built


def sample(
    lab: Any, built: Built, numbers: list[int], samples: int = 1, **options: Any
) -> list[list[Generated]]:
    chosen = [lab.samples[number] for number in numbers]
    documents, inputs = lab.documents(built, chosen, for_generation=True)
    options = {"max_tokens": STEPS, "stop": ()} | options
    return generate(
        built.model, built.tokenizer, built.layout, documents, inputs,
        SamplerSettings(**options), samples,
    )  # fmt: skip


def trained_logprobs(
    lab: Any, built: Built, prompt: Document, inputs: Any, tokens: list[int]
) -> list[float]:
    """What the trainer finds for these tokens after this prompt."""
    document = lab.extended(prompt, tokens[:-1])
    targets, weights = document.targets.copy(), document.weights.copy()
    start = prompt.length - 1
    targets[start:], weights[start:] = tokens, 1
    stream = pack([replace(document, targets=targets, weights=weights)], [inputs])
    with torch.no_grad():
        found: list[float] = built.model.compute(stream).logprobs.tolist()
    return found


def test_cached_greedy_equals_reading_the_row_again(lab: Any, built: Built) -> None:
    prompts, inputs = lab.documents(built, lab.samples, for_generation=True)
    made = sample(lab, built, [0, 1, 2, 3], temperature=0)
    for prompt, loaded, rows in zip(prompts, inputs, made, strict=True):
        tokens: list[int] = []
        for _ in range(STEPS):
            with torch.no_grad():
                stream = pack([lab.extended(prompt, tokens)], [loaded])
                logits = built.model.logits(built.model.hidden(stream)[0][-1:])[0]
            tokens.append(int(logits[: len(built.tokenizer)].argmax()))
        assert rows[0].tokens == tokens


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
def test_logprobs_are_the_trainers(lab: Any, built: Built, temperature: float) -> None:
    """Of the raw distribution, whatever the temperature."""
    prompts, inputs = lab.documents(built, lab.samples, for_generation=True)
    made = sample(lab, built, [0, 1, 2, 3], samples=2, temperature=temperature, seed=4)
    for prompt, loaded, rows in zip(prompts, inputs, made, strict=True):
        for row in rows:
            expected = trained_logprobs(lab, built, prompt, loaded, row.tokens)
            assert row.logprobs == pytest.approx(expected, abs=1e-4)
            assert len(row.tokens) == STEPS and not row.stopped


def test_logprobs_stay_raw_where_the_likeliest_token_is_banned(lab: Any) -> None:
    built = spread(lab.build())
    prompts, inputs = lab.documents(built, lab.samples[:1], for_generation=True)
    free = sample(lab, built, [0], temperature=0)[0][0].tokens
    built.layout.banned_ids = frozenset({free[0]})  # type: ignore[misc]  # of this layout only
    row = sample(lab, built, [0], temperature=0)[0][0]
    assert free[0] not in row.tokens
    expected = trained_logprobs(lab, built, prompts[0], inputs[0], row.tokens)
    assert row.logprobs == pytest.approx(expected, abs=1e-4)


def test_a_seed_does_not_depend_on_what_is_sampled_beside_it(lab: Any, built: Built) -> None:
    options = {"samples": 3, "temperature": 1.0, "seed": 11}
    together = [[row.tokens for row in rows] for rows in sample(lab, built, [2, 0, 1], **options)]
    for place, number in enumerate([2, 0, 1]):
        alone = sample(lab, built, [number], **options)
        assert [row.tokens for row in alone[0]] == together[place]
    assert [row.tokens for row in sample(lab, built, [0], **options)[0]] == together[1]
    first = sample(lab, built, [0], temperature=1.0, seed=11)[0][0]
    assert first.tokens == together[1][0]
    assert len({tuple(tokens) for tokens in together[1]}) == 3
    other = sample(lab, built, [0], samples=3, temperature=1.0, seed=12)[0]
    assert [row.tokens for row in other] != together[1]


def test_temperature_draws_from_the_tempered_distribution(lab: Any) -> None:
    built = spread(lab.build())
    prompts, inputs = lab.documents(built, lab.samples[2:3], for_generation=True)
    rows = sample(lab, built, [2], samples=600, temperature=0.5, max_tokens=1)[0]
    with torch.no_grad():
        hidden, _ = built.model.hidden(pack(prompts, inputs))
        logits = built.model.logits(hidden[-1:])[0][: len(built.tokenizer)]
    expected = (logits / 0.5).softmax(-1).numpy()
    counts = np.bincount([row.tokens[0] for row in rows], minlength=len(expected)) / len(rows)
    likely = expected.argsort()[-3:]
    assert expected[likely].sum() > 0.1
    assert np.abs(counts - expected)[likely].max() < 0.07


def test_stop_tokens(lab: Any) -> None:
    built = spread(lab.build())
    rows = sample(lab, built, [0, 1], temperature=0)
    first = rows[0][0].tokens
    end = first[2]
    cut = first.index(end) + 1
    for stop in (None, (end,), (end, 0)):
        built.tokenizer.eos_token_id = end
        made = sample(lab, built, [0, 1], temperature=0, stop=stop)
        assert made[0][0].tokens == first[:cut] and made[0][0].stopped
        assert len(made[0][0].logprobs) == cut
        other = made[1][0]  # goes on when its neighbour has stopped
        assert other.tokens == rows[1][0].tokens[: len(other.tokens)]
        assert other.stopped == (end in other.tokens)
        assert other.stopped or len(other.tokens) == STEPS
    assert sample(lab, built, [0], temperature=0, stop=())[0][0].tokens == first
    one = sample(lab, built, [0], temperature=0, max_tokens=1)[0][0]
    assert one.tokens == first[:1] and not one.stopped
    last = sample(lab, built, [0], temperature=0, max_tokens=cut, stop=None)[0][0]
    assert last.stopped and last.tokens == first[:cut]


def test_stop_texts(lab: Any) -> None:
    """They are found across the borders of tokens, and their last token is the row's last."""
    built = spread(lab.build())
    built.tokenizer.eos_token_id = None
    options = {"temperature": 3.0, "seed": 2, "max_tokens": 12}
    whole = sample(lab, built, [0], **options)[0][0]

    def text(count: int) -> str:
        written: str = built.tokenizer.decode(whole.tokens[:count])
        return written

    assert len(text(12)) > 12, "tokens of several characters are needed"
    for length in (1, 3):
        starts = range(len(text(12)) - length + 1)
        for stop in {text(12)[start : start + length] for start in starts}:
            end = next(count for count in range(1, 13) if stop in text(count))
            row = sample(lab, built, [0], stop=("?!", stop), **options)[0][0]
            assert row.tokens == whole.tokens[:end] and row.stopped
            assert row.logprobs == whole.logprobs[:end]
    row = sample(lab, built, [0], stop=("absent",), **options)[0][0]
    assert row.tokens == whole.tokens and not row.stopped


def test_stop_texts_come_beside_the_end_token(lab: Any) -> None:
    built = spread(lab.build())
    free = sample(lab, built, [0], temperature=0)[0][0]
    built.tokenizer.eos_token_id = free.tokens[2]
    row = sample(lab, built, [0], temperature=0, stop=("absent",))[0][0]
    assert row.stopped and row.tokens[-1] == free.tokens[2]


def test_tokens_without_a_bound_fill_the_context(lab: Any, monkeypatch: Any) -> None:
    built = lab.build()
    prompts, _ = lab.documents(built, lab.samples[:2], for_generation=True)
    lengths = [prompt.length for prompt in prompts]
    context = max(lengths) + 9
    built.model.language.config.max_position_embeddings = context
    rows = sample(lab, built, [0, 1], max_tokens=None)
    assert [len(row[0].tokens) for row in rows] == [context - length for length in lengths]
    with pytest.raises(
        DataError, match=rf"context of {context} tokens.*{lengths[0]} and {context}"
    ):
        sample(lab, built, [0], max_tokens=context)
    monkeypatch.setattr(sampler, "MOST_TOKENS", 4)
    rows = sample(lab, built, [0, 1], max_tokens=None)
    assert {len(row[0].tokens) for row in rows} == {4}


def test_top_k_and_top_p_keep_the_likeliest_and_their_raw_logprobs(lab: Any) -> None:
    built = spread(lab.build())
    prompts, inputs = lab.documents(built, lab.samples[2:3], for_generation=True)
    with torch.no_grad():
        hidden, _ = built.model.hidden(pack(prompts, inputs))
        logits = built.model.logits(hidden[-1:])[0]
    raw = logits.log_softmax(-1)
    logits = logits[: len(built.tokenizer)]
    ranked = logits.argsort(descending=True).tolist()
    tempered = (logits / 2).softmax(-1)[ranked].cumsum(-1)
    options = {"samples": 200, "max_tokens": 1, "temperature": 2.0}

    def drawn(**more: Any) -> set[int]:
        rows = sample(lab, built, [2], **options, **more)[0]
        for row in rows:
            assert row.logprobs[0] == pytest.approx(float(raw[row.tokens[0]]), abs=1e-5)
        return {row.tokens[0] for row in rows}

    share = float(tempered[1]) + 1e-4  # which takes the third token to reach
    assert len(drawn()) > 3
    assert drawn(top_k=3) == set(ranked[:3])
    assert drawn(top_p=share) == set(ranked[:3])
    assert drawn(top_k=1) == drawn(top_p=1e-6) == {ranked[0]}
    # Of the two likeliest, the first alone holds half.
    assert drawn(top_k=2, top_p=float(tempered[0] / tempered[1]) - 1e-4) == {ranked[0]}
    assert drawn(top_k=10_000, seed=3) == drawn(seed=3)


def test_a_seed_of_any_size_draws(lab: Any) -> None:
    built = lab.build()
    rows = sample(lab, built, [0], seed=2**63 + 1)[0]
    assert len(rows[0].tokens) == STEPS


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_banned_and_padding_ids_never_come_out(lab: Any, temperature: float) -> None:
    """Even where the logits favour them: media ids, and rows that no token has."""
    built = lab.build()
    language, size = built.model.language, len(built.tokenizer)
    language.resize_token_embeddings(size + 16)
    favoured = [7, 40, *range(size, size + 16)]
    weight = built.model.output_weight
    with torch.no_grad():
        hidden, _ = built.model.hidden(lab.stream(built, lab.samples))
        weight[favoured] = 50 * hidden.mean(0)
    built.layout.banned_ids = frozenset({7, 40})  # type: ignore[misc]  # of this layout only
    rows = sample(lab, built, [0, 1, 2, 3], samples=4, temperature=temperature)
    tokens = {token for group in rows for row in group for token in row.tokens}
    assert tokens and not tokens & set(favoured)
    built.layout.banned_ids = frozenset()  # type: ignore[misc]  # what was favoured, was
    freed = sample(lab, built, [0], samples=4, temperature=temperature)[0]
    assert {token for row in freed for token in row.tokens} & {7, 40}


def test_settings_that_cannot_be_are_refused() -> None:
    for name, value, rule in [
        ("max_tokens", 0, "of at least 1; it is 0"),
        ("temperature", -1, "of at least 0; it is -1"),
        ("temperature", float("nan"), "of at least 0; it is nan"),
        ("top_p", 0, r"in \(0, 1\]; it is 0"),
        ("top_k", 0, "of at least 1; it is 0"),
        ("seed", None, "of at least 0; it is None"),
    ]:
        with pytest.raises(ConfigError, match=f"^{name}.* number {rule}"):
            SamplerSettings(**{name: value})

"""Guarantee 9: however prompts are read, and whoever else is there, tokens and logprobs are those
of reading each sequence alone, and the trainer's.

Of small real models, whose pictures see themselves in both directions.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from plait.errors import ModelError
from plait.stream import Document, ItemInputs, pack
from plait.trainer.build import Built
from plait.trainer.sampling.choosing import Draws, choose
from plait.trainer.sampling.requests import Generated, Request
from plait.trainer.sampling.sampler import Sampler
from plait.trainer.sampling.settings import SamplerSettings

TOKENS = 4
COMMON = "the shape of a big yellow cross . "
PROMPTS: list[tuple[str | int, ...]] = [
    (COMMON, 1, " what is it"),
    (COMMON, 1, " the colour"),
    (COMMON, 2, " what is it"),
    (1, " and ", 3, COMMON),
    ("a red disc",),
    (COMMON,),
]
"""Texts, and pictures by their seeds: some begin alike, some hold other pictures alike."""

GREEDY = SamplerSettings(max_tokens=TOKENS, stop=(), temperature=0)
DRAWN = SamplerSettings(max_tokens=TOKENS, stop=(), temperature=1.2, top_p=0.95, seed=3)


class Alone(nn.Module):
    """A layer that also mixes neighbours of the row: its model is read one document at a time."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **options: Any) -> Any:
        rows = self.inner(*args, **options)
        return rows + 0.5 * torch.cat([torch.zeros_like(rows[:, :1]), rows[:, :-1]], 1)


@pytest.fixture(scope="module")
def mistral(tiny_language: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a sliding window shorter than the prompts."""
    folder = tmp_path_factory.mktemp("windows")
    config = MistralConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=5,
    )  # fmt: skip
    torch.manual_seed(5)
    MistralForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(tiny_language).save_pretrained(folder)
    return folder


@dataclass
class Bench:
    """A model, its prompts, and what reading each sequence alone gives."""

    built: Built
    prompts: list[Document]
    inputs: list[list[ItemInputs]]
    answers: dict[tuple[int, bool], list[Generated]]

    def request(self, number: int, greedy: bool, samples: int, **options: Any) -> Request:
        made, settings = self.built, GREEDY if greedy else DRAWN
        return Request(
            made.model, made.tokenizer, made.layout, self.prompts[number], self.inputs[number],
            settings, samples, **options,
        )  # fmt: skip

    def check(self, rows: list[Generated] | None, number: int, greedy: bool) -> None:
        assert rows is not None
        for made, expected in zip(rows, self.answers[number, greedy], strict=False):
            assert made.tokens == expected.tokens
            assert made.logprobs == pytest.approx(expected.logprobs, abs=1e-5)


def alone(lab: Any, built: Built, prompt: Document, inputs: Any, greedy: bool) -> list[Generated]:
    """Three samples, each step reading the whole row again; for greedy ones, one."""
    settings, rows = GREEDY if greedy else DRAWN, []
    padding = torch.arange(len(built.tokenizer), built.model.output_weight.shape[0])
    for number in range(1 if greedy else 3):
        row, draws = Generated(), Draws(settings.seed, number)
        for _ in range(TOKENS):
            stream = pack([lab.extended(prompt, row.tokens)], [inputs])
            with torch.no_grad():
                logits = built.model.logits(built.model.hidden(stream)[0][-1:])
            chosen = choose(logits, [settings], [draws], padding)
            row.tokens += chosen.tokens
            row.logprobs += chosen.logprobs
        rows.append(row)
    return rows


def bench_of(lab: Any, folder: Path, packs: bool) -> Bench:
    built = lab.build(language=str(folder), bidirectional=True, lora=None, train=("projector",))
    if not packs:
        first = built.model.backbone.decoder.layers[0]
        first.mlp = Alone(first.mlp)
        built.model.backbone.packs = False
    with torch.no_grad():  # random models find every token about as likely
        built.model.output_weight.mul_(8)
    samples = [lab.sample("", *parts) for parts in PROMPTS]
    prompts, inputs = lab.documents(built, samples, for_generation=True)
    answers = {
        (number, greedy): alone(lab, built, prompts[number], inputs[number], greedy)
        for number in range(len(prompts))
        for greedy in (True, False)
    }
    return Bench(built, prompts, inputs, answers)


@pytest.fixture(scope="module")
def benches(lab: Any, mistral: Path) -> Callable[[str], Bench]:
    """Benches by name, each made once."""
    folders = {"llama": lab.language, "mistral": mistral, "rows": lab.language}
    return cache(lambda name: bench_of(lab, folders[name], packs=name != "rows"))


TIGHT = 130
"""Slots for the largest request and little more: most wait, and all places are used again."""


def all_requests(bench: Bench) -> Iterator[tuple[Request, int, bool]]:
    """Of one and of three samples, in an order in which those that begin alike are apart."""
    for number in range(len(bench.prompts)):
        for greedy, samples in ((True, 1), (False, 3)):
            yield bench.request(number, greedy, samples, owner=str(number % 2)), number, greedy


READINGS = [
    *product(["llama", "mistral"], [1, 3, 7, None], [True, False], [TIGHT, 4096]),
    *product(["rows"], [None], [True], [TIGHT, 4096]),
]
"""Such a model as the last reads whole prompts, each by itself."""


@pytest.mark.parametrize(("name", "chunk", "share", "slots"), READINGS)
def test_company_chunks_sharing_and_room_change_nothing(
    benches: Any, desk: Any, poisoned: Any, emptied: Any,
    name: str, chunk: int | None, share: bool, slots: int,
) -> None:  # fmt: skip
    """Requests come while others are read and grow, and every free slot holds nonsense."""
    bench = benches(name)
    packs = bench.built.model.packs
    at = desk(Sampler(bench.built.model.backbone, chunk=chunk, share=share, slots=slots))
    if packs:
        poisoned(at.sampler)
    asked = []
    for turn, (request, number, greedy) in enumerate(all_requests(bench)):
        asked.append((at.ask(request), number, greedy))
        at.step(turn % 4)
    at.finish()
    for outcome, number, greedy in asked:
        bench.check(outcome.rows, number, greedy)
    if packs:
        assert emptied(at.sampler)


CHUNKS = [*product(["llama", "mistral"], [1, 3, 7, None]), ("rows", None)]


@pytest.mark.parametrize(("name", "chunk"), CHUNKS)
@pytest.mark.parametrize("samples", [1, 3])
def test_a_request_alone_is_read_in_any_chunks(
    benches: Any, desk: Any, name: str, chunk: int | None, samples: int
) -> None:
    """And a chunk never parts a picture that sees itself in both directions."""
    bench = benches(name)
    for number in (0, 3):
        at = desk(Sampler(bench.built.model.backbone, chunk=chunk))
        (outcome,) = at.answer(bench.request(number, False, samples))
        bench.check(outcome.rows, number, False)
        assert len(outcome.rows) == samples
        ends, prompt = [0], bench.prompts[number]
        for length, *_ in at.lengths:
            if ends[-1] < prompt.length:
                ends.append(ends[-1] + length)
        assert ends[-1] == prompt.length
        assert not [end for end in ends for s in prompt.spans if s.start < end < s.stop]
        longest = max(chunk or prompt.length, 4)
        assert max(b - a for a, b in pairwise(ends)) <= longest


@pytest.mark.parametrize("name", ["llama", "mistral", "rows"])
def test_logprobs_are_the_trainers(lab: Any, benches: Any, desk: Any, name: str) -> None:
    bench = benches(name)
    at = desk(Sampler(bench.built.model.backbone, chunk=5))
    requests = [bench.request(number, False, 3) for number in range(len(PROMPTS))]
    for number, outcome in enumerate(at.answer(*requests)):
        for row in outcome.rows:
            document = lab.extended(bench.prompts[number], row.tokens[:-1])
            targets, weights = document.targets.copy(), document.weights.copy()
            start = bench.prompts[number].length - 1
            targets[start:], weights[start:] = row.tokens, 1
            stream = pack(
                [replace(document, targets=targets, weights=weights)], [bench.inputs[number]]
            )
            with torch.no_grad():
                expected = bench.built.model.compute(stream).logprobs.tolist()
            assert row.logprobs == pytest.approx(expected, abs=1e-4)


@pytest.fixture(scope="module")
def runs(lab: Any) -> tuple[Built, list[Any]]:
    """Three runs on one language model: two adapters, and the base with a projector of its own."""
    built = lab.build(bidirectional=True)
    model, language = built.model, built.model.language
    inject_adapter_in_model(
        LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]), language, "other"
    )
    generator = torch.Generator().manual_seed(7)
    for name, parameter in language.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(std=0.2, generator=generator)
    with torch.no_grad():
        model.output_weight.mul_(8)
    model.backbone.share()
    made = [model]
    for adapter in ("other", None):
        encoders = dict(copy.deepcopy(model.encoders).items())
        made.append(type(model)(model.backbone, encoders, adapter).eval())
    with torch.no_grad():
        for parameter in made[2].media_encoder("hf_vision").projector.parameters():
            parameter.mul_(1.5)
    return built, made


def test_runs_that_share_a_language_model_sample_their_own(
    lab: Any, runs: tuple[Built, list[Any]], desk: Any, poisoned: Any
) -> None:
    """Rows of several adapters, the same prompt for each: the tokens are those of a run alone."""
    built, models = runs
    samples = [lab.sample("", *parts) for parts in PROMPTS[:2]]
    prompts, inputs = lab.documents(built, samples, for_generation=True)
    at = desk(poisoned(Sampler(built.model.backbone, chunk=6)))
    asked = [
        (at.ask(Request(model, built.tokenizer, built.layout, prompt, loaded, DRAWN, 2)), model,
         prompt, loaded)
        for prompt, loaded in zip(prompts, inputs, strict=True) for model in models
    ]  # fmt: skip
    at.finish()
    for outcome, model, prompt, loaded in asked:
        expected = alone(lab, replace(built, model=model), prompt, loaded, greedy=False)
        for row, right in zip(outcome.rows, expected, strict=False):
            assert row.tokens == right.tokens
            assert row.logprobs == pytest.approx(right.logprobs, abs=1e-5)
    assert len({str(outcome.tokens) for outcome, *_ in asked[:3]}) == 3


def test_a_run_of_no_numbers_harms_no_other(
    lab: Any, runs: tuple[Built, list[Any]], desk: Any
) -> None:
    """Weights that have diverged, beside the others and where these come later, are refused."""
    built, models = runs
    healthy, *diverged = models
    before = [copy.deepcopy(model.encoders) for model in diverged]
    prompts, inputs = lab.documents(
        built, [lab.sample("", *parts) for parts in PROMPTS[:4]], for_generation=True
    )
    with torch.no_grad():
        for model in diverged:
            for parameter in model.media_encoder("hf_vision").projector.parameters():
                parameter.fill_(torch.nan)
    at = desk(Sampler(built.model.backbone, chunk=11, slots=TIGHT))
    asked = []
    for prompt, loaded in zip(prompts, inputs, strict=True):
        for model in (*diverged, healthy):
            request = Request(model, built.tokenizer, built.layout, prompt, loaded, DRAWN)
            asked.append((at.ask(request), model, prompt, loaded))
    at.finish()
    for model, encoders in zip(diverged, before, strict=True):
        model.encoders = encoders
    for outcome, model, prompt, loaded in asked:
        if model is healthy:
            expected = alone(lab, replace(built, model=model), prompt, loaded, greedy=False)
            assert outcome.tokens[0] == expected[0].tokens
        else:
            with pytest.raises(ModelError, match=r"(adapter 'other'|the base) gave NaN"):
                raise outcome.error

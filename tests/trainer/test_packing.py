"""Guarantee 2: packing changes only speed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from plait.kernels.interval_attention import Intervals
from plait.trainer.checks import TOLERANCE, check_packing, packing_difference
from plait.trainer.sampling.branches import Branches
from plait.trainer.sampling.generating import generate
from plait.trainer.sampling.settings import SamplerSettings

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
WINDOW = 6
"""Keys of the sliding windows: shorter than the documents."""


def family(name: str) -> Any:
    if name == "qwen2":
        sliding: dict[str, Any] = {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
        }
        return Qwen2ForCausalLM(Qwen2Config(**SIZES, **sliding))
    if name == "mistral":
        return MistralForCausalLM(MistralConfig(**SIZES, head_dim=8, sliding_window=WINDOW))
    layers = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(
        **SIZES, head_dim=8, sliding_window=WINDOW, layer_types=layers, query_pre_attn_scalar=8
    )
    return Gemma3ForCausalLM(config)


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory, tiny_language: Path) -> dict[str, Path]:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_language)
    folders = {"llama": tiny_language}
    for name in ("qwen2", "mistral", "gemma3"):
        folder = folders[name] = tmp_path_factory.mktemp(name)
        torch.manual_seed(3)
        family(name).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folders


NAMES = ["llama", "qwen2", "mistral", "gemma3"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_equals_unpacked(
    lab: Any, families: dict[str, Path], name: str, bidirectional: bool
) -> None:
    built = lab.build(language=str(families[name]), bidirectional=bidirectional)
    packed, gradient = lab.gradients(built, [lab.stream(built, lab.samples)])
    alone, expected = lab.gradients(built, [lab.stream(built, [s]) for s in lab.samples])
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=0)
    assert (gradient - expected).norm() <= 1e-5 * expected.norm()
    assert expected.norm() > 0
    assert packing_difference(built) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_a_packed_row_equals_transformers_own_forward(
    lab: Any, families: dict[str, Path], name: str
) -> None:
    """Each document alone, in transformers' eager attention, windows and all."""
    built = lab.build(language=str(families[name]), lora=None)
    texts = [lab.sample("a red disc " * n, "what shape is it " * n) for n in (1, 3, 2)]
    stream = lab.stream(built, texts)
    with torch.no_grad():
        hidden, _ = built.model.hidden(stream)
        made = built.model.logits(hidden)
    built.model.language.set_attn_implementation("eager")
    for start, stop in stream.bounds:
        with torch.no_grad():
            expected = built.model.language(input_ids=stream.token_ids[None, start:stop]).logits[0]
        assert stop - start > WINDOW
        torch.testing.assert_close(made[start:stop], expected, rtol=1e-4, atol=1e-5)


def logprobs(built: Any, stream: Any) -> list[Tensor]:
    with torch.no_grad():
        sums = built.model.compute(stream, everywhere=True)
    inside = [(sums.index >= a) & (sums.index < b) for a, b in stream.bounds]
    return [sums.logprobs[chosen] for chosen in inside]


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_document_does_not_see_its_neighbours(
    lab: Any, families: dict[str, Path], name: str
) -> None:
    built = lab.build(language=str(families[name]), bidirectional=True)
    before = logprobs(built, lab.stream(built, lab.samples))
    for changed, other in enumerate([("a blue", "look ", 9, " what is it"), ("red", 8, "and", 9)]):
        samples = lab.samples
        samples[changed] = lab.sample(*other)
        after = logprobs(built, lab.stream(built, samples))
        for number in range(len(samples)):
            if number == changed:
                continue
            torch.testing.assert_close(after[number], before[number], rtol=0, atol=1e-6)
        size = min(len(before[changed]), len(after[changed]))
        assert (after[changed][:size] - before[changed][:size]).abs().max() > 1e-4


class Leaky(nn.Module):
    """A layer that also mixes neighbours of the row, whatever document they are of."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rows = self.inner(*args, **kwargs)
        return rows + 0.5 * torch.cat([torch.zeros_like(rows[:, :1]), rows[:, :-1]], 1)


def leak(built: Any) -> None:
    first = built.model.backbone.decoder.layers[0]
    first.mlp = Leaky(first.mlp)


def test_a_model_that_mixes_documents_runs_unpacked(lab: Any) -> None:
    built = lab.build(bidirectional=True)
    assert check_packing(built)[0] and built.model.packs
    leak(built)
    packs, difference = check_packing(built)
    assert not packs and not built.model.packs and difference > 0.01
    together, gradient = lab.gradients(built, [lab.stream(built, lab.samples)])
    alone, expected = lab.gradients(built, [lab.stream(built, [s]) for s in lab.samples])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)
    assert (gradient - expected).norm() <= 1e-5 * expected.norm()
    built.model.backbone.packs = True
    mixed, _ = lab.gradients(built, [lab.stream(built, lab.samples)])
    assert (mixed - alone).abs().max() > 1e-3


def test_a_model_that_mixes_documents_samples_one_row_at_a_time(lab: Any) -> None:
    """Such a model has state that no cache of keys holds; its rows are read again each step."""
    built = lab.build()
    leak(built)
    check_packing(built)
    assert not built.model.packs
    prompts, inputs = lab.documents(built, lab.samples, for_generation=True)
    settings = SamplerSettings(max_tokens=4, temperature=0, stop=())
    made = generate(built.model, built.tokenizer, built.layout, prompts, inputs, settings)
    for prompt, loaded, rows in zip(prompts, inputs, made, strict=True):
        tokens: list[int] = []
        for _ in range(4):
            continuation = Branches(
                built.model, built.layout, [lab.extended(prompt, tokens)], [loaded], [1], 1
            )
            with torch.no_grad():
                logits = built.model.logits(continuation.last_hidden())[0]
            tokens.append(int(logits[: len(built.tokenizer)].argmax()))
        assert rows[0].tokens == tokens


def test_attention_that_ignores_documents_is_found(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def whole_row(self: Intervals, window: int | None = None) -> tuple[Tensor, Tensor]:
        del window
        return torch.zeros_like(self.lo), self.hi

    built = lab.build()
    monkeypatch.setattr(Intervals, "bounds", whole_row)
    packs, difference = check_packing(built)
    assert not packs and difference > TOLERANCE[torch.float32]


def test_the_check_leaves_the_model_as_it_was(lab: Any) -> None:
    built = lab.build(lora=None, train=("projector",))
    before = {name: value.clone() for name, value in built.model.state_dict().items()}
    packs, difference = check_packing(built)
    assert packs and difference < 1e-5
    assert all(p.grad is None for p in built.model.parameters())
    assert all(torch.equal(before[n], v) for n, v in built.model.state_dict().items())

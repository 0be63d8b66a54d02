"""Packed with groups through our path equals transformers' eager attention with explicit masks.

Losses, and the gradient of every parameter, in float32. The masks are built here from documents
and spans, pair by pair, and know nothing of intervals.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.masking_utils import (
    create_bidirectional_sliding_window_mask,
    create_causal_mask,
)
from transformers.models.gemma3.modeling_gemma3 import get_block_sequence_ids_for_mask

from plait.encoders import attention
from plait.encoders.attention import EVERYTHING, attending
from plait.errors import ModelError, UnknownNameError
from plait.kernels.interval_attention import Intervals, interval_attention
from plait.stream import Document, pack
from plait.trainer.checks import packing_warning

SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
WINDOW = 3
"""Keys of a sliding window: shorter than the groups of 4."""

GEMMA = {"head_dim": 8, "sliding_window": WINDOW, "query_pre_attn_scalar": 8,
         "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
    "mistral": lambda: MistralForCausalLM(
        MistralConfig(**SIZES, head_dim=8, sliding_window=WINDOW)
    ),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, **GEMMA, attn_logit_softcapping=0.5, final_logit_softcapping=0.7)
    ),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **GEMMA)),
    # Both tell a layer's window in its mask alone.
    "phimoe": lambda: PhimoeForCausalLM(
        PhimoeConfig(**SIZES, sliding_window=WINDOW, num_local_experts=4)
    ),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **SIZES,
            use_sliding_window=True,
            sliding_window=WINDOW,
            num_experts=4,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
}
WINDOWED = {"qwen2": {"sliding_attention"}, "mistral": {"all"}, "gemma2": {"sliding_attention"},
            "gemma3": {"sliding_attention"}, "qwen2_moe": {"sliding_attention"},
            "phimoe": {"all"}}  # fmt: skip


@pytest.fixture
def save(tmp_path: Path, tiny_language: Path) -> Callable[[Any], str]:
    def to_folder(model: Any) -> str:
        model.save_pretrained(tmp_path / "model")
        PreTrainedTokenizerFast.from_pretrained(tiny_language).save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return to_folder


def pairs(documents: Sequence[Document], window: int | None) -> Tensor:
    """(1, 1, T, T) to add to scores: 0 where a position may see another, else the lowest float."""
    rows = []
    start = 0
    for document in documents:
        groups = [-1 - n for n in range(document.length)]  # a position is no one's group
        for number, span in enumerate(document.spans):
            if span.group is not None:
                groups[span.start : span.stop] = [number] * span.length
        rows += [(start, place, group) for place, group in enumerate(groups)]
        start += document.length
    seen = torch.zeros(len(rows), len(rows), dtype=torch.bool)
    for i, (own, place, group) in enumerate(rows):
        for j, (other, at, of) in enumerate(rows):
            before = at <= place or group == of
            near = window is None or at > place - window
            seen[i, j] = own == other and before and near
    lowest = torch.finfo(torch.float32).min
    return torch.zeros(seen.shape).masked_fill(~seen, lowest)[None, None]


def mask_for(name: str, documents: Sequence[Document]) -> Any:
    """What the family's forward takes as its mask: one, or one for each kind of layer."""
    whole, near = pairs(documents, None), pairs(documents, WINDOW)
    if WINDOWED.get(name) == {"all"}:
        return near
    return {"full_attention": whole, "sliding_attention": near} if name in WINDOWED else whole


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys() and ours
    whole = torch.stack([t.norm() for t in theirs.values()]).norm()
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() <= 1e-5 * max(gradient.norm(), 1e-2 * whole), name


def gradients(model: Any) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_with_groups_equals_eager_attention_with_explicit_masks(
    lab: Any, save: Callable[[Any], str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    calls: list[Any] = []

    def counted(module: Any, *args: Any, **options: Any) -> Any:
        calls.append(module)
        return attend(module, *args, **options)

    attend = attention.attend
    monkeypatch.setattr(attention, "attend", counted)
    built = lab.build(language=save(FAMILIES[name]()), lora=None, bidirectional=True)
    documents, inputs = lab.documents(built, lab.samples)
    stream = pack(documents, inputs)
    model, language = built.model, built.model.language
    calls.clear()
    sums = model.compute(stream)
    assert len(calls) == 2 + 2  # the layers of the tower and of the language model
    sums.loss.backward()
    ours = gradients(model)

    language.set_attn_implementation("eager")
    rows, _ = model.embed(stream)
    logits = language(
        inputs_embeds=rows.embeddings[None], position_ids=stream.positions[None],
        attention_mask=mask_for(name, documents), use_cache=False,
    ).logits[0]  # fmt: skip
    logprobs = logits.log_softmax(-1).gather(-1, stream.targets[:, None])[:, 0]
    loss = -(logprobs * stream.weights).sum()
    loss.backward()
    assert sums.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(sums.logprobs, logprobs[sums.index], rtol=1e-5, atol=1e-5)
    close(ours, gradients(model))


def smolvlm() -> Any:
    text = SIZES | {"model_type": "llama", "pad_token_id": 0}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
              "num_attention_heads": 2, "image_size": 16, "patch_size": 4}  # fmt: skip
    config = SmolVLMConfig(
        text_config=text, vision_config=vision, image_token_id=319, scale_factor=2,
        pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return SmolVLMForConditionalGeneration(config).eval()


def test_a_smolvlm_attends_through_us_in_both_of_its_models() -> None:
    """Its tower under a context, since it drops keywords; its language model by keyword."""
    torch.manual_seed(4)
    model = smolvlm()
    attention.register()
    lengths, pictures = (11, 9, 14), ((2, 6), (0, 4), (8, 12))
    ids = torch.randint(1, 319, (sum(lengths),))
    lo, hi, positions = [], [], []
    start = 0
    for length, (first, last) in zip(lengths, pictures, strict=True):
        ids[start + first : start + last] = 319
        lo += [start] * length
        ends = [start + (last if first <= at < last else at + 1) for at in range(length)]
        hi += ends
        positions += range(length)
        start += length
    intervals = Intervals(torch.tensor(lo), torch.tensor(hi))
    key = torch.arange(len(ids))
    seen = (key >= intervals.lo[:, None]) & (key < intervals.hi[:, None])
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
    inputs = {
        "input_ids": ids[None], "pixel_values": torch.randn(1, 3, 3, 16, 16),
        "position_ids": torch.tensor(positions)[None], "use_cache": False,
    }  # fmt: skip
    targets = torch.randint(0, 320, (len(ids),))

    def run(**options: Any) -> tuple[float, dict[str, Tensor]]:
        logits = model(**inputs, **options).logits[0]
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        loss.backward()
        return loss.item(), gradients(model)

    model.set_attn_implementation("eager")
    expected, theirs = run(attention_mask=mask)
    model.set_attn_implementation(attention.NAME)
    with attending(EVERYTHING):
        found, ours = run(visible=intervals)
    assert found == pytest.approx(expected, rel=1e-5)
    assert any(name.startswith("model.vision_model") for name in ours)
    close(ours, theirs)


def test_the_flash_path_of_transformers_loses_what_pictures_see_and_ours_does_not() -> None:
    """Gemma 3's pictures see themselves both ways; flash_attention_2 is handed no mask at all."""
    kinds = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0, 0]])
    config = Gemma3TextConfig(**SIZES, **GEMMA)
    rows = torch.zeros(1, 9, 32)
    handed = {}
    for implementation in ("flash_attention_2", "eager"):
        config._attn_implementation = implementation
        handed[implementation] = create_causal_mask(
            config=config, inputs_embeds=rows, attention_mask=None, past_key_values=None,
            position_ids=torch.arange(9)[None],
            block_sequence_ids=get_block_sequence_ids_for_mask(kinds),
        )  # fmt: skip
    assert handed["flash_attention_2"] is None  # so that it attends causally, and says nothing
    right = handed["eager"][0, 0] == 0
    assert right[2, 5] and not right[2, 6]

    hi = torch.arange(1, 10)
    hi[2:6] = 6
    visible = Intervals(torch.zeros(9, dtype=torch.long), hi)
    key = torch.arange(9)
    assert torch.equal((key >= visible.lo[:, None]) & (key < visible.hi[:, None]), right)
    torch.manual_seed(5)
    model = Gemma3ForCausalLM(config).eval()
    ids = torch.randint(0, 320, (1, 9))

    def logits(implementation: str, **options: Any) -> Tensor:
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            made: Tensor = model(input_ids=ids, use_cache=False, **options).logits
        return made

    attention.register()
    near = right & (key > key[:, None] - WINDOW)
    lowest = torch.finfo(torch.float32).min
    masks = {
        name: torch.zeros(9, 9).masked_fill(~seen, lowest)[None, None]
        for name, seen in (("full_attention", right), ("sliding_attention", near))
    }
    expected = logits("eager", attention_mask=masks)
    torch.testing.assert_close(
        logits(attention.NAME, visible=visible), expected, rtol=1e-4, atol=1e-5
    )
    causal = logits("eager")  # what flash computes
    assert (causal - expected).abs().max() > 1e-2 * expected.std()


def test_a_linear_attention_that_cannot_be_packed_runs_unpacked_with_a_warning(
    lab: Any, save: Callable[[Any], str]
) -> None:
    torch.manual_seed(6)
    config = Qwen3_5TextConfig(
        **SIZES, head_dim=8, layer_types=["linear_attention", "full_attention"],
        linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8,
    )  # fmt: skip
    built = lab.build(language=save(Qwen3_5ForCausalLM(config)))
    assert not built.model.packs
    warning = packing_warning(built)
    assert warning is not None and "documents run one by one" in warning
    packed, gradient = lab.gradients(built, [lab.stream(built, lab.samples)])
    alone, expected = lab.gradients(built, [lab.stream(built, [s]) for s in lab.samples])
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=0)
    assert (gradient - expected).norm() <= 1e-5 * expected.norm()


def test_a_model_takes_the_attention_route_it_is_given(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = lab.build()
    stream = lab.stream(built, lab.samples)
    routes: list[str] = []

    def spy(*args: Any, **options: Any) -> Any:
        routes.append(args[3].route)
        return interval_attention(*args, **options)

    monkeypatch.setattr(attention, "interval_attention", spy)
    usual = built.model.compute(stream).loss.item()
    assert set(routes) == {"auto"}
    forced = lab.build(attention="naive")
    routes.clear()
    assert forced.model.compute(stream).loss.item() == pytest.approx(usual, rel=1e-5)
    assert routes == ["naive", "naive"]
    with pytest.raises(UnknownNameError, match=r"'navie'.*naive"):
        lab.build(attention="navie")
    # Built on a CPU before it moves to a GPU; here it never does.
    flash = lab.build(attention="flash")
    with pytest.raises(ModelError, match="cannot take the route 'flash'"):
        flash.model.compute(stream)


def test_chunks_and_windows_to_both_sides_are_refused() -> None:
    attention.register()
    config = Llama4TextConfig(
        **SIZES, head_dim=8, attention_chunk_size=4, num_local_experts=2, intermediate_size_mlp=48
    )
    model = Llama4ForCausalLM(config)
    model.set_attn_implementation(attention.NAME)
    visible = Intervals(torch.zeros(9, dtype=torch.long), torch.arange(1, 10))
    with pytest.raises(ModelError, match="attention in chunks"):
        model(input_ids=torch.arange(9)[None], use_cache=False, visible=visible)

    sided = Gemma3TextConfig(**SIZES, **GEMMA)
    sided._attn_implementation = attention.NAME
    rows = torch.zeros(1, 9, 32)
    mask = create_bidirectional_sliding_window_mask(sided, rows, None)
    heads = torch.zeros(1, 2, 9, 8)
    with pytest.raises(ModelError, match="a window to both sides"):
        attention.attend(torch.nn.Identity(), heads, heads, heads, mask, visible=visible)

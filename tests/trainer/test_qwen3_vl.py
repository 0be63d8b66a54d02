"""The stream's proof: a tiny random Qwen3-VL, packed through our rooms, equals transformers'.

Pictures of unequal sizes, text after them, two pictures in one document, features for deeper
layers (deepstack), rotary positions in three dimensions, and decoding through our cache.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from plait.encoders import attention
from plait.encoders.layouts.qwen3_vl import Qwen3VLLayout
from plait.encoders.media_encoder import MediaEncoder
from plait.encoders.projectors import create_pool, create_projector
from plait.encoders.qwen3_vl.encoder import Qwen3VLVision
from plait.modalities import Image, Text
from plait.stream import (
    Document,
    Encoded,
    ItemInputs,
    Message,
    Sample,
    TokenStream,
    check_placeholders,
    pack,
    render,
)
from plait.trainer.model import PlaitModel
from plait.trainer.rows import Deeper
from plait.trainer.sampling.branches import Branches
from plait.trainer.sampling.generating import generate
from plait.trainer.sampling.requests import Generated, Request
from plait.trainer.sampling.sampler import Sampler
from plait.trainer.sampling.settings import SamplerSettings

SPECIAL = [
    "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
]  # fmt: skip
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HIDDEN = 16


@pytest.fixture(scope="module")
def tokenizer(tiny_language: Path) -> Any:
    made = AutoTokenizer.from_pretrained(tiny_language)
    made.add_special_tokens({"additional_special_tokens": SPECIAL})
    made.eos_token, made.chat_template = "<|im_end|>", CHATML
    return made


@pytest.fixture(scope="module")
def reference(tokenizer: Any) -> Any:
    """Transformers' model, in its eager attention; its biases and norms are random too."""
    ids = tokenizer.convert_tokens_to_ids
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer) + 5,
            "hidden_size": HIDDEN,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 100.0,
                "mrope_section": [2, 1, 1],
            },
        },
        vision_config={
            "depth": 4,
            "hidden_size": HIDDEN,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "out_hidden_size": HIDDEN,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [1, 2],
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


class TextModel(nn.Module):
    """What `PlaitModel` needs of a language model, from the parts of a Qwen3-VL."""

    def __init__(self, whole: Any) -> None:
        super().__init__()
        self.decoder, self.head, self.config = (
            whole.model.language_model,
            whole.lm_head,
            whole.config,
        )

    def get_decoder(self) -> nn.Module:
        return self.decoder

    def get_output_embeddings(self) -> nn.Module:
        return self.head


@pytest.fixture(scope="module")
def ours(reference: Any) -> PlaitModel:
    attention.register()
    whole = copy.deepcopy(reference)
    whole.model.language_model.set_attn_implementation(attention.NAME)
    processor = Qwen2VLImageProcessor(
        patch_size=4, merge_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    )
    tower = Qwen3VLVision(whole.model.visual, processor)
    projector = create_projector(
        "identity", tower.width, HIDDEN, embedding_std=1.0, generator=torch.Generator()
    )
    encoder = MediaEncoder(tower, create_pool("keep"), projector, trainable=True)
    return PlaitModel(TextModel(whole), {"qwen3_vl": encoder}).eval()


@pytest.fixture(scope="module")
def layout(ours: PlaitModel, reference: Any) -> Qwen3VLLayout:
    return Qwen3VLLayout(ours.media_encoder("qwen3_vl"), reference.config)


def picture(height: int, width: int) -> Image:
    values = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image(values)


def sample(answer: str, *parts: str | Image) -> Sample:
    asked = tuple(Text(part) if isinstance(part, str) else part for part in parts)
    return Sample((Message("user", asked), Message("assistant", (Text(answer),))))


SAMPLES = {
    "picture": sample("a disc", picture(40, 70)),
    "text after the picture": sample("a red bar", picture(33, 64), "what shape is it ?"),
    "no picture": sample("blue", "the colour of a big cross"),
    "two pictures": sample("the disc", "see", picture(64, 30), "and", picture(24, 57), "which ?"),
    "neighbours": sample("green", picture(17, 25), picture(41, 16)),
}


def load(model: PlaitModel, document: Document) -> list[ItemInputs]:
    encoder = model.media_encoder("qwen3_vl").encoder
    return [ItemInputs(encoder.process(item.part.decode())) for item in document.items]


def rendered(
    ours: PlaitModel, layout: Any, tokenizer: Any, samples: Sequence[Sample], prompt: bool = False
) -> tuple[list[Document], list[list[ItemInputs]]]:
    documents = [render(made, tokenizer, layout, prompt) for made in samples]
    for document in documents:
        check_placeholders(document, layout.placeholder_id)
    return documents, [load(ours, document) for document in documents]


def forward(reference: Any, document: Document, inputs: list[ItemInputs], **options: Any) -> Any:
    """Transformers' own reading of one document: it merges, places and masks by itself."""
    ids = torch.from_numpy(document.token_ids)[None]
    held = [item.inputs for item in inputs if item.inputs is not None]
    media = {}
    if held:
        media["pixel_values"] = torch.cat([item["patches"] for item in held])
        media["image_grid_thw"] = torch.stack([item["grid"] for item in held])
    kinds = (ids == reference.config.image_token_id).int()
    reference.model.rope_deltas = None
    with torch.no_grad():
        return reference(
            input_ids=ids, mm_token_type_ids=kinds, output_hidden_states=True, **media, **options
        )


def compute(ours: PlaitModel, stream: TokenStream) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        hidden, _ = ours.hidden(stream)
        return hidden, ours.logits(hidden)


def test_every_position_of_a_packed_row_equals_transformers(
    ours: PlaitModel, layout: Any, tokenizer: Any, reference: Any
) -> None:
    documents, inputs = rendered(ours, layout, tokenizer, list(SAMPLES.values()))
    stream = pack(documents, inputs)
    hidden, logits = compute(ours, stream)
    for name, document, loaded, (start, stop) in zip(
        SAMPLES, documents, inputs, stream.bounds, strict=True
    ):
        expected = forward(reference, document, loaded)
        for made, right in (
            (hidden[start:stop], expected.hidden_states[-1][0]),
            (logits[start:stop], expected.logits[0]),
        ):
            torch.testing.assert_close(
                made, right, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
    assert sum(len(document.items) for document in documents) == 6


def test_the_row_is_the_one_qwen_writes(ours: PlaitModel, layout: Any, tokenizer: Any) -> None:
    (document,), _ = rendered(ours, layout, tokenizer, [SAMPLES["two pictures"]])
    first, second = (item.plan.length for item in document.items)
    text = (
        "<|im_start|>user\nsee<|vision_start|>" + first * "<|image_pad|>" + "<|vision_end|>and"
        "<|vision_start|>" + second * "<|image_pad|>" + "<|vision_end|>which ?<|im_end|>\n"
        "<|im_start|>assistant\nthe disc<|im_end|>"
    )
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert document.token_ids[: len(ids)].tolist() == ids


def test_deeper_features_matter_and_reach_their_own_positions(
    ours: PlaitModel, layout: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents, inputs = rendered(ours, layout, tokenizer, list(SAMPLES.values()))
    right, _ = compute(ours, pack(documents, inputs))
    monkeypatch.setattr(Deeper, "joined", lambda *_: None)
    without, _ = compute(ours, pack(documents, inputs))
    stream = pack(documents, inputs)
    start, stop = stream.bounds[2]
    changed = (right - without).abs().amax(1) > 1e-3
    assert changed[stream.is_media].all() and not changed[start:stop].any()


class First(nn.Module):
    """A pool that keeps the first of an encoder's deeper layers."""

    def __init__(self, kept: int) -> None:
        super().__init__()
        self.kept, self.keep = kept, create_pool("keep")

    def forward(self, encoded: Encoded) -> Encoded:
        made: Encoded = self.keep(encoded)
        return replace(made, layers=made.layers[: self.kept])


def test_encoders_with_more_and_fewer_deeper_layers_share_a_row(
    ours: PlaitModel, layout: Any, tokenizer: Any
) -> None:
    """Each document reads as it does alone, whichever encoder comes first in the model."""
    whole = ours.media_encoder("qwen3_vl")
    encoders = {"qwen3_vl": whole} | {
        f"first {kept}": MediaEncoder(whole.encoder, First(kept), whole.projector, trainable=True)
        for kept in (0, 1)
    }
    model = PlaitModel(ours.backbone, encoders).eval()
    made = [sample("a", picture(40, 70), "and"), sample("b", "see", picture(33, 64), "this")]
    drawn, inputs = rendered(ours, layout, tokenizer, made)
    names = ["first 1", "qwen3_vl", "first 0", "first 1", "qwen3_vl"]
    documents = [_read_by(name, drawn[number % 2]) for number, name in enumerate(names)]
    loaded = [inputs[number % 2] for number in range(len(names))]
    stream = pack(documents, loaded)
    together, _ = compute(model, stream)
    alone = [compute(model, pack([d], [i]))[0] for d, i in zip(documents, loaded, strict=True)]
    for (start, stop), expected in zip(stream.bounds, alone, strict=True):
        torch.testing.assert_close(together[start:stop], expected, rtol=1e-5, atol=1e-5)
    for fewer, more in ((2, 0), (0, 4), (3, 1)):  # the same picture, read by fewer of the layers
        assert (alone[more] - alone[fewer]).abs().max() > 1e-3


def _read_by(encoder: str, document: Document) -> Document:
    spans = tuple(replace(span, encoder=encoder) for span in document.spans)
    plans = [replace(item.plan, encoder=encoder) for item in document.items]
    items = zip(document.items, plans, strict=True)
    return replace(
        document, spans=spans, items=tuple(replace(item, plan=plan) for item, plan in items)
    )


def test_decoding_through_our_cache_equals_transformers(
    ours: PlaitModel, layout: Any, tokenizer: Any, reference: Any
) -> None:
    """Packed prompts of which some are continued twice; three steps, of one token and of two."""
    prompts, inputs = rendered(ours, layout, tokenizer, list(SAMPLES.values()), prompt=True)
    copies = [1, 2, 1, 2, 1]
    continuation = Branches(ours, layout, prompts, inputs, copies, room=4)
    sequences = [p for p, n in enumerate(copies) for _ in range(n)]
    with torch.no_grad():
        steps = [ours.logits(continuation.last_hidden())]
        pushed = [[[10 + s] for s in range(7)], [[30 + s, 50 + s] for s in range(7)]]
        for tokens in pushed:
            steps.append(ours.logits(continuation.push(tokens, range(7))))
    for sequence, number in enumerate(sequences):
        expected = forward(reference, prompts[number], inputs[number], use_cache=True)
        near = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(steps[0][sequence], expected.logits[0, -1], **near)
        for made, tokens in zip(steps[1:], pushed, strict=True):
            count = len(tokens[sequence])
            with torch.no_grad():
                expected = reference(
                    input_ids=torch.tensor([tokens[sequence]]),
                    past_key_values=expected.past_key_values,
                    use_cache=True,
                )
            mine = made[sequence * count : (sequence + 1) * count]
            torch.testing.assert_close(mine, expected.logits[0], **near)


def test_packing_changes_neither_losses_nor_gradients(
    ours: PlaitModel, layout: Any, tokenizer: Any
) -> None:
    """Through the deeper features into the tower as well."""
    documents, inputs = rendered(ours, layout, tokenizer, list(SAMPLES.values()))
    found = []
    apart = [pack([d], [i]) for d, i in zip(documents, inputs, strict=True)]
    for streams in ([pack(documents, inputs)], apart):
        ours.zero_grad()
        losses = [ours.compute(stream) for stream in streams]
        for sums in losses:
            sums.loss.backward()  # type: ignore[no-untyped-call]
        parts = {name: p.grad.clone() for _, name, p in ours.trainable() if p.grad is not None}
        found.append((torch.tensor([x for s in losses for x, _ in s.documents]), parts))
    (packed, packed_parts), (alone, alone_parts) = found
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=0)
    assert packed_parts.keys() == alone_parts.keys()
    assert any("deepstack" in name for name in alone_parts)
    whole = torch.cat([part.flatten() for part in alone_parts.values()])
    difference = torch.cat([(packed_parts[n] - p).flatten() for n, p in alone_parts.items()])
    assert difference.norm() <= 1e-5 * whole.norm()


def test_sampling_bans_the_marks_and_says_the_trainers_logprobs(
    ours: PlaitModel, layout: Any, tokenizer: Any
) -> None:
    prompts, inputs = rendered(ours, layout, tokenizer, list(SAMPLES.values()), prompt=True)
    settings = SamplerSettings(max_tokens=5, temperature=1.0, stop=(), seed=3)
    rows = generate(ours, tokenizer, layout, prompts, inputs, settings, samples=2)
    for number, made in enumerate(rows):
        for row in made:
            assert not set(row.tokens) & layout.banned_ids and max(row.tokens) < len(tokenizer)
            told = _with_answer(prompts[number], row.tokens, layout)
            with torch.no_grad():
                sums = ours.compute(pack([told], [inputs[number]]))
            assert row.logprobs == pytest.approx(sums.logprobs.tolist(), abs=1e-4)


@pytest.mark.parametrize("chunk", [1, 5])
def test_chunks_of_a_prompt_keep_their_deeper_features(
    ours: PlaitModel, layout: Any, tokenizer: Any, chunk: int
) -> None:
    """Beside chunks of others that have none, and samples that grow; beginnings are shared."""
    beginning = [picture(48, 64), "what shape is the big yellow cross ?"]
    more = [sample("", *beginning, end) for end in ("a disc", "the bar", picture(24, 57))]
    prompts, inputs = rendered(ours, layout, tokenizer, [*SAMPLES.values(), *more], prompt=True)
    settings = SamplerSettings(max_tokens=4, temperature=1.0, stop=(), seed=3)
    expected = [
        generate(ours, tokenizer, layout, [prompt], [loaded], settings, samples=2)[0]
        for prompt, loaded in zip(prompts, inputs, strict=True)
    ]
    sampler = Sampler(ours.backbone, chunk=chunk)
    made: dict[int, list[Generated]] = {}
    for number, (prompt, loaded) in enumerate(zip(prompts, inputs, strict=True)):
        request = Request(ours, tokenizer, layout, prompt, loaded, settings, samples=2)
        sampler.add(request, lambda rows, _, number=number: made.update({number: rows}), fail)
    sampler.run()
    for number, rows in enumerate(expected):
        for mine, right in zip(made[number], rows, strict=True):
            assert mine.tokens == right.tokens
            assert mine.logprobs == pytest.approx(right.logprobs, abs=1e-5)


def fail(error: BaseException) -> None:
    raise error


def _with_answer(prompt: Document, tokens: list[int], layout: Any) -> Document:
    """The training document of a prompt and these tokens, placed by the layout."""
    whole = np.concatenate([prompt.token_ids, np.array(tokens)])
    plans = [item.plan for item in prompt.items]
    weights = np.zeros(len(whole) - 1, dtype=np.float32)
    weights[prompt.length - 1 :] = 1
    return Document(
        token_ids=whole[:-1],
        targets=whole[1:],
        weights=weights,
        positions=layout.positions(whole, prompt.spans, plans)[:, :-1],
        spans=prompt.spans,
        items=prompt.items,
    )

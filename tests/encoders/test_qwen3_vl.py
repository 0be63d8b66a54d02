"""Tower and layout of a tiny random Qwen3-VL equal transformers'."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2VLImageProcessor, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from plait.encoders.layouts.qwen3_vl import Qwen3VLLayout
from plait.encoders.media_encoder import MediaEncoder
from plait.encoders.projectors import create_pool, create_projector
from plait.encoders.qwen3_vl.encoder import Qwen3VLVision
from plait.errors import MediaError, ModelError, Origin
from plait.modalities import Image
from plait.stream import Fill, ItemPlan, Layout, Span

SHAPES = [(40, 70), (64, 64), (100, 30)]
IMAGE, VIDEO, START, END = 90, 91, 92, 93


@pytest.fixture(scope="module")
def model() -> Any:
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": 96,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 1, 1],
            },
        },
        vision_config={
            "depth": 4,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "out_hidden_size": 16,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [1, 2],
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    torch.manual_seed(0)
    return Qwen3VLForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def encoder(model: Any) -> MediaEncoder:
    processor = Qwen2VLImageProcessor(
        patch_size=4, merge_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    )
    tower = Qwen3VLVision(copy.deepcopy(model.model.visual), processor)
    projector = create_projector(
        "identity", tower.width, 16, embedding_std=1.0, generator=torch.Generator()
    )
    return MediaEncoder(tower, create_pool("keep"), projector).eval()


def test_features_equal_the_models_tower(
    model: Any, encoder: MediaEncoder, make_picture: Any
) -> None:
    arrays = [make_picture(*shape, seed) for seed, shape in enumerate(SHAPES)]
    inputs = [encoder.encoder.process(array) for array in arrays]
    together = encoder.project(encoder.features(inputs))
    for array, item, made in zip(arrays, inputs, together, strict=True):
        with torch.no_grad():
            out = model.model.visual(item["patches"], grid_thw=item["grid"][None])
        torch.testing.assert_close(made.embeddings, out.pooler_output, rtol=1e-5, atol=1e-5)
        assert len(made.layers) == len(out.deepstack_features) == 2
        for layer, expected in zip(made.layers, out.deepstack_features, strict=True):
            torch.testing.assert_close(layer, expected, rtol=1e-5, atol=1e-5)
        plan = encoder.plan(Image(array), Origin())
        assert made.grid == plan.grid and len(made.embeddings) == plan.length
        assert not plan.bidirectional


def row(grids: list[tuple[int, int, int]], texts: list[int]) -> tuple[Any, list[Span], list[Any]]:
    """Text of texts[0] tokens, a picture, text of texts[1] tokens, and so on."""
    ids: list[int] = [5] * texts[0]
    spans, plans = [], []
    for number, (grid, length) in enumerate(zip(grids, texts[1:], strict=True)):
        cells = int(np.prod(grid))
        ids.append(START)
        spans.append(Span(len(ids), cells, "qwen3_vl", number))
        plans.append(ItemPlan("qwen3_vl", cells, grid))
        ids += [IMAGE] * cells + [END] + [7] * length
    return np.array(ids, dtype=np.int64), spans, plans


@pytest.mark.parametrize(
    ("grids", "texts"),
    [
        ([], [5]),
        ([(1, 3, 4)], [3, 4]),
        ([(1, 5, 2)], [0, 0]),
        ([(1, 2, 2), (1, 7, 3)], [2, 0, 6]),
        ([(1, 1, 1), (1, 2, 9), (1, 4, 4)], [1, 3, 0, 2]),
    ],
)
def test_positions_equal_transformers(
    model: Any, encoder: MediaEncoder, grids: list[tuple[int, int, int]], texts: list[int]
) -> None:
    layout = Qwen3VLLayout(encoder, model.config)
    ids, spans, plans = row(grids, texts)
    made = layout.positions(ids, spans, plans)
    patches = torch.tensor([(t, 2 * h, 2 * w) for t, h, w in grids]).reshape(-1, 3)
    tokens = torch.from_numpy(ids)[None]
    expected, delta = model.model.get_rope_index(
        tokens, (tokens == IMAGE).int(), patches if len(patches) else None
    )
    assert np.array_equal(made, expected[:, 0].numpy())
    assert layout.decode_position(made) == len(ids) + int(delta)


def test_pieces_and_banned_ids(model: Any, encoder: MediaEncoder, make_picture: Any) -> None:
    layout = Qwen3VLLayout(encoder, model.config)
    assert isinstance(layout, Layout)
    ((_, plan),) = layout.plan(Image(make_picture(40, 70)), Origin())
    assert layout.pieces([plan]) == ["<|vision_start|>", Fill(plan.length), "<|vision_end|>"]
    assert layout.placeholder_id == IMAGE
    assert layout.banned_ids == {IMAGE, VIDEO, START, END}
    wrong = [Span(0, 3, "qwen3_vl", 0)]
    with pytest.raises(ModelError, match="4 cells"):
        layout.positions(np.zeros(3, dtype=np.int64), wrong, [ItemPlan("e", 4, (1, 2, 2))])


def test_a_strip_is_refused_with_its_row(encoder: MediaEncoder, make_picture: Any) -> None:
    with pytest.raises(MediaError, match=r"aspect ratio.*dataset d, row 2, file"):
        encoder.plan(Image(make_picture(1, 300)), Origin("d", 2))

"""A tokenizer with the special tokens of chat models, templates, and layouts without models."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from plait.encoders.layouts.qwen3_vl import Qwen3VLLayout
from plait.errors import Origin
from plait.modalities import Image, MediaPart
from plait.stream import Fill, IntArray, ItemPlan, Span

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe brief<|im_end|>\n' }}"
    "{% endif %}" + CHATML
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{{ '\n' }}{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TINY = (
    "{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% else %} : {% endif %}{% endfor %}"
)
TEMPLATES = {"chatml": CHATML, "system": SYSTEM, "marked": MARKED, "tiny": TINY}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"]


@pytest.fixture
def tokenizer(tiny_language: Path) -> Any:
    """Ends turns with <|im_end|>; a test sets its chat template."""
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(tiny_language)
    made.add_special_tokens({"additional_special_tokens": SPECIAL})
    made.eos_token = "<|im_end|>"
    made.chat_template = CHATML
    return made


@dataclass
class Grids:
    """A layout of pictures: as many positions as cells of 8 x 8 pixels, in rows between texts."""

    placeholder_id: int = -1
    banned_ids: frozenset[int] = frozenset()
    bidirectional: bool = False
    by_row: bool = False

    def plan(self, part: MediaPart, origin: Origin) -> Sequence[tuple[MediaPart, ItemPlan]]:
        del origin
        assert isinstance(part, Image)
        header = part.header()
        grid = (1, header.height // 8, header.width // 8)
        return [(part, ItemPlan("grids", int(np.prod(grid)), grid, self.bidirectional))]

    def pieces(self, plans: Sequence[ItemPlan]) -> Sequence[str | Fill]:
        (plan,) = plans
        if not self.by_row:
            return ["[", Fill(plan.length), "]"]
        return [piece for _ in range(plan.grid[1]) for piece in (Fill(plan.grid[2]), "\n")]

    def positions(
        self, token_ids: IntArray, spans: Sequence[Span], plans: Sequence[ItemPlan]
    ) -> IntArray:
        del spans, plans
        return np.arange(len(token_ids))

    def decode_position(self, positions: IntArray) -> int:
        return int(positions[-1]) + 1


@pytest.fixture
def grids() -> type[Grids]:
    return Grids


@pytest.fixture
def qwen_layout(tokenizer: Any) -> Qwen3VLLayout:
    """The real layout over an encoder that only plans."""
    ids = tokenizer.convert_tokens_to_ids
    config = SimpleNamespace(
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<unk>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    planner: Any = SimpleNamespace(
        encoder=SimpleNamespace(medium="image"),
        plan=lambda part, origin: Grids().plan(part, origin)[0][1],
    )
    return Qwen3VLLayout(planner, config)


@pytest.fixture
def templates() -> dict[str, str]:
    return TEMPLATES


def picture(rows: int, columns: int) -> Image:
    return Image(np.zeros((8 * rows, 8 * columns, 3), dtype=np.uint8))


@pytest.fixture
def make_picture() -> Any:
    """A picture of rows x columns positions."""
    return picture

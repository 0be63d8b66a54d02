"""What the step benchmarks train: rows with cached features, and a model that reads them.

Shape letters: T tokens of a row, N positions of a picture, C channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from plait.encoders import attention
from plait.encoders.base import Encoder, Grid
from plait.encoders.media_encoder import MediaEncoder
from plait.encoders.projectors import KeepGrid, create_projector
from plait.modalities import Image
from plait.stream import Document, Encoded, Item, ItemInputs, ItemPlan, Span
from plait.trainer.lora import add_lora
from plait.trainer.model import PlaitModel
from plait.trainer.spec import LoraSpec

PICTURE = -1
"""Stands in `Row.ids` where a picture's features go."""

_PICTURE = Image(np.zeros((1, 1, 3), dtype=np.uint8))


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """Token ids (T,), which of them are learned (T,), and each picture's features (N, C)."""

    ids: NDArray[np.int64]
    learned: NDArray[np.bool_]
    pictures: tuple[Tensor, ...]


Batch = list[Row]


class CachedFeatures(Encoder):
    """A frozen tower whose features are all cached, so that it never runs."""

    medium = "image"

    def __init__(self, width: int) -> None:
        super().__init__("cached")
        self.width = width
        self.nothing = nn.Parameter(torch.empty(0))

    def plan(self, header: Any) -> Grid:
        raise NotImplementedError(header)

    def process(self, array: NDArray[np.uint8]) -> dict[str, Tensor]:
        raise NotImplementedError(array.shape)

    def forward(self, inputs: Sequence[Mapping[str, Tensor]]) -> list[Encoded]:
        raise NotImplementedError(len(inputs))

    def processing(self) -> str:
        return ""


def build(language: Any, channels: int) -> PlaitModel:
    """A model of `language` with a LoRA adapter whose every factor has a gradient, training."""
    attention.register()
    language.requires_grad_(False)
    add_lora(language, language.get_output_embeddings(), LoraSpec(rank=16), seed=0)
    embedding = language.get_input_embeddings().weight
    draws = torch.Generator(embedding.device).manual_seed(0)
    for name, parameter in language.named_parameters():
        if "lora_B" in name:  # zeros at the start, which would hide lora_A's gradient
            nn.init.normal_(parameter, std=0.01, generator=draws)
    generator = torch.Generator().manual_seed(0)
    projector = create_projector(
        "mlp", channels, embedding.shape[1],
        embedding_std=float(embedding.std()), generator=generator,
    )  # fmt: skip
    encoder = MediaEncoder(CachedFeatures(channels), KeepGrid(), projector)
    return PlaitModel(language, {"cached": encoder.to(embedding.device)}).train()


def document(row: Row) -> tuple[Document, list[ItemInputs]]:
    """A row as the renderer would give it, with its cached features."""
    spans, items, start = [], [], int((row.ids == PICTURE).argmax())
    for number, picture in enumerate(row.pictures):
        length = len(picture)
        spans.append(Span(start, length, "cached", number))
        items.append(Item(_PICTURE, ItemPlan("cached", length, (1, 1, length))))
        start += length
    learned = row.learned[1:]
    made = Document(
        token_ids=row.ids[:-1],
        targets=np.where(learned, row.ids[1:], 0),
        weights=learned.astype(np.float32),
        positions=np.arange(len(row.ids) - 1),
        spans=tuple(spans),
        items=tuple(items),
    )
    return made, [ItemInputs(features=Encoded(picture)) for picture in row.pictures]

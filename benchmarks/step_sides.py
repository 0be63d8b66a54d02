"""The two sides of `benchmarks.step`: one training step, packed by us or padded as usual.

Both read the same module: the language model with its adapter, and the projector. Only the
attention implementation is switched. Shape letters: B rows of a batch, L its longest, C channels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from benchmarks.step_rows import PICTURE, Batch, Row
from plait.datasets.packing import Unit, best_fit
from plait.encoders import attention
from plait.encoders.base import Encoder, Grid
from plait.encoders.media_encoder import MediaEncoder
from plait.encoders.projectors import KeepGrid, create_projector
from plait.modalities import Image
from plait.stream import Document, Encoded, Item, ItemInputs, ItemPlan, Span, pack
from plait.trainer.lora import add_lora
from plait.trainer.model import PlaitModel
from plait.trainer.spec import LoraSpec

IGNORED = -100
"""The label that transformers' loss leaves out."""

_PICTURE = Image(np.zeros((1, 1, 3), dtype=np.uint8))


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
    generator = torch.Generator().manual_seed(0)
    for name, parameter in language.named_parameters():
        if "lora_B" in name:  # zeros at the start, which would hide lora_A's gradient
            nn.init.normal_(parameter, std=0.01, generator=generator)
    embedding = language.get_input_embeddings().weight
    projector = create_projector(
        "mlp", channels, embedding.shape[1],
        embedding_std=float(embedding.std()), generator=generator,
    )  # fmt: skip
    encoder = MediaEncoder(CachedFeatures(channels), KeepGrid(), projector)
    return PlaitModel(language, {"cached": encoder}).train()


class Packed:
    """Our step: the batch's samples in as few rows of `capacity` positions as best fit finds."""

    def __init__(self, model: PlaitModel, batch: Batch, capacity: int) -> None:
        self.model, self.capacity = model, capacity
        self.batch = batch

    def __call__(self) -> float:
        """The mean loss of a learned token, its gradients left on the model."""
        self.model.zero_grad(set_to_none=True)
        if self.model.language.config._attn_implementation != attention.NAME:
            self.model.language.set_attn_implementation(attention.NAME)
        samples = [_document(row) for row in self.batch]
        weight = sum(float(document.weights.sum()) for document, _ in samples)
        units = [Unit((at,), document.length) for at, (document, _) in enumerate(samples)]
        loss = 0.0
        for keys in best_fit(units, capacity=self.capacity):
            chosen = [samples[key] for key in keys]
            stream = pack([document for document, _ in chosen], [inputs for _, inputs in chosen])
            part = self.model.compute(stream).loss / weight
            part.backward()  # type: ignore[no-untyped-call]
            loss += float(part.detach())
        return loss


class Padded:
    """The peer's step: transformers' own forward and loss on rows padded to the longest."""

    def __init__(self, model: PlaitModel, batch: Batch) -> None:
        self.model, self.batch = model, batch

    def __call__(self) -> float:
        """The mean loss of a learned token, its gradients left on the model."""
        self.model.zero_grad(set_to_none=True)
        language = self.model.language
        if language.config._attn_implementation != "sdpa":
            language.set_attn_implementation("sdpa")
        ids = _padded([torch.from_numpy(row.ids) for row in self.batch], 0)
        learned = _padded([torch.from_numpy(row.learned) for row in self.batch], False)
        mask = _padded([torch.ones(len(row.ids), dtype=torch.long) for row in self.batch], 0)
        embeddings = language.get_input_embeddings()(ids.clamp(min=0))
        features = [Encoded(part) for row in self.batch for part in row.pictures]
        if features:
            projected = self.model.media_encoder("cached").project(features)
            rows = torch.cat([item.embeddings for item in projected])
            embeddings = embeddings.index_put(torch.where(ids == PICTURE), rows)
        loss = language(
            inputs_embeds=embeddings,
            attention_mask=mask,
            labels=ids.masked_fill(~learned, IGNORED),
            use_cache=False,
        ).loss
        loss.backward()
        return float(loss.detach())


def gradients(model: PlaitModel) -> Tensor:
    """Every trainable parameter's gradient as one float64 vector."""
    parts = [p.grad for _, _, p in model.trainable() if p.grad is not None]
    return torch.cat([part.double().flatten() for part in parts])


def _padded(rows: list[Tensor], value: float) -> Tensor:
    """(B, L), padded on the right."""
    return pad_sequence(rows, batch_first=True, padding_value=value)


def _document(row: Row) -> tuple[Document, list[ItemInputs]]:
    """A row as the renderer would give it, with its cached features."""
    spans, items, start = [], [], int((row.ids == PICTURE).argmax())
    for number, picture in enumerate(row.pictures):
        length = len(picture)
        spans.append(Span(start, length, "cached", number))
        items.append(Item(_PICTURE, ItemPlan("cached", length, (1, 1, length))))
        start += length
    learned = row.learned[1:]
    document = Document(
        token_ids=row.ids[:-1],
        targets=np.where(learned, row.ids[1:], 0),
        weights=learned.astype(np.float32),
        positions=np.arange(len(row.ids) - 1),
        spans=tuple(spans),
        items=tuple(items),
    )
    return document, [ItemInputs(features=Encoded(picture)) for picture in row.pictures]

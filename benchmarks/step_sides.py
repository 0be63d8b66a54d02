"""The two sides of `benchmarks.step`: one training step, packed by us or padded as usual.

Both read the same module: the language model with its adapter, and the projector. Only the
attention implementation is switched. Shape letters: B rows of a batch, L its longest, C channels.
"""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.step_model import PICTURE, Batch, document
from plait.datasets.packing import Unit, best_fit
from plait.encoders import attention
from plait.stream import Encoded, pack
from plait.trainer.model import PlaitModel

IGNORED = -100
"""The label that transformers' loss leaves out."""


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
        samples = [document(row) for row in self.batch]
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

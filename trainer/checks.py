"""Checked once before a run: packing must change nothing but speed."""

import numpy as np
import torch
from torch import Tensor

from plait.stream import Document, IntArray, Layout, pack
from plait.trainer.build import Built
from plait.trainer.model import PlaitModel

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""Relative difference allowed, by the dtype of the weights: round-off of a deep model, no more.
A model that mixes documents is off by tenths."""

_LENGTHS = (20, 33, 27)


def packing_difference(built: Built, seed: int = 0) -> float:
    """The relative difference of gradients between packed and single documents of random tokens.

    Gradients of all trainable parameters are compared as one vector; the losses too.
    """
    model = built.model
    model.eval()
    documents = _random_documents(built, seed)
    apart = [_loss_and_gradients(model, [document]) for document in documents]
    loss, gradients = _loss_and_gradients(model, documents)
    alone = torch.stack([g for _, g in apart]).sum(0)
    alone_loss = torch.stack([value for value, _ in apart]).sum()
    by_gradient = float((gradients - alone).norm() / alone.norm().clamp(min=1e-30))
    by_loss = float(((loss - alone_loss) / alone_loss).abs())
    return max(by_gradient, by_loss)


def check_packing(built: Built) -> tuple[bool, float]:
    """Whether this model may be packed, and the difference found; switches packing off if not."""
    difference = packing_difference(built)
    allowed = TOLERANCE[built.model.output_weight.dtype]
    built.model.packs = difference <= allowed
    return built.model.packs, difference


def _random_documents(built: Built, seed: int) -> list[Document]:
    generator = np.random.default_rng(seed)
    vocabulary = min(len(built.tokenizer), built.model.output_weight.shape[0])
    return [
        _document(generator.integers(0, vocabulary, length), built.layout) for length in _LENGTHS
    ]


def _document(tokens: IntArray, layout: Layout) -> Document:
    ids = tokens.astype(np.int64)
    return Document(
        token_ids=ids[:-1],
        targets=ids[1:],
        weights=np.ones(len(ids) - 1, dtype=np.float32),
        positions=layout.positions(ids, (), ())[..., :-1],
    )


def _loss_and_gradients(model: PlaitModel, documents: list[Document]) -> tuple[Tensor, Tensor]:
    model.zero_grad(set_to_none=True)
    sums = model.compute(pack(documents, [[] for _ in documents]))
    sums.loss.backward()  # type: ignore[no-untyped-call]
    parts = [p.grad.double().flatten() for _, _, p in model.trainable() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return sums.loss.detach().double(), torch.cat(parts)

"""Checked when a model is built: it computes what transformers does, packed or not."""

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from plait.encoders import attention
from plait.errors import ModelError
from plait.stream import Document, IntArray, Layout, pack
from plait.trainer.model import PlaitModel

if TYPE_CHECKING:
    from plait.trainer.build import Built

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""Relative difference allowed, by the dtype of the weights: round-off of a deep model, no more.
A model that mixes documents is off by tenths."""

LOGITS_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""The same for the norm of the difference of logits, beside the norm of their spread."""

_LENGTHS = (20, 33, 27)


def check(built: "Built") -> None:
    """Check the language model of a run, if none of the runs on it was checked before.

    Raises:
        ModelError: it is not computed as in transformers.
    """
    if built.model.backbone.packing_difference is None:
        check_language(built)
        check_packing(built)


@torch.no_grad()
def check_language(built: "Built") -> None:
    """The logits of a short random text must be those of transformers' own forward.

    This finds what no name in a configuration says: a bias or a scale of the output layer, and
    attention that does not go through ours.

    Raises:
        ModelError: they are not.
    """
    model = built.model
    model.eval()
    [document] = _random_documents(built, seed=0)[:1]
    hidden, _ = model.hidden(pack([document], [[]]))
    theirs = _logits_of_transformers(built, document, "eager")
    spread = (theirs - theirs.mean()).norm()
    difference = float((model.logits(hidden) - theirs).norm() / spread)
    allowed = LOGITS_TOLERANCE[model.output_weight.dtype]
    if not difference <= allowed and model.output_weight.dtype != torch.float32:
        # Of some models 16 bits leave less: what transformers' own two ways differ by is allowed.
        other = _logits_of_transformers(built, document, "sdpa")
        allowed = max(allowed, 2 * float((other - theirs).norm() / spread))
    if not difference <= allowed:
        raise ModelError(
            f"a language model must compute here what it does in transformers; the logits of "
            f"{built.spec.language} differ by {difference:.1e} of their spread (its output layer "
            "or its attention is of another kind); choose another family"
        )


def _logits_of_transformers(built: "Built", document: Document, attention_name: str) -> Tensor:
    """(T, V) in float32, of a plain forward with one of transformers' own attentions.

    Raises:
        ModelError: the family keeps its own.
    """
    language = built.model.language
    language.set_attn_implementation(attention_name)
    if language.config._attn_implementation != attention_name:  # it says so and goes on
        raise ModelError(
            f"a language model's attention must be replaceable, and that of {built.spec.language} "
            "is not; choose another family"
        )
    try:
        ids = torch.from_numpy(document.token_ids)[None].to(built.model.device)
        logits: Tensor = language(input_ids=ids, use_cache=False).logits[0]
        return logits.float()
    finally:
        language.set_attn_implementation(attention.NAME)


def packing_difference(built: "Built", seed: int = 0) -> float:
    """The relative difference between packed and single documents of random tokens.

    Gradients of all trainable parameters are compared as one vector, and so are the logprobs,
    whose difference is taken beside their spread.
    """
    model = built.model
    model.eval()
    documents = _random_documents(built, seed)
    apart = [_logprobs_and_gradients(model, [document]) for document in documents]
    logprobs, gradients = _logprobs_and_gradients(model, documents)
    alone = torch.stack([g for _, g in apart]).sum(0)
    by_gradient = float((gradients - alone).norm() / alone.norm().clamp(min=1e-30))
    single = torch.cat([values for values, _ in apart])
    by_logprob = float((logprobs - single).norm() / (single - single.mean()).norm())
    return max(by_gradient, by_logprob)


def check_packing(built: "Built") -> tuple[bool, float]:
    """Whether this model may be packed, and the difference found; switches packing off if not."""
    backbone = built.model.backbone
    try:
        difference = packing_difference(built)
    except (ValueError, NotImplementedError) as error:
        # Layers that are not attention are told where documents begin; some say that they can
        # only keep them apart with kernels that are not installed here.
        backbone.packing_refusal, difference = str(error), math.inf
    backbone.packs = difference <= TOLERANCE[backbone.output_weight.dtype]
    backbone.packing_difference = difference
    return backbone.packs, difference


def packing_warning(built: "Built") -> str | None:
    """What to tell the user where this model cannot be packed."""
    backbone = built.model.backbone
    if backbone.packs:
        return None
    if backbone.packing_refusal is not None:
        return (
            f"this model cannot read several documents in one row ({backbone.packing_refusal}); "
            "documents run one by one"
        )
    return (
        f"packing changes this model's gradients by {backbone.packing_difference:.1e}; documents "
        "run one by one"
    )


def _random_documents(built: "Built", seed: int) -> list[Document]:
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


def _logprobs_and_gradients(model: PlaitModel, documents: list[Document]) -> tuple[Tensor, Tensor]:
    model.zero_grad(set_to_none=True)
    sums = model.compute(pack(documents, [[] for _ in documents]))
    if sums.loss.requires_grad:  # a model that only samples trains nothing
        sums.loss.backward()  # type: ignore[no-untyped-call]
    parts = [p.grad.double().flatten() for _, _, p in model.trainable() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return sums.logprobs.double(), torch.cat(parts) if parts else torch.zeros(1)

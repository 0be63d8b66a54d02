"""What policy losses say beside their sums: distance from the sampler, and what was clipped."""

from collections.abc import Callable

import torch
from torch import Tensor

from plait.trainer.losses import ratios, terms
from plait.trainer.losses.base import LossBatch

Metrics = Callable[[LossBatch], dict[str, Tensor]]


def divergences(batch: LossBatch) -> dict[str, Tensor]:
    """Two estimates of KL(sampler || model), as sums over the `sampled` tokens of a document.

    `kl_k1` sums q - lp, which is unbiased, `kl_k3` the same with less variance (`terms.k3`).
    Sampled is what has a weight and a sampler's logprob that is not 0: a prompt has none.
    """
    with torch.no_grad():
        sampled = (batch.weights != 0) & (batch.inputs["logprobs"] != 0)
        log_ratio = torch.where(sampled, ratios.log_ratio(batch), 0.0)
        return {
            "sampled": batch.per_document(sampled),
            "kl_k1": batch.per_document(-log_ratio),
            "kl_k3": batch.per_document(terms.k3(log_ratio)),
        }


def with_clipped(log_ratio: Callable[[LossBatch], Tensor]) -> Metrics:
    """Also `clipped`: how many positions that would pull have no gradient by the clip."""

    def metrics(batch: LossBatch) -> dict[str, Tensor]:
        with torch.no_grad():
            clipped = _pulling(batch) & ~ratios.unclipped(log_ratio(batch), batch)
            return divergences(batch) | {"clipped": batch.per_document(clipped)}

    return metrics


def with_truncated(batch: LossBatch) -> dict[str, Tensor]:
    """Also `clipped`: how many positions that pull do so with a ratio that was cut."""
    with torch.no_grad():
        log_ratio = ratios.log_ratio(batch)
        clipped = _pulling(batch) & (ratios.truncated(log_ratio, batch) != log_ratio.exp())
        return divergences(batch) | {"clipped": batch.per_document(clipped)}


def _pulling(batch: LossBatch) -> Tensor:
    return (batch.weights != 0) & (batch.inputs["advantages"] != 0)

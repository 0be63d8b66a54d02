"""Ratios of the model's probabilities to the sampler's, and how they are clipped.

lp is the model's logprob of a token, q the sampler's (input `logprobs`), A the `advantages`,
r = exp(lp - q). Shape letters: P learned positions, D documents.
"""

import torch
from torch import Tensor

from plait.trainer.losses.base import LossBatch

LOW, HIGH = "clip_low_threshold", "clip_high_threshold"
RANGES = {LOW: "[0, inf)", HIGH: "[0, inf)"}


def log_ratio(batch: LossBatch) -> Tensor:
    """(P,): lp - q."""
    return batch.logprobs - batch.inputs["logprobs"]


def sequence_log_ratio(batch: LossBatch) -> Tensor:
    """(P,): each document's mean of lp - q over sequence_ratio_mask, as a constant.

    It is 0 where the mask marks nothing.
    """
    marked = batch.inputs["sequence_ratio_mask"] != 0
    total = batch.per_document(torch.where(marked, log_ratio(batch), 0.0))
    return batch.spread(total / batch.per_document(marked).clamp(min=1))


def clipped_objective(log_ratio: Tensor, batch: LossBatch) -> Tensor:
    """(P,): min(r A, clip(r) A), without a gradient where the clip decides."""
    advantages = batch.inputs["advantages"]
    free = unclipped(log_ratio.detach(), batch)
    # A clipped ratio may overflow, and 0 times its gradient would not be a number.
    ratio = torch.where(free, log_ratio, 0.0).exp()
    bound = torch.where(advantages > 0, batch.config[HIGH], batch.config[LOW])
    return torch.where(free, ratio, bound) * advantages


def unclipped(log_ratio: Tensor, batch: LossBatch) -> Tensor:
    """(P,) bool: where min(r A, clip(r) A) is r A and A is not 0.

    Only a ratio that has already gone too far in the direction of its advantage is clipped.
    """
    ratio, advantages = log_ratio.exp(), batch.inputs["advantages"]
    up = (advantages > 0) & (ratio <= batch.config[HIGH])
    down = (advantages < 0) & (ratio >= batch.config[LOW])
    return up | down


def truncated(log_ratio: Tensor, batch: LossBatch) -> Tensor:
    """(P,): clip(r), as a constant."""
    return log_ratio.detach().exp().clamp(batch.config[LOW], batch.config[HIGH])

"""Interval attention as its definition says, in float64 with a dense mask. Truth for tests.

Shape letters: H query heads, G key heads (H a multiple of G), T queries, S keys, D head size.
"""

import torch
from torch import Tensor


def interval_attention(
    q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """q (H, T, D), k and v (G, S, D) -> out (H, T, D) and lse (H, T), both float64."""
    q, k, v = q.double(), k.double(), v.double()
    repeat = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
    index = torch.arange(k.shape[1])
    hidden = (index < lo[:, None]) | (index >= hi[:, None])
    scores = (q @ k.transpose(1, 2) * scale).masked_fill(hidden, -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)

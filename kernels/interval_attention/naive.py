"""Interval attention as its definition says, in float64 with a dense mask. Truth for tests.

Shape letters: H query heads, G key heads (H a multiple of G), T queries, S keys, D head size.
"""

import torch
from torch import Tensor


def interval_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lo: Tensor,
    hi: Tensor,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """q (H, T, D), k and v (G, S, D) -> out (H, T, D) and lse (H, T), both float64.

    A query with an empty interval gives 0 and -inf.
    """
    q, k, v = q.double(), k.double(), v.double()
    repeat = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
    index = torch.arange(k.shape[1], device=k.device)
    hidden = (index < lo[:, None]) | (index >= hi[:, None])
    scores = q @ k.transpose(1, 2) * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(hidden, -torch.inf)
    empty = hidden.all(-1)
    lse = scores.masked_fill(empty[:, None], 0).logsumexp(-1).masked_fill(empty, -torch.inf)
    weights = (scores - lse.masked_fill(empty, 0)[..., None]).exp()
    return weights @ v, lse

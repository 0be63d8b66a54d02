"""Interval attention on a CPU: tiles of queries through torch's own fused attention.

Shape letters: H query heads, G key heads (H a multiple of G), T queries, S keys, D head size.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from plait.kernels.interval_attention.intervals import Intervals, Tile


def interval_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: Intervals,
    *,
    scale: float | None = None,
    window: int | None = None,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """q (H, T, D), k and v (G, S, D) -> out (H, T, D), and lse (H, T) in float32 when asked.

    Both results are differentiable.

    Args:
        scale: Factor on the scores; 1/sqrt(D) by default.
        window: Sliding window in keys, the query's own included.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    repeat = q.shape[0] // k.shape[0]
    outs, sums = [], []
    for tile in intervals.tiles(window):
        q_tile = q[:, tile.start : tile.stop]
        k_tile = k[:, tile.key_start : tile.key_stop]
        v_tile = v[:, tile.key_start : tile.key_stop]
        outs.append(
            scaled_dot_product_attention(
                q_tile[None],
                k_tile[None],
                v_tile[None],
                attn_mask=tile.mask,
                is_causal=tile.causal,
                scale=scale,
                enable_gqa=repeat > 1,
            )[0]
        )
        if with_lse:
            sums.append(_lse(q_tile, k_tile.repeat_interleave(repeat, 0), tile, scale))
    return torch.cat(outs, 1), torch.cat(sums, 1) if with_lse else None


def _lse(q: Tensor, k: Tensor, tile: Tile, scale: float) -> Tensor:
    scores = (q @ k.transpose(1, 2)).float() * scale
    mask = tile.mask
    if tile.causal:
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.logsumexp(-1)

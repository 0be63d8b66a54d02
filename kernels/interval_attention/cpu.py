"""Interval attention on a CPU: tiles of queries through torch's own fused attention.

Each tile reads only the keys that its queries can see. A cap on scores, and a gradient of lse,
are beyond torch's operator; there a tile is computed by plain matrix products.

Shape letters: H query heads, G key heads, R = H / G, T queries, S keys, t queries and s keys of a
tile, D head size.
"""

from typing import Any

import torch
from torch import Tensor

from plait.kernels.interval_attention.intervals import Intervals, Tile

KEPT_MASK = 1 << 14
"""Places of a mask that is kept: 64 kB in float32."""

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def interval_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: Intervals,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """q (H, T, D), k and v (G, S, D) -> out (H, T, D) and lse (H, T) in float32."""
    # torch's operator reads each head's values one behind another, and does not check.
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    out, lse = _IntervalAttention.apply(q, k, v, intervals, scale, window, softcap)
    return out, lse


class _IntervalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        intervals: Intervals,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        heads, length, size = q.shape
        # Heads lie inside positions, as transformers wants them back.
        out = q.new_empty(length, heads, size).transpose(0, 1)
        lse = q.new_empty(heads, length, dtype=torch.float32)
        lo, hi = intervals.bounds(window)
        for tile in intervals.tiles(window):
            queries, keys = slice(tile.start, tile.stop), slice(tile.key_start, tile.key_stop)
            parts = q[:, queries], k[:, keys], v[:, keys]
            if tile.key_stop == tile.key_start:
                out[:, queries], lse[:, queries] = 0, -torch.inf
            elif softcap is None:
                mask = None if tile.causal else _mask(intervals, tile, window, q.dtype)
                made, sums = _FORWARD(
                    *(part[None] for part in parts),
                    is_causal=tile.causal, attn_mask=mask, scale=scale,
                )  # fmt: skip
                out[:, queries], lse[:, queries] = made[0], sums[0]
            else:
                mask = _mask(intervals, tile, window, torch.float32)
                out[:, queries], lse[:, queries] = _plain(*parts, mask, scale, softcap)
        empty = lo == hi
        if empty.any():  # torch gives them an lse of 0
            lse[:, empty] = -torch.inf
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.intervals, ctx.options = intervals, (scale, window, softcap)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        scale, window, softcap = ctx.options
        grad_out, grad_lse = grads
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        if grad_out.stride(-1) != 1:
            grad_out = grad_out.contiguous()
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # exp(score - lse) is then 0
        grad_q = torch.zeros_like(q)
        # Tiles add to the keys that they share: in float32, whatever the inputs are.
        grad_k, grad_v = (torch.zeros_like(t, dtype=torch.float32) for t in (k, v))
        for tile in ctx.intervals.tiles(window):
            if tile.key_stop == tile.key_start:
                continue
            queries, keys = slice(tile.start, tile.stop), slice(tile.key_start, tile.key_stop)
            above = grad_out[:, queries], out[:, queries], lse[:, queries]
            parts = q[:, queries], k[:, keys], v[:, keys]
            if softcap is None and grad_lse is None:
                mask = None if tile.causal else _mask(ctx.intervals, tile, window, q.dtype)
                d_out, mine, sums = (t[None] for t in above)
                made = _BACKWARD(
                    d_out, *(part[None] for part in parts), mine, sums, 0.0, tile.causal,
                    attn_mask=mask, scale=scale,
                )  # fmt: skip
                d_q, d_k, d_v = (t[0] for t in made)
            else:
                mask = _mask(ctx.intervals, tile, window, torch.float32)
                d_lse = None if grad_lse is None else grad_lse[:, queries]
                d_q, d_k, d_v = _plain_backward(*above, d_lse, *parts, mask, scale, softcap)
            grad_q[:, queries] = d_q
            grad_k[:, keys] += d_k
            grad_v[:, keys] += d_v
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None, None


def _mask(
    intervals: Intervals, tile: Tile, window: int | None, dtype: torch.dtype
) -> Tensor | None:
    """(1, 1, t, s) to add to scores, 0 or -inf; None where every query sees every key.

    A small one is kept for the next layer: in decoding, making masks would take as long as
    reading the keys.
    """
    if tile.full:
        return None
    if (tile.stop - tile.start) * (tile.key_stop - tile.key_start) > KEPT_MASK:
        return _made_mask(tile, *intervals.bounds(window), dtype)
    return intervals.keep(
        (tile, window, dtype), lambda: _made_mask(tile, *intervals.bounds(window), dtype)
    )


def _made_mask(tile: Tile, lo: Tensor, hi: Tensor, dtype: torch.dtype) -> Tensor:
    """Only the columns that some query does not see are compared."""
    queries = slice(tile.start, tile.stop)
    mask = torch.zeros(tile.stop - tile.start, tile.key_stop - tile.key_start, dtype=dtype)
    left, right = tile.full_lo, tile.full_hi
    if left >= right:
        left = right = tile.key_stop
    for start, stop in ((tile.key_start, left), (right, tile.key_stop)):
        key = torch.arange(start, stop)
        hidden = (key < lo[queries, None]) | (key >= hi[queries, None])
        mask[:, start - tile.key_start : stop - tile.key_start].masked_fill_(hidden, -torch.inf)
    return mask[None, None]


def _scores(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """q (G, R t, D), k (G, s, D) -> scores (G, R, t, s), and the slope of the cap there."""
    scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale)
    slope = None
    if softcap is not None:
        bent = scores.div_(softcap).tanh_()
        slope = 1 - bent.square()
        scores = bent * softcap
    if mask is None:
        return scores, slope
    rows = scores.view(len(q), -1, *mask.shape[2:])
    return rows.add_(mask[0, 0]).view_as(scores), slope


def _by_group(rows: Tensor, groups: int) -> Tensor:
    """(H, t, D) -> (G, R t, D) in float32."""
    return rows.float().reshape(groups, -1, rows.shape[-1])


def _plain(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """A tile by matrix products: out (H, t, D) and lse (H, t) in float32."""
    scores, _ = _scores(_by_group(q, len(k)), k.float(), mask, scale, softcap)
    lse = scores.logsumexp(-1, keepdim=True)
    weights = scores.sub_(lse.masked_fill(lse == -torch.inf, torch.inf)).exp_()
    return torch.bmm(weights, v.float()).view(q.shape), lse.view(q.shape[:2])


def _plain_backward(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q (H, t, D), k and v (G, s, D) of a tile, in float32."""
    groups = len(k)
    rows, d_out = _by_group(q, groups), _by_group(grad_out, groups)
    scores, slope = _scores(rows, k.float(), mask, scale, softcap)
    weights = scores.sub_(lse.reshape(groups, -1, 1)).exp_()
    delta = (grad_out.float() * out.float()).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    d_scores = torch.bmm(d_out, v.float().transpose(1, 2)).sub_(delta.reshape(groups, -1, 1))
    d_scores.mul_(weights).mul_(scale)
    if slope is not None:
        d_scores.mul_(slope)
    d_v = torch.bmm(weights.transpose(1, 2), d_out)
    d_k = torch.bmm(d_scores.transpose(1, 2), rows)
    return torch.bmm(d_scores, k.float()).view(q.shape), d_k, d_v

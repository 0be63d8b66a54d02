"""Causal documents through torch's own FlashAttention, where nothing but their order matters.

A vendor's kernel knows no groups, no cap and no gradient of lse. Its backward pass adds in no
fixed order, so that repetitions differ in their last bits: it is taken only where it is asked for.

Shape letters: H query heads, G key heads, T positions, D head size.
"""

from typing import Any

import torch
from torch import Tensor

from plait.kernels.interval_attention.intervals import Intervals


def refusal(
    q: Tensor, k: Tensor, intervals: Intervals, window: int | None, softcap: float | None
) -> str | None:
    """Why torch's kernel cannot compute this attention; None where it can."""
    if q.device.type != "cuda" or q.dtype not in (torch.bfloat16, torch.float16):
        return f"it reads halves on a GPU, and these are {q.dtype} on {q.device}"
    if softcap is not None:
        return "it knows no cap on scores"
    if q.shape[-1] > 256 or q.shape[-1] % 8:
        return f"it reads heads of multiples of 8 up to 256; these have {q.shape[-1]}"
    if k.shape[1] != intervals.length or intervals.documents() is None:
        return "it reads causal documents alone, without groups and without a cache"
    del window
    return None


def interval_attention(
    q: Tensor, k: Tensor, v: Tensor, intervals: Intervals, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """q (H, T, D), k and v (G, T, D) -> out (H, T, D) and lse (H, T), which has no gradient."""
    repeat = len(q) // len(k)
    k, v = (t.repeat_interleave(repeat, 0) if repeat > 1 else t for t in (k, v))
    rows = (t.transpose(0, 1).contiguous() for t in (q, k, v))
    out, lse = _Flash.apply(*rows, intervals.documents(), scale, window)
    return out.transpose(0, 1), lse


class _Flash(torch.autograd.Function):
    """q, k, v (T, H, D)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        documents: tuple[Tensor, int],
        scale: float,
        window: int | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        starts, longest = documents
        ctx.options = {"scale": scale}
        if window is not None:
            ctx.options |= {"window_size_left": window - 1, "window_size_right": 0}
        out, lse, state, unused, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, starts, starts, longest, longest, 0.0, True, False, **ctx.options
        )
        ctx.save_for_backward(q, k, v, out, lse, starts, state, unused)
        ctx.longest = longest
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, starts, state, unused = ctx.saved_tensors
        grad_out, grad_lse = grads
        if grad_lse is not None:
            raise RuntimeError(
                "the attention route 'flash' gives no gradient of lse, and one was asked for; use "
                "the route auto"
            )
        if grad_out is None:
            return (None,) * 6
        made = torch.ops.aten._flash_attention_backward(
            grad_out.contiguous(), q, k, v, out, lse, starts, starts, ctx.longest, ctx.longest,
            0.0, True, state, unused, **ctx.options,
        )  # fmt: skip
        return (*made, None, None, None)

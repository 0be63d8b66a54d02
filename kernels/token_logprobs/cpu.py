"""Token logprobs in chunks of positions: forward saves only the log-sum-exp, backward recomputes.

Shape letters: T positions, H hidden size, V vocabulary, C positions of a chunk.
"""

from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 64 << 20
"""Float32 logits held at once; a quarter of it stays in the cache of a large CPU."""


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """hidden (T, H), weight (V, H), targets (T,) -> logprobs (T,) in float32.

    Differentiable in `hidden` and, where it requires a gradient, in `weight`. A `bias` (V,) is
    frozen.
    """
    if bias is not None and bias.requires_grad:
        raise ValueError("the output bias must be frozen; call bias.requires_grad_(False)")
    result: Tensor = _TokenLogprobs.apply(hidden, weight, targets, bias, softcap)
    return result


def _chunks(length: int, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK_BYTES // (4 * vocabulary))
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    return logits if softcap is None else softcap * (logits / softcap).tanh()


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        softcap: float | None,
    ) -> Tensor:
        logprobs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        lse = torch.empty_like(logprobs)
        for chunk in _chunks(len(hidden), len(weight)):
            logits = _logits(hidden[chunk], weight, bias, softcap)
            lse[chunk] = logits.logsumexp(-1)
            logprobs[chunk] = logits.gather(-1, targets[chunk, None])[:, 0] - lse[chunk]
        ctx.save_for_backward(hidden, weight, targets, bias, lse)
        ctx.softcap = softcap
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, bias, lse = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for chunk in _chunks(len(hidden), len(weight)):
            logits = _logits(hidden[chunk], weight, bias, ctx.softcap)
            grad = (logits - lse[chunk, None]).exp_().neg_()
            grad[torch.arange(len(grad)), targets[chunk]] += 1
            grad *= grads[0][chunk, None]
            if ctx.softcap is not None:
                grad *= 1 - (logits / ctx.softcap) ** 2
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[chunk] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.T @ hidden[chunk]
        return grad_hidden, grad_weight, None, None, None

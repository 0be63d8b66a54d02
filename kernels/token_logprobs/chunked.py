"""The two differentiable functions: chunks of positions through a head, gradients on demand.

`Scores` does not know its loss in the forward pass. It saves the log-sum-exp and recomputes the
logits in the backward pass, with one exception: where the weight is frozen and one logprob a
position is all that was asked, the gradient by a position's hidden state is the incoming number
times a vector that is known in the forward pass, so that vector is saved and nothing is recomputed.
`WeightedNll` knows its loss and takes the gradients while it holds the logits.

Shape letters: T positions, H hidden size, V vocabulary, K targets of a position, C of a chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from plait.kernels.token_logprobs.head import Head, HeadFactory, Shaping, Slopes


@dataclass(frozen=True)
class Wanted:
    """What a call computes, and with which head."""

    head: HeadFactory
    shaping: Shaping
    hidden_gradient: bool
    weight_gradient: bool
    entropy: bool = False
    top_k: int = 0

    def ahead(self, targets: Tensor) -> bool:
        """Whether the direction of each position's gradient is known before its size is."""
        only_one = targets.shape[1] == 1 and not self.entropy and not self.top_k
        return only_one and self.hidden_gradient and not self.weight_gradient


def chunks(length: int, rows: int) -> Iterator[slice]:
    """Consecutive slices of at most `rows` positions."""
    for start in range(0, length, rows):
        yield slice(start, min(start + rows, length))


class Scores(torch.autograd.Function):
    """targets (T, K) -> logprobs (T, K), entropy (T,), top logprobs and ids (T, top_k)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        wanted: Wanted,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        length, count = targets.shape
        head = wanted.head(hidden, weight, bias, wanted.shaping)
        ids = targets.new_empty(length, count + wanted.top_k)
        ids[:, :count] = targets
        lse = torch.empty(length, dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(lse) if wanted.entropy else None
        scores = torch.empty(ids.shape, dtype=torch.float32, device=hidden.device)
        direction = torch.empty_like(hidden) if wanted.ahead(targets) else None
        for chunk in chunks(length, head.rows):
            logits = head.logits(hidden[chunk])
            if wanted.top_k:
                ids[chunk, count:] = logits.topk(wanted.top_k).indices
            found = head.statistics(logits, ids[chunk], wanted.entropy)
            lse[chunk] = found.lse
            scores[chunk] = found.picked - found.lse[:, None]
            if entropy is not None and found.entropy is not None:
                entropy[chunk] = found.entropy
            if direction is not None:
                unit = Slopes(torch.ones_like(found.picked))
                gradient = head.gradient(logits, ids[chunk], unit, found.lse, None)
                head.to_hidden(gradient, direction[chunk])
        if direction is not None:
            ctx.save_for_backward(direction)
        else:
            ctx.save_for_backward(hidden, weight, ids, bias, lse, entropy)
        ctx.wanted = wanted
        ctx.ahead = direction is not None
        ctx.set_materialize_grads(False)
        if not wanted.top_k:
            return scores, entropy, None, None
        top_ids = ids[:, count:].clone()
        ctx.mark_non_differentiable(top_ids)
        return scores[:, :count].clone(), entropy, scores[:, count:].clone(), top_ids

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        by_logprobs, by_entropy, by_top, _ = grads
        if ctx.ahead:
            (direction,) = ctx.saved_tensors
            assert by_logprobs is not None  # its only differentiable output
            return (direction * by_logprobs).to(direction.dtype), None, None, None, None
        hidden, weight, ids, bias, lse, entropy = ctx.saved_tensors
        wanted: Wanted = ctx.wanted
        slopes = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
        count = ids.shape[1] - wanted.top_k
        if by_logprobs is not None:
            slopes[:, :count] = by_logprobs
        if by_top is not None:
            slopes[:, count:] = by_top
        head = wanted.head(hidden, weight, bias, wanted.shaping)
        gradients = _Gradients(hidden, weight, wanted)
        for chunk in chunks(len(hidden), head.rows):
            logits = head.logits(hidden[chunk])
            turn = None if by_entropy is None else by_entropy[chunk].contiguous()
            known = None if by_entropy is None else entropy[chunk]
            gradient = head.gradient(
                logits, ids[chunk], Slopes(slopes[chunk], turn), lse[chunk], known
            )
            gradients.add(head, gradient, chunk)
        return gradients.of_hidden, gradients.of_weight(), None, None, None


class WeightedNll(torch.autograd.Function):
    """-sum(loss_weights * logprobs) as a scalar, and the logprobs (T, K) without gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        loss_weights: Tensor,
        bias: Tensor | None,
        wanted: Wanted,
    ) -> tuple[Tensor, Tensor]:
        head = wanted.head(hidden, weight, bias, wanted.shaping)
        logprobs = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
        gradients = _Gradients(hidden, weight, wanted)
        for chunk in chunks(len(hidden), head.rows):
            logits = head.logits(hidden[chunk])
            found = head.statistics(logits, targets[chunk], False)
            logprobs[chunk] = found.picked - found.lse[:, None]
            if wanted.hidden_gradient or wanted.weight_gradient:
                slopes = Slopes(-loss_weights[chunk])
                gradient = head.gradient(logits, targets[chunk], slopes, found.lse, None)
                gradients.add(head, gradient, chunk)
        ctx.save_for_backward(gradients.of_hidden, gradients.of_weight())
        ctx.mark_non_differentiable(logprobs)
        # What has no weight is ignored, also where its logprob is -inf.
        terms = torch.where(loss_weights == 0, 0, loss_weights * logprobs)
        return -terms.sum(), logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_weight = ctx.saved_tensors
        scale = grads[0]
        return _scaled(of_hidden, scale), _scaled(of_weight, scale), None, None, None, None


class _Gradients:
    """The gradients of hidden states and weight, filled chunk by chunk; None where not wanted."""

    def __init__(self, hidden: Tensor, weight: Tensor, wanted: Wanted) -> None:
        self._hidden = hidden
        self._weight = weight
        self.of_hidden = torch.empty_like(hidden) if wanted.hidden_gradient else None
        # Chunks are added up in float32: in 16 bits the later ones would vanish.
        self._total = (
            torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
            if wanted.weight_gradient
            else None
        )

    def add(self, head: Head, gradient: Tensor, chunk: slice) -> None:
        """Take what a chunk's dL/d raw logits (C, V) says."""
        if self.of_hidden is not None:
            head.to_hidden(gradient, self.of_hidden[chunk])
        if self._total is not None:
            head.add_to_weight(gradient, self._hidden[chunk], self._total)

    def of_weight(self) -> Tensor | None:
        """(V, H) in the weight's type."""
        return None if self._total is None else self._total.to(self._weight.dtype)


def _scaled(gradient: Tensor | None, scale: Tensor) -> Tensor | None:
    """A copy, times a float32 scalar, a few rows at a time so that no float32 copy is held.

    A plain product would round the scalar to the gradient's type first.
    """
    if gradient is None or gradient.dtype == torch.float32:
        return None if gradient is None else gradient * scale
    out = torch.empty_like(gradient)
    for part in chunks(len(gradient), 4096):
        out[part] = gradient[part].float() * scale
    return out

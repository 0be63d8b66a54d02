"""The steps that `benchmarks.logprobs` compares: what each computes, and the memory it takes.

    python -m benchmarks.logprobs_sides nll     # peak extra memory of one step, in a fresh process

Shape letters: T positions, H hidden size, V vocabulary.
"""

import argparse
import json
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from plait.kernels.token_logprobs import token_logprobs, weighted_nll

EPSILON = 0.2
"""Ratios of new to old probability are clipped to 1 - EPSILON .. 1 + EPSILON."""


@dataclass(frozen=True)
class Size:
    """How large a step is. `sequences` share the positions evenly."""

    positions: int = 2048
    hidden: int = 1024
    vocabulary: int = 32_768
    sequences: int = 8


@dataclass(frozen=True)
class Batch:
    """Hidden states, a frozen weight, and what the two losses want."""

    size: Size
    hidden: Tensor
    """(T, H)"""
    weight: Tensor
    """(V, H)"""
    targets: Tensor
    """(T,)"""
    ones: Tensor
    """(T,) loss weights"""
    old_logprobs: Tensor
    """(T,) near those of the weight, or so far that the ratio is clipped"""
    advantages: Tensor
    """(sequences,)"""


Step = Callable[[Batch], tuple[Tensor, Tensor]]
"""One forward and backward pass: the loss and dL/d hidden (T, H)."""


def make(size: Size, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Batch:
    """The same batch at every call."""
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.empty(size.positions, size.hidden, device=device, dtype=dtype)
    weight = torch.empty(size.vocabulary, size.hidden, device=device, dtype=dtype)
    hidden.normal_(generator=generator)
    weight.normal_(std=0.02, generator=generator)
    targets = torch.randint(
        0, size.vocabulary, (size.positions,), generator=generator, device=device
    )
    logits = torch.einsum("th,th->t", hidden.float(), weight[targets].float())
    variance = size.hidden * 0.02**2
    usual = logits - torch.tensor(float(size.vocabulary)).log() - variance / 2
    moved = 0.1 * torch.randn(size.positions, generator=generator, device=device).clamp(-1, 1)
    # Half of the ratios are clipped, none is so near the edge that rounding decides.
    far = torch.rand(size.positions, generator=generator, device=device) < 0.5
    moved += far * torch.where(moved < 0, -0.35, 0.35)
    advantages = torch.randn(size.sequences, generator=generator, device=device)
    ones = torch.ones(size.positions, device=device)
    return Batch(size, hidden, weight, targets, ones, usual + moved, advantages)


def nll(batch: Batch) -> tuple[Tensor, Tensor]:
    """Ours, for fine-tuning: the weighted loss."""
    hidden = batch.hidden.detach().requires_grad_()
    loss, _ = weighted_nll(hidden, batch.weight, batch.targets, batch.ones)
    return finished(loss, hidden)


def plain_nll(batch: Batch) -> tuple[Tensor, Tensor]:
    """Plain torch: cross entropy on all logits, in float32, by autograd."""
    hidden = batch.hidden.detach().requires_grad_()
    logits = F.linear(hidden, batch.weight).float()
    return finished(F.cross_entropy(logits, batch.targets, reduction="sum"), hidden)


def rl(batch: Batch) -> tuple[Tensor, Tensor]:
    """Ours, for reinforcement learning: logprobs, then a clipped ratio's loss."""
    hidden = batch.hidden.detach().requires_grad_()
    logprobs = token_logprobs(hidden, batch.weight, batch.targets).logprobs
    return finished(clipped(logprobs, batch), hidden)


def clipped(logprobs: Tensor, batch: Batch) -> Tensor:
    """GRPO's loss without a reference model, averaged over tokens."""
    ratio = (logprobs - batch.old_logprobs).exp()
    advantages = batch.advantages.repeat_interleave(len(ratio) // batch.size.sequences)
    bounded = ratio.clamp(1 - EPSILON, 1 + EPSILON)
    return -torch.minimum(ratio * advantages, bounded * advantages).mean()


def finished(loss: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Run the backward pass."""
    (gradient,) = torch.autograd.grad(loss, hidden)
    return loss.detach(), gradient


STEPS: dict[str, Step] = {"nll": nll, "plain_nll": plain_nll, "rl": rl}


def peak_kb() -> int:
    """The most memory this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 1024 if sys.platform == "darwin" else peak


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak extra memory of one step, in kB.")
    parser.add_argument("step", choices=sorted(STEPS))
    parser.add_argument("--threads", type=int, default=2)
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    step = STEPS[words.step]
    step(make(Size(64, 64, 512)))  # libraries and threads take theirs
    batch = make(Size())
    before = peak_kb()
    step(batch)
    print(json.dumps({"extra_kb": peak_kb() - before, "before_kb": before}))


if __name__ == "__main__":
    main()

"""liger-kernel's fused losses. As a program its GRPO loss, one timed step at a time, asked for over
standard input:

    .venv-peers/bin/python benchmarks/peers/liger.py INPUTS.pt --threads 2

INPUTS.pt holds hidden (B, T, H), weight (V, H), targets and old logprobs (B, T), advantages (B,).
A line "step compiled" or "step plain" answers {"seconds": ...}; "check SIDE FILE" writes that
side's loss and dL/d hidden to a file and answers {}; "facts" answers what was set. The end of the
input ends it. No import of Plait: this program runs in an environment of its own.
"""

import argparse
import json
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

SETTINGS = {"loss_type": "bnpo", "beta": 0.0, "use_ref_model": False}
"""No reference model; the sum over tokens divided by their number."""


class Nll:
    """The fused cross entropy, summed, over a frozen output layer; its kernels need a GPU."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> None:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        self._inputs = hidden, weight, targets
        self._loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")

    def step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, and dL/d hidden (T, H)."""
        hidden, weight, targets = self._inputs
        hidden = hidden.detach().requires_grad_()
        loss = self._loss(weight, hidden, targets)
        (gradient,) = torch.autograd.grad(loss, hidden)
        return loss.detach(), gradient


class Grpo:
    """The loss of one batch over a frozen output layer."""

    def __init__(self, batch: dict[str, torch.Tensor], compiled: bool, chunk_size: int) -> None:
        self._batch = batch
        self._mask = torch.ones_like(batch["old_logprobs"])
        self._loss = LigerFusedLinearGRPOLoss(compiled=compiled, chunk_size=chunk_size, **SETTINGS)

    def step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, and dL/d hidden (B, T, H)."""
        batch = self._batch
        hidden = batch["hidden"].detach().requires_grad_()
        loss = self._loss(
            hidden,
            batch["weight"],
            batch["targets"],
            self._mask,
            batch["advantages"],
            old_per_token_logps=batch["old_logprobs"],
        )[0]
        loss.backward()
        assert hidden.grad is not None
        return loss.detach(), hidden.grad


def answer(words: list[str], sides: dict[str, Grpo], facts: dict[str, object]) -> dict[str, object]:
    """What one line of input asks for."""
    if words[0] == "facts":
        return facts
    side = sides[words[1]]
    started = time.perf_counter()
    loss, gradient = side.step()
    seconds = time.perf_counter() - started
    if words[0] == "check":
        torch.save({"loss": loss, "gradient": gradient}, words[2])
        return {}
    return {"seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("inputs", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--chunk-size", type=int, default=1, help="sequences of a chunk")
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    warnings.simplefilter("ignore")
    batch = torch.load(words.inputs, weights_only=True)
    sides = {
        "compiled": Grpo(batch, True, words.chunk_size),
        "plain": Grpo(batch, False, words.chunk_size),
    }
    facts: dict[str, object] = {
        **SETTINGS,
        "chunk_size": words.chunk_size,
        "threads": torch.get_num_threads(),
        "liger_kernel": version("liger-kernel"),
        "torch": torch.__version__,
    }
    for line in sys.stdin:
        print(json.dumps(answer(line.split(), sides, facts)), flush=True)


if __name__ == "__main__":
    main()

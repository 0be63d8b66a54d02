"""Losses: small functions of the logprobs at the targets. They never see logits.

Each takes logprobs (P,) and weights (P,) of the positions with a non-zero weight, and the other
`loss_inputs` at these positions, and returns the loss of each position (P,). They are summed over
positions and documents and never normalised, as in the Tinker API.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from plait.errors import UnknownNameError

LossFunction = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]


def cross_entropy(logprobs: Tensor, weights: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """-logprob * weight."""
    del inputs
    return -logprobs * weights


WEIGHTED_NLL = "cross_entropy"
"""The loss that is linear in logprobs, so that its gradient needs no second look at the logits."""

LOSSES: dict[str, LossFunction] = {WEIGHTED_NLL: cross_entropy}


def loss_named(name: str) -> LossFunction:
    if name not in LOSSES:
        raise UnknownNameError("loss", name, LOSSES)
    return LOSSES[name]

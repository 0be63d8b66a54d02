"""Losses: small functions of the logprobs at the targets. They never see logits.

Each is an object that says what it reads and what may be set, and whose function turns a
`LossBatch` into the loss of each document, a sum that is never normalised. README.md has the table
of all, and how to add one in ten lines.
"""

from plait.loss_inputs import INPUTS
from plait.trainer.losses.base import Loss, LossBatch
from plait.trainer.losses.checking import check_inputs, config_of
from plait.trainer.losses.registry import LOSSES, WEIGHTED_NLL, loss_named, register

__all__ = [
    "INPUTS",
    "LOSSES",
    "WEIGHTED_NLL",
    "Loss",
    "LossBatch",
    "check_inputs",
    "config_of",
    "loss_named",
    "register",
]

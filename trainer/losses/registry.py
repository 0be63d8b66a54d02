"""Losses by name: those of the platform, and those that a program registers."""

from plait.errors import ConfigError, UnknownNameError
from plait.loss_inputs import INPUTS
from plait.trainer.losses.base import Loss
from plait.trainer.losses.distillation import DISTILLATION
from plait.trainer.losses.likelihood import CROSS_ENTROPY
from plait.trainer.losses.policy import CISPO, DRO, GSPO, IMPORTANCE_SAMPLING, PPO
from plait.trainer.losses.preference import DPO, KTO

WEIGHTED_NLL = CROSS_ENTROPY.name
"""The loss that is linear in logprobs, so that its gradient needs no second look at the logits."""

LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        CROSS_ENTROPY,
        IMPORTANCE_SAMPLING,
        PPO,
        CISPO,
        DRO,
        GSPO,
        DPO,
        KTO,
        DISTILLATION,
    )
}


def register(loss: Loss) -> Loss:
    """Make a loss known by its name; inputs that no loss read before are float32.

    Raises:
        ConfigError: the name is taken.
    """
    if loss.name in LOSSES:
        raise ConfigError(f"a loss needs a name of its own; {loss.name!r} is taken")
    for name in (*loss.inputs, *loss.optional):
        INPUTS.setdefault(name, "float32")
    LOSSES[loss.name] = loss
    return loss


def loss_named(name: str) -> Loss:
    """The loss of that name.

    Raises:
        UnknownNameError: nobody registered it.
    """
    if name not in LOSSES:
        raise UnknownNameError("loss", name, LOSSES)
    return LOSSES[name]

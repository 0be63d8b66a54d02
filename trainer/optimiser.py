"""One optimiser step over summed gradients: divide, clip, AdamW."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from plait.errors import ModelError
from plait.ranges import ADAMW, check_numbers
from plait.trainer.model import PlaitModel
from plait.trainer.spec import check_part_rates


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """One AdamW step. The defaults are those of the Tinker API."""

    learning_rate: float = 1e-4
    """Of every part that `part_learning_rates` does not name."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12

    weight_decay: float = 0.0
    """Decoupled, applied to weight matrices; never to biases and norms."""

    grad_clip_norm: float = 0.0
    """Largest norm of all gradients together, after the division; 0 clips nothing."""

    part_learning_rates: Mapping[str, float] = field(default_factory=dict)
    """Learning rates of parts by name: "language", "projector", "vision"."""

    def __post_init__(self) -> None:
        check_numbers(self, ADAMW)
        check_part_rates("part_learning_rates", self.part_learning_rates)


def make_optimizer(model: PlaitModel) -> torch.optim.AdamW:
    """AdamW with one group per part and kind of parameter; `step` sets its numbers each time."""
    groups: dict[tuple[str, bool], list[Tensor]] = {}
    for part, _, parameter in model.trainable():
        groups.setdefault((part, parameter.ndim > 1), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "part": part, "decays": decays}
            for (part, decays), parameters in groups.items()
        ],
        foreach=True,
    )


def prepare_step(
    model: PlaitModel, optimizer: torch.optim.Optimizer, settings: StepSettings, divide_by: float
) -> dict[str, float]:
    """Divide the summed gradients, clip them, and set the step's numbers; returns metrics.

    Raises:
        ModelError: a gradient is not finite; nothing has been changed.
    """
    gradients = [p.grad for _, _, p in model.trainable() if p.grad is not None]
    norm = _norm(gradients) / divide_by
    if not math.isfinite(norm):
        raise ModelError(
            f"gradients must be finite; their norm is {norm}: lower the learning rate or look for "
            "a broken row in the ledger"
        )
    for gradient in gradients:
        gradient.div_(divide_by)
        if 0 < settings.grad_clip_norm < norm:
            gradient.mul_(settings.grad_clip_norm / norm)
    for group in optimizer.param_groups:
        rate = settings.part_learning_rates.get(group["part"], settings.learning_rate)
        group["lr"] = rate
        group["betas"] = (settings.beta1, settings.beta2)
        group["eps"] = settings.eps
        group["weight_decay"] = settings.weight_decay if group["decays"] else 0.0
    return {"grad_norm": norm}


def _norm(gradients: list[Tensor]) -> float:
    if not gradients:
        return 0.0
    return float(torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients])))


def refuse_untrained(model: PlaitModel) -> None:
    """Guarantee 5, after the first backward pass: what is marked trainable trains.

    Raises:
        ModelError: naming a trainable parameter that the pass did not reach.
    """
    idle = [name for _, name, parameter in model.trainable() if parameter.grad is None]
    if idle:
        raise ModelError(
            f"what is marked trainable must train: {len(idle)} parameters got no gradient in the "
            f"first step, the first is {idle[0]}; freeze them or use what they belong to"
        )

"""One optimiser step over summed gradients: divide, clip, step."""

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from plait.errors import ConfigError, ModelError, UnknownNameError
from plait.ranges import ADAMW, check_numbers
from plait.trainer.spec import check_part_rates

Trainable = Sequence[tuple[str, str, nn.Parameter]]
"""(part, name, parameter) of all that trains, in a stable order."""

ADAM_W = "adamw"

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    ADAM_W: torch.optim.AdamW,
    "adafactor": torch.optim.Adafactor,
    "adagrad": torch.optim.Adagrad,
    "adam": torch.optim.Adam,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}
"""torch's optimisers that step on gradients alone, by name."""

ELEMENTWISE = tuple(name for name in OPTIMIZERS if name != "adafactor")
"""Those that step on a part of a parameter as they would on all of it."""

_SET_APART = ("params", "lr", "weight_decay", "foreach", "fused", "capturable", "differentiable")
"""Arguments that are set otherwise, or are not the user's to choose."""


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """One step. The defaults are those of the Tinker API."""

    learning_rate: float = 1e-4
    """Of every part that `part_learning_rates` does not name."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12

    weight_decay: float = 0.0
    """Applied to weight matrices, never to biases and norms; decoupled in AdamW."""

    grad_clip_norm: float = 0.0
    """Largest norm of all gradients together, after the division; 0 clips nothing."""

    part_learning_rates: Mapping[str, float] = field(default_factory=dict)
    """Learning rates of parts by name: "language", "projector", "vision"."""

    part_weight_decays: Mapping[str, float] = field(default_factory=dict)
    """Weight decays of parts that should not use `weight_decay`."""

    optimizer: str = ADAM_W
    """One of `OPTIMIZERS`, the same at every step of a run."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of another optimiser: `momentum` of sgd, for example."""

    def __post_init__(self) -> None:
        check_numbers(self, ADAMW)
        check_part_rates("part_learning_rates", self.part_learning_rates)
        check_part_rates("part_weight_decays", self.part_weight_decays)
        if self.optimizer not in OPTIMIZERS:
            raise UnknownNameError("optimizer", self.optimizer, OPTIMIZERS)
        known = _arguments(self.optimizer)
        for name in self.options:
            if name not in known:
                raise UnknownNameError(f"option of optimizer {self.optimizer!r}", name, known)

    @property
    def arguments(self) -> dict[str, Any]:
        """What the optimiser's groups are given besides rates and decays."""
        if self.optimizer == ADAM_W:
            return {"betas": (self.beta1, self.beta2), "eps": self.eps, **self.options}
        return dict(self.options)


def _arguments(optimizer: str) -> list[str]:
    taken = ("self", *_SET_APART, *(("betas", "eps") if optimizer == ADAM_W else ()))
    return [n for n in inspect.signature(OPTIMIZERS[optimizer]).parameters if n not in taken]


def make_optimizer(
    trainable: Iterable[tuple[str, str, Tensor]],
    optimizer: str = ADAM_W,
    options: Mapping[str, Any] | None = None,
) -> torch.optim.Optimizer:
    """One group per part and kind of parameter; `prepare_step` sets its numbers each time.

    Raises:
        ConfigError: the optimiser refuses its options.
    """
    groups: dict[tuple[str, bool], list[Tensor]] = {}
    for part, _, parameter in trainable:
        groups.setdefault((part, parameter.ndim > 1), []).append(parameter)
    made = [
        {"params": parameters, "part": part, "decays": decays}
        for (part, decays), parameters in groups.items()
    ]
    kind: Any = OPTIMIZERS[optimizer]
    try:
        return kind(made, **(options or {}), foreach=True)  # type: ignore[no-any-return]
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"optimizer {optimizer!r} refuses its options {dict(options or {})}: {error}; "
            f"torch.optim.{kind.__name__} says what they may be"
        ) from error


def prepare_step(
    trainable: Trainable,
    optimizer: torch.optim.Optimizer,
    settings: StepSettings,
    divide_by: float,
    norm: float | None = None,
) -> dict[str, float]:
    """Divide the summed gradients, clip them, and set the step's numbers; returns metrics.

    Args:
        norm: Of all gradients together, where this process has only a part of them.

    Raises:
        ModelError: a gradient is not finite, or the optimiser is not that of the steps before;
            nothing has been changed.
    """
    if type(optimizer) is not OPTIMIZERS[settings.optimizer]:
        raise ModelError(
            f"a run keeps its optimiser: this one began with {type(optimizer).__name__}, and the "
            f"step asks for {settings.optimizer}; begin a new run from its saved weights"
        )
    gradients = [p.grad for _, _, p in trainable if p.grad is not None]
    norm = (_norm(gradients) if norm is None else norm) / divide_by
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
        part = group["part"]
        decay = settings.part_weight_decays.get(part, settings.weight_decay)
        group["lr"] = settings.part_learning_rates.get(part, settings.learning_rate)
        group["weight_decay"] = decay if group["decays"] else 0.0
        group.update(settings.arguments)
    return {"grad_norm": norm}


def _norm(gradients: list[Tensor]) -> float:
    if not gradients:
        return 0.0
    return float(torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients])))


def refuse_untrained(trainable: Trainable) -> None:
    """Guarantee 5, after the first backward pass: what is marked trainable trains.

    Raises:
        ModelError: naming a trainable parameter that the pass did not reach.
    """
    idle = [name for _, name, parameter in trainable if parameter.grad is None]
    if idle:
        raise ModelError(
            f"what is marked trainable must train: {len(idle)} parameters got no gradient in the "
            f"first step, the first is {idle[0]}; freeze them or use what they belong to"
        )

"""One run among many: what it trains, its gradients, its optimiser."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plait.errors import ModelError
from plait.trainer.build import Built
from plait.trainer.checkpoint import State, capture, check_state
from plait.trainer.model import Sums
from plait.trainer.optimiser import (
    ADAM_W,
    StepSettings,
    make_optimizer,
    prepare_step,
    refuse_untrained,
)


class Run:
    """The training state of one run. Nothing of it is any other run's.

    Gradients of a `forward_backward` grow in the parameters' `grad` and are added to `gradients`
    when all of it is computed: one that fails adds nothing.
    """

    def __init__(self, name: str, built: Built) -> None:
        self.name, self.built, self.model = name, built, built.model
        self.trainable = list(built.model.trainable())
        """(part, name, parameter), in a stable order."""

        self.gradients: list[Tensor | None] = [None] * len(self.trainable)
        self.pending_weight = 0.0
        self.steps = 0
        self.random = torch.Generator().manual_seed(built.seed).get_state()
        """Of dropout."""

        self.optimizer: torch.optim.Optimizer | None = None
        self.failure: str | None = None
        """What went wrong in a forward_backward since the last step."""

        self._weight, self._random_before = 0.0, self.random
        self._dropouts = [m for m in _own_modules(built) if getattr(m, "p", 0) > 0]

    def optimizer_for(self, settings: StepSettings) -> torch.optim.Optimizer:
        """The run's optimiser, made with its first step, which says of which kind it is."""
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.trainable, settings.optimizer, settings.arguments)
        return self.optimizer

    @property
    def draws(self) -> bool:
        """Whether training draws random numbers, which then must be this run's alone."""
        return bool(self._dropouts)

    @property
    def mixes(self) -> bool:
        """Whether its documents may stand in one row with those of other runs."""
        alone = self.draws or self.built.trains_language
        return self.model.backbone.packs and not alone

    def train(self, mode: bool) -> None:
        """Switch what this run owns, and the language model, to training or evaluation."""
        self.model.backbone.train(mode)
        self.model.encoders.train(mode)
        for module in self._dropouts:
            module.training = mode

    def begin(self) -> None:
        """Before the first micro-batch of a forward_backward."""
        self._weight, self._random_before = 0.0, self.random
        for _, _, parameter in self.trainable:
            parameter.grad = None

    def add(self, sums: Sums) -> None:
        """Count a micro-batch whose backward pass is done."""
        self._weight += sums.weight

    @torch.no_grad()
    def finish(self) -> None:
        """After the last micro-batch: its gradients are the run's."""
        for number, (_, _, parameter) in enumerate(self.trainable):
            new, parameter.grad = parameter.grad, None
            before = self.gradients[number]
            if new is not None:
                self.gradients[number] = new if before is None else before.add_(new)
        self.pending_weight += self._weight

    def abandon(self, error: BaseException) -> None:
        """Where a forward_backward failed: nothing of it stays."""
        self.random = self._random_before
        self.begin()
        self.failure = str(error)

    def step(self, settings: StepSettings, divide_by_weight: bool) -> dict[str, float]:
        """One optimiser step on the gradients added since the last.

        Raises:
            ModelError: a forward_backward since the last step failed, there are no gradients, or
                some are not finite. Nothing has been changed, except that the failure is told
                once.
        """
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise ModelError(
                "a step needs every forward_backward before it, and one failed: "
                f"{failure} (the gradients of the others are kept: optim_step again steps on "
                "them)"
            )
        if all(gradient is None for gradient in self.gradients):
            raise ModelError(
                "optim_step needs gradients and there are none; call forward_backward before it"
            )
        divide_by = self.pending_weight if divide_by_weight else 1.0
        if divide_by == 0:
            raise ModelError("divide_by_weight needs weights above 0; all weights were 0")
        with self._lent_gradients():
            if self.steps == 0:
                refuse_untrained(self.trainable)
            optimizer = self.optimizer_for(settings)
            metrics = prepare_step(self.trainable, optimizer, settings, divide_by)
            optimizer.step()
        self.clear()
        self.steps += 1
        return {"grad_norm:mean": metrics["grad_norm"]}

    @contextmanager
    def _lent_gradients(self) -> Iterator[None]:
        """The optimiser reads them where torch keeps gradients."""
        for gradient, (_, _, parameter) in zip(self.gradients, self.trainable, strict=True):
            parameter.grad = gradient
        try:
            yield
        finally:
            for _, _, parameter in self.trainable:
                parameter.grad = None

    def clear(self) -> None:
        """Forget pending gradients."""
        self.gradients = [None] * len(self.trainable)
        self.pending_weight = 0.0

    def state(self, **extra: Any) -> State:
        """All that it needs besides weights to go on exactly, and what the caller keeps."""
        state = capture(self.optimizer, self.steps, self.random, **extra)
        state.pending_weight = self.pending_weight
        state.gradients = {
            name: gradient
            for (_, name, _), gradient in zip(self.trainable, self.gradients, strict=True)
            if gradient is not None
        }
        return state

    def check(self, folder: Path, state: State | None) -> None:
        """Refuse a state that cannot be put into this run.

        Raises:
            CheckpointError: there is none, or it is of other parts.
        """
        kind = ADAM_W if state is None else state.kind
        check_state(folder, state, make_optimizer(self.trainable, kind))

    def restore(self, state: State) -> None:
        """Go on from a state that `check` has passed."""
        self.steps, self.random = state.step, state.random
        self.pending_weight, self.failure = state.pending_weight, None
        self.gradients = [
            state.gradients[name].to(parameter.device) if name in state.gradients else None
            for _, name, parameter in self.trainable
        ]
        self.optimizer = None
        if state.optimizer["param_groups"]:
            self.optimizer = make_optimizer(self.trainable, state.kind)
            self.optimizer.load_state_dict(state.optimizer)


def _own_modules(built: Built) -> Iterator[nn.Module]:
    """Modules whose training mode is this run's: dropout of its adapter and of its towers, and of
    a language model of its own."""
    mine = f".lora_dropout.{built.model.adapter}"
    for name, module in built.model.named_modules():
        if not isinstance(module, nn.modules.dropout._DropoutNd):
            continue
        if name.startswith("encoders."):
            if any(p.requires_grad for p in built.model.parameters()):
                yield module
        elif ".lora_dropout." not in name or name.endswith(mine):
            yield module

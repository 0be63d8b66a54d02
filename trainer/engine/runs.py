"""One run among many: what it trains, its gradients, its optimiser."""

from collections.abc import Iterator, Sequence
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
        self._dropouts = _adapter_dropouts(built)
        self.draws = bool(self._dropouts) or _draws(built)
        """Whether training draws random numbers, which then must be this run's alone."""

    def optimizer_for(self, settings: StepSettings) -> torch.optim.Optimizer:
        """The run's optimiser, made with its first step, which says of which kind it is."""
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.trainable, settings.optimizer, settings.arguments)
        return self.optimizer

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
        self.give([None] * len(self.trainable))

    def give(self, gradients: Sequence[Tensor | None]) -> None:
        """Put gradients where torch keeps them."""
        for (*_, parameter), gradient in zip(self.trainable, gradients, strict=True):
            parameter.grad = gradient

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
        self.give(self.gradients)
        try:
            yield
        finally:
            self.give([None] * len(self.trainable))

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


def _dropouts(module: nn.Module) -> Iterator[nn.Module]:
    for one in module.modules():
        if isinstance(one, nn.modules.dropout._DropoutNd) and one.p > 0:
            yield one


def _adapter_dropouts(built: Built) -> list[nn.Module]:
    """Of this run's adapter, among all that the language model has."""
    mine = f".lora_dropout.{built.model.adapter}"
    named = built.model.language.named_modules()
    return [one for name, module in named if name.endswith(mine) for one in _dropouts(module)]


def _draws(built: Built) -> bool:
    """Whether anything of this run that may be in training mode has dropout."""
    shared = built.model.backbone.own_modules
    if any(isinstance(one, nn.modules.dropout._DropoutNd) and one.p > 0 for one in shared):
        return True
    for name in built.model.encoders:
        encoder = built.model.media_encoder(name)
        parts = [encoder.projector, *([encoder.encoder] if encoder.trainable else [])]
        if any(True for part in parts for _ in _dropouts(part)):
            return True
    return False

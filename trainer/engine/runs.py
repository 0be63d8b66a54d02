"""One run among many: what it trains, its gradients, its optimiser."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from plait.errors import ConfigError, ModelError
from plait.trainer.build import Built
from plait.trainer.engine.dropouts import adapter_dropouts, draws
from plait.trainer.model import Sums
from plait.trainer.optimiser import (
    ELEMENTWISE,
    StepSettings,
    make_optimizer,
    prepare_step,
    refuse_untrained,
)
from plait.trainer.ranks.group import ALONE, Group
from plait.trainer.ranks.reducing import norm, summed, summed_number
from plait.trainer.ranks.sharding import is_sharded, local, local_parameter


class Run:
    """The training state of one run, on one rank. Nothing of it is any other run's.

    Gradients of a `forward_backward` grow in the parameters' `grad` and are added to `gradients`
    when all of it is computed: one that fails adds nothing. Each rank has those of the documents
    that it computed; a step, and a saved state, sums them.

    Args:
        group: The ranks that train it together.
    """

    def __init__(self, name: str, built: Built, group: Group = ALONE) -> None:
        self.name, self.built, self.model, self.group = name, built, built.model, group
        self.trainable = list(built.model.trainable())
        """(part, name, parameter), in a stable order."""

        self.stepped = [(part, one, local_parameter(p)) for part, one, p in self.trainable]
        """The same, as the optimiser sees them: of a sharded parameter this rank's part."""

        self.gradients: list[Tensor | None] = [None] * len(self.trainable)
        self.pending_weight = 0.0
        self.steps = 0
        self.passes = 0
        """Training passes begun, which dropout draws from: equal on all ranks."""

        self.seed = built.seed
        """What dropout draws from as well. It is part of the state: a client that goes on from a
        checkpoint was built from another seed."""

        self.optimizer: torch.optim.Optimizer | None = None
        self.failure: str | None = None
        """What went wrong in a forward_backward since the last step."""

        self.spoilt: str | None = None
        """Why its weights may be half changed, until others are loaded."""

        self._weight, self._begun = 0.0, 0
        self._dropouts = adapter_dropouts(built)
        self.draws = bool(self._dropouts) or draws(built)
        """Whether training draws random numbers, which then must be this run's alone."""

    @property
    def sharded(self) -> bool:
        """Whether some of what trains is cut into shards."""
        return any(is_sharded(parameter) for *_, parameter in self.trainable)

    def optimizer_for(self, settings: StepSettings) -> torch.optim.Optimizer:
        """The run's optimiser, made with its first step, which says of which kind it is.

        Raises:
            ConfigError: it cannot step on shards, and there are some.
        """
        self.refuse_on_shards(settings.optimizer)
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.stepped, settings.optimizer, settings.arguments)
        return self.optimizer

    def refuse_on_shards(self, optimizer: str) -> None:
        """
        Raises:
            ConfigError: it cannot step on shards, and there are some.
        """
        if optimizer not in ELEMENTWISE and self.sharded:
            raise ConfigError(
                f"optimizer {optimizer!r} needs whole weights, which strategy 'fsdp' cuts "
                f"into shards; use one of {', '.join(ELEMENTWISE)}"
            )

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

    def dropout_seed(self, place: Sequence[int], behind: int) -> int:
        """What one micro-batch's dropout is drawn from, on whichever rank it is computed.

        Args:
            place: Where the micro-batch stands in its pass.
            behind: Passes that have begun since.
        """
        sequence = np.random.SeedSequence([self.seed, self.passes - behind, *place])
        return int(sequence.generate_state(1, np.uint64)[0] >> 1)

    def begin(self, passes: int = 1) -> None:
        """Before the first micro-batch of a forward_backward, or of several at once."""
        self._weight = 0.0
        self._begun = passes
        self.passes += passes
        self._empty()

    def give(self, gradients: Sequence[Tensor | None]) -> None:
        """Put gradients where torch keeps them."""
        for (*_, parameter), gradient in zip(self.trainable, gradients, strict=True):
            parameter.grad = gradient

    def _empty(self) -> None:
        self.give([None] * len(self.trainable))

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
        self._begun = 0  # an `abandon` that comes from elsewhere takes nothing of it back

    def abandon(self, reason: str) -> None:
        """Where a forward_backward failed: nothing of it stays."""
        self._weight = 0.0
        self.passes -= self._begun
        self._empty()
        self.failure = reason

    def refuse_failed(self) -> None:
        """To be asked before a step, on the one rank that knows what failed.

        Raises:
            ModelError: a forward_backward since the last step failed; it is told once.
        """
        if self.failure is not None:
            failure, self.failure = self.failure, None
            kept = any(gradient is not None for gradient in self.gradients)
            others = (
                "the gradients of the others are kept: optim_step again steps on them"
                if kept
                else "there are no gradients of others: call forward_backward again"
            )
            raise ModelError(
                f"a step needs every forward_backward before it, and one failed: {failure} "
                f"({others})"
            )

    def refuse_spoilt(self) -> None:
        """
        Raises:
            ModelError: a step failed in its middle, and no weights were loaded since.
        """
        if self.spoilt is not None:
            raise ModelError(
                f"a step of this run failed in its middle ({self.spoilt}), so that its weights may "
                "be half changed: load_state_with_optimizer goes on from a saved state, load_state "
                "from saved weights with a new optimiser"
            )

    def step(self, settings: StepSettings, divide_by_weight: bool) -> dict[str, float]:
        """One optimiser step on the gradients added since the last, on all ranks; collective.

        Raises:
            ModelError: there are no gradients, or some are not finite. Nothing has been changed,
                unless `spoilt` says so.
        """
        gradients = self.sum_over_ranks()
        metrics = self._step(gradients, settings, divide_by_weight)
        self.clear()
        self.steps += 1
        return {"grad_norm:mean": metrics["grad_norm"]}

    def _step(
        self, gradients: Sequence[Tensor | None], settings: StepSettings, divide_by_weight: bool
    ) -> dict[str, float]:
        there = [gradient for gradient in gradients if gradient is not None]
        if not there:
            raise ModelError(
                "optim_step needs gradients and there are none; call forward_backward before it"
            )
        divide_by = summed_number(self.pending_weight, self.group) if divide_by_weight else 1.0
        if not divide_by > 0:
            raise ModelError(
                f"divide_by_weight needs weights whose sum is above 0; it is {divide_by:g}: step "
                "without it, on the gradients as they were summed"
            )
        total = norm(there, self.group)
        with self._lent(gradients):
            if self.steps == 0:
                refuse_untrained(self.stepped)
            optimizer = self.optimizer_for(settings)
            metrics = prepare_step(self.stepped, optimizer, settings, divide_by, total)
            try:
                optimizer.step()
            except Exception as error:  # memory ends between two groups of tensors, for example
                self.spoilt = str(error)
                self.refuse_spoilt()
        return metrics

    def sum_over_ranks(self) -> list[Tensor | None]:
        """All ranks' gradients together; rank 0 keeps them as its own, and the others none, so
        that they may be summed again. Collective."""
        parameters = [parameter for *_, parameter in self.trainable]
        gradients = summed(self.gradients, parameters, self.group)
        self.pending_weight = summed_number(self.pending_weight, self.group)
        keeps = self.group.rank == 0
        self.pending_weight *= keeps
        self.gradients = [
            gradient if keeps or is_sharded(parameter) else None
            for gradient, parameter in zip(gradients, parameters, strict=True)
        ]
        return gradients

    @contextmanager
    def _lent(self, gradients: Sequence[Tensor | None]) -> Iterator[None]:
        """The optimiser reads them where torch keeps gradients."""
        for (*_, parameter), gradient in zip(self.stepped, gradients, strict=True):
            parameter.grad = None if gradient is None else local(gradient)
        try:
            yield
        finally:
            for *_, parameter in self.stepped:
                parameter.grad = None

    def clear(self) -> None:
        """Forget pending gradients."""
        self.gradients = [None] * len(self.trainable)
        self.pending_weight = 0.0

    def lose(self, reason: str) -> None:
        """Forget pending gradients, of which a part is gone; the next step says why."""
        if any(gradient is not None for gradient in self.gradients):
            self.failure = reason
        self.clear()

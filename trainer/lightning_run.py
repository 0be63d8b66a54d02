"""The optimisation loop of `plait train`: a Lightning module with manual optimisation.

The steps are the engine's, on as many ranks as there are; Lightning brings the loop, loggers and
progress. Whatever must be exact (order of rows, state, checkpoints) is ours and happens at the end
of an optimiser step, in this order: step, log, validate, checkpoint, stop.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import RichProgressBar

from plait.datasets.assembly import Pack
from plait.datasets.loader import Loader
from plait.trainer.config import TrainConfig
from plait.trainer.engine.learning import Learner
from plait.trainer.model import PlaitModel
from plait.trainer.schedule import settings_at

ROWS_DRAWN = "rows/"
"""Before the name of a dataset: its rows trained on so far, in logs."""

STOPS = (signal.SIGINT, signal.SIGTERM)
"""What asks a run to stop: a terminal, and a scheduler, systemd or `timeout`."""


Turn = list[Pack]
"""What the ranks compute at the same time."""


@dataclass(slots=True)
class Progress:
    """Where the optimisation stands; plain values, part of every checkpoint."""

    step: int = 0
    best_step: int = 0
    best_nll: float | None = None
    validations_since_best: int = 0
    history: list[float] = field(default_factory=list)
    """Training loss of each step, in nats a token."""


@dataclass(slots=True)
class Hooks:
    """What a run does at the end of a step, beside the step itself."""

    log: Callable[[dict[str, float], int], None]
    validate: Callable[[], float | None]
    """Nats a token on the validation rows; None where there are none."""

    keep_best: Callable[[int], None]
    checkpoint: Callable[[int], None]
    stop_requested: Callable[[], bool]


class PlaitModule(lightning.LightningModule):
    """Sums gradients over `accumulate` packs, then steps by their weighted mean."""

    def __init__(
        self,
        learner: Learner,
        loader: Loader,
        config: TrainConfig,
        progress: Progress,
        hooks: Hooks,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.learner, self.loader, self.config = learner, loader, config
        self.progress, self.hooks = progress, hooks
        self._loss = self._weight = 0.0
        self._packs = self._positions = 0

    @property
    def model(self) -> PlaitModel:
        """Not a part of this module: its devices are the engine's to choose."""
        return self.learner.built.model

    @property
    def finished(self) -> bool:
        """Nothing is left to do; a resumed run knows it from the checkpoint."""
        patience = self.config.patience
        impatient = patience is not None and self.progress.validations_since_best >= patience
        return impatient or self.progress.step >= self.config.steps or self.loader.ended

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.learner.run.optimizer_for(settings_at(0, self.config))

    def transfer_batch_to_device(self, batch: Turn, device: torch.device, index: int) -> Turn:
        """Packs stay on the CPU: the model moves what it reads."""
        del device, index
        return batch

    def training_step(self, packs: Turn, batch_index: int) -> None:
        del batch_index
        for pack in packs:
            self.loader.account(pack)
        loss, weight = self.learner.learn(packs)
        self._loss += loss
        self._weight += weight
        self._positions += sum(pack.length for pack in packs)
        self._packs += len(packs)
        if self._packs == self.config.accumulate:
            self._step()

    def on_train_epoch_end(self) -> None:
        """Where the rows have ended, what is left of them makes a last, smaller step."""
        if self._packs:
            self._step()

    def _step(self) -> None:
        settings = settings_at(self.progress.step, self.config)
        metrics = {"grad_norm": self.learner.step(settings)["grad_norm:mean"]}
        self.progress.step += 1
        nll = self._loss / self._weight
        self.progress.history.append(nll)
        metrics |= {
            "train_nll": nll,
            "lr": settings.learning_rate,
            "positions": float(self._positions),
        }
        drawn = self.loader.drawn
        if len(drawn) > 1:
            metrics |= {f"{ROWS_DRAWN}{name}": float(count) for name, count in drawn.items()}
        self._loss = self._weight = 0.0
        self._packs = self._positions = 0
        self._after_step(metrics)

    def _after_step(self, metrics: dict[str, float]) -> None:
        step, last = self.progress.step, self.progress.step == self.config.steps
        last = last or self.loader.ended
        if step % self.config.validate_every == 0 or last:
            validation = self._validate()
            if validation is not None:
                metrics["validation_nll"] = validation
        self.hooks.log(metrics, step)
        stop = self.finished or self.hooks.stop_requested()
        if step % self.config.checkpoint_every == 0 or stop:
            self.hooks.checkpoint(step)
        self.trainer.should_stop = stop

    def _validate(self) -> float | None:
        nll = self.hooks.validate()
        self.model.train()
        progress = self.progress
        if nll is None or progress.best_nll is None or nll < progress.best_nll:
            progress.best_nll, progress.best_step = nll, progress.step
            progress.validations_since_best = 0
            self.hooks.keep_best(progress.step)
        else:
            progress.validations_since_best += 1
        return nll


@dataclass(slots=True)
class Remaining:
    """The packs of the steps that are left, by turns of the ranks; none goes over a step's end.

    Args:
        steps: That are left.
        accumulate: Packs of a step.
        ranks: Packs of a turn at most.
    """

    loader: Loader
    steps: int
    accumulate: int
    ranks: int

    def __len__(self) -> int:
        """Turns, for the progress bar."""
        return self.steps * -(-self.accumulate // self.ranks)

    def __iter__(self) -> Iterator[Turn]:
        turn: list[Pack] = []
        packs = islice(self.loader.packs(), self.steps * self.accumulate)
        for number, pack in enumerate(packs, start=1):
            turn.append(pack)
            if len(turn) == self.ranks or number % self.accumulate == 0:
                yield turn
                turn = []
        if turn:
            yield turn


class TrainingBar(RichProgressBar):
    """Lightning's bar with the loss and what is left; no epochs, which packs do not have."""

    def get_metrics(self, trainer: Any, module: Any) -> dict[str, Any]:
        del trainer
        history = module.progress.history
        shown = {"step": f"{module.progress.step}/{module.config.steps}"}
        return shown | ({"nll": f"{history[-1]:.3f}"} if history else {})

    def _get_train_description(self, current_epoch: int) -> str:
        del current_epoch
        return "training"


class OwnSignals(lightning.Callback):
    """Lightning would answer SIGTERM by ending the process, as if all were done, between two packs
    of a step and without a checkpoint; what answered before answers still."""

    def __init__(self) -> None:
        self._handlers = {sign: signal.getsignal(sign) for sign in STOPS}

    def on_train_start(self, trainer: Any, module: Any) -> None:
        del trainer, module
        if threading.current_thread() is threading.main_thread():
            for sign, handler in self._handlers.items():
                signal.signal(sign, handler)


def fit(module: PlaitModule, loggers: list[Any]) -> None:
    """Run the steps that are left."""
    config, learner = module.config, module.learner
    left = Remaining(
        module.loader, config.steps - module.progress.step, config.accumulate, learner.ranks
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=loggers,
        callbacks=[TrainingBar(leave=True), OwnSignals()],
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        inference_mode=False,
    )
    module.model.train()
    trainer.fit(module, train_dataloaders=left)

"""The optimisation loop of `plait train`: a Lightning module with manual optimisation.

The model is the same plain module that the engine drives; Lightning brings devices, loggers and
progress. Whatever must be exact (order of rows, state, checkpoints) is ours and happens at the end
of an optimiser step, in this order: step, log, validate, checkpoint, stop.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import RichProgressBar

from plait.datasets.assembly import Pack
from plait.datasets.loader import Loader
from plait.stream import pack as join
from plait.trainer.config import TrainConfig
from plait.trainer.model import PlaitModel
from plait.trainer.optimiser import make_optimizer, prepare_step, refuse_untrained
from plait.trainer.schedule import settings_at
from plait.trainer.together import Part, computed

ROWS_DRAWN = "rows/"
"""Before the name of a dataset: its rows trained on so far, in logs."""


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
        model: PlaitModel,
        loader: Loader,
        config: TrainConfig,
        progress: Progress,
        hooks: Hooks,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.loader, self.config = loader, config
        self.progress, self.hooks = progress, hooks
        self.trainable = list(model.trainable())
        self.optimizer = make_optimizer(self.trainable)
        self._loss = self._weight = 0.0
        self._packs = self._positions = 0

    @property
    def finished(self) -> bool:
        """Nothing is left to do; a resumed run knows it from the checkpoint."""
        patience = self.config.patience
        impatient = patience is not None and self.progress.validations_since_best >= patience
        return impatient or self.progress.step >= self.config.steps or self.loader.ended

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer

    def transfer_batch_to_device(self, batch: Pack, device: torch.device, index: int) -> Pack:
        """A pack stays on the CPU: the model moves what it reads."""
        del device, index
        return batch

    def training_step(self, pack: Pack, batch_index: int) -> None:
        del batch_index
        self.loader.account(pack)
        with computed([Part(self.model, join(pack.documents, pack.inputs))]) as [sums]:
            self.manual_backward(sums.loss)
        self._loss += float(sums.loss.detach())
        self._weight += sums.weight
        self._positions += pack.length
        self._packs += 1
        if self._packs == self.config.accumulate:
            self._step()

    def on_train_epoch_end(self) -> None:
        """Where the rows have ended, what is left of them makes a last, smaller step."""
        if self._packs:
            self._step()

    def _step(self) -> None:
        if self.progress.step == 0:
            refuse_untrained(self.trainable)
        settings = settings_at(self.progress.step, self.config)
        metrics = prepare_step(self.trainable, self.optimizer, settings, self._weight)
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
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
    """The packs of the steps that are left, with their number, for the progress bar."""

    loader: Loader
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Pack]:
        return islice(self.loader.packs(), self.count)


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


def fit(module: PlaitModule, loggers: list[Any]) -> None:
    """Run the steps that are left."""
    left = (module.config.steps - module.progress.step) * module.config.accumulate
    trainer = lightning.Trainer(
        accelerator="auto",
        devices=1,
        max_epochs=1,
        logger=loggers,
        callbacks=[TrainingBar(leave=True)],
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        inference_mode=False,
    )
    module.model.train()
    trainer.fit(module, train_dataloaders=Remaining(module.loader, left))

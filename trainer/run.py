"""`plait train`: one run from a recipe to metrics.json, resumable at any moment.

runs/stamps/
  run.json          the recipe as it was understood
  features.json     which encoders' features are kept, and why
  before.json       measured before training
  checkpoints/      step-000050/ ... to resume from; best-000075/ the weights that were kept
  ledger.jsonl      what became of every row; timeouts.jsonl what a clock dropped
  logs/             CSV and TensorBoard
  losses.csv  metrics.json  captions.json
"""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console

from plait.datasets.journal import Journal
from plait.datasets.ledger import Ledger, empty_state
from plait.encoders.feature_folder import FeatureFolder
from plait.errors import (
    CheckpointError,
    ConfigError,
    DamagedCheckpointError,
    Interrupted,
)
from plait.home import home
from plait.modalities import Limits
from plait.stream import Sample
from plait.trainer import checkpoint
from plait.trainer.build import Built, parameter_counts
from plait.trainer.checks import packing_warning
from plait.trainer.config import RunConfig, plain
from plait.trainer.data import open_data
from plait.trainer.engine.learning import Learner, learner_of
from plait.trainer.evaluation.exchanges import answer_of, prompt_text
from plait.trainer.evaluation.nll import nll, per_token
from plait.trainer.evaluation.suite import Measured
from plait.trainer.features import settle
from plait.trainer.files import remove_leftovers, write_json, writing
from plait.trainer.lightning_run import ROWS_DRAWN, STOPS, Hooks, PlaitModule, Progress, fit
from plait.trainer.phases import Phases
from plait.trainer.progress import bar
from plait.trainer.reports.showing import show
from plait.trainer.rundir import claim, decisive, empty, read_json
from plait.trainer.runlog import LossTable, make_loggers
from plait.trainer.workbench import TIMEOUTS, Workbench

VERSIONS = ("plait", "torch", "transformers", "peft", "lightning", "tokenizers", "numpy", "pillow")


class TrainingRun:
    """One run. `execute` does what is left of it and returns the metrics.

    Args:
        fresh: Delete what the folder holds, once the recipe has proved usable.
    """

    def __init__(self, config: RunConfig, console: Console, fresh: bool = False) -> None:
        self.config, self.console, self.fresh = config, console, fresh
        self.folder = config.folder
        self.phases = Phases()
        self._stop = threading.Event()
        self._rows: dict[str, int] = {}
        self._losses: LossTable

    def execute(self) -> dict[str, Any]:
        """Raises:
        PlaitError: whatever stops the run; what was saved stays, and a next call goes on from it.
        """
        torch.set_num_threads(self.config.threads or os.cpu_count() or 1)
        most = self.config.train.cache_disk_mb * 1_000_000
        with (
            closing(self.load()) as learner,
            FeatureFolder(home() / "features", most) as features,
        ):
            bench = self.prepare(learner.built)
            self.compute_features(bench, features)
            before = self.measure_before(bench)
            progress = self.train(bench, learner)
            return self.finish(bench, learner, before, progress)

    def load(self) -> Learner:
        """Start the ranks, and load the model on each."""
        config = self.config
        with self.phases("load"):
            return learner_of(
                config.model, config.seed, config.data.limits, config.devices, config.strategy
            )

    def prepare(self, built: Built) -> Workbench:
        """Open the rows, and check that packing changes nothing."""
        with self.phases("plan"):
            with bar(self.console, "comparing pictures") as advance:
                data = open_data(self.config.data, advance)
            bench = Workbench(self.config, built, data)
            goes_on = not self.fresh and (self.folder / "run.json").is_file()
            journal = bench.check_held_out(Journal(self.folder / TIMEOUTS) if goes_on else None)
            for note in data.splits.notes:
                self.console.print(f"[yellow]note:[/] {note}")
            bench.require_rows()
        if warning := packing_warning(built):
            self.console.print(f"[yellow]warning:[/] {warning}")
        # Nothing is written or deleted before the recipe, the model and the rows proved usable.
        if self.fresh:
            empty(self.folder)
        claim(self.folder, self.config)
        if not goes_on:
            journal.write_to(self.folder / TIMEOUTS)
        remove_leftovers(self.folder / "checkpoints")
        return bench

    def compute_features(self, bench: Workbench, folder: FeatureFolder) -> None:
        with self.phases("features"):
            for name, decision in settle(bench, folder, self.folder / "features.json").items():
                if not decision.cached:
                    self.console.print(f"features of {name} are not kept: {decision.why}")
            batches = bench.batches_to_cache()
            if batches:
                count = sum(len(batch) for batch in batches)
                with bar(self.console, "computing features", count) as advance:
                    bench.cache_features(batches, lambda n: advance(n, None))

    def measure_before(self, bench: Workbench) -> dict[str, Any]:
        """Measured once per run; a resumed run reads what it wrote."""
        file = self.folder / "before.json"
        if file.is_file():
            found: dict[str, Any] = read_json(file)
            self.phases.add(found.pop("phases"))
            return found
        with self.phases("before"):
            self.console.print("measuring the untrained model on the test rows")
            measured = asdict(bench.suite.measure(bench.data.test))
            measured["captions"] = bench.suite.captions(self._shown(bench))
        write_json(file, measured | {"phases": self.phases.state("features", "before")})
        return measured

    def _shown(self, bench: Workbench) -> list[Sample]:
        """Test rows for captions: spread over the test rows as the split orders them."""
        test = bench.data.test
        count = min(self.config.evaluation.captions, len(test))
        return [test[i * len(test) // count] for i in range(count)]

    def train(self, bench: Workbench, learner: Learner) -> Progress:
        self._losses = LossTable(self.folder / "losses.csv", _row_columns(bench))
        with (
            self.phases("train"),
            closing(Ledger(self.folder / "ledger.jsonl")) as ledger,
            bench.loader(ledger) as loader,
        ):
            module = self._module(bench, learner, loader)
            self._resume(learner, module, loader)
            if not module.finished:
                self._fit(module)
            self._rows = loader.drawn
        progress = module.progress
        if not module.finished:
            raise Interrupted(
                f"stopped after step {progress.step} of {self.config.train.steps}, which is saved "
                f"in {self.folder}; run the same command again to go on from there"
            )
        return progress

    def _module(self, bench: Workbench, learner: Learner, loader: Any) -> PlaitModule:
        hooks = Hooks(
            log=self._log,
            validate=lambda: self._validate(bench),
            keep_best=lambda step: self._keep_best(learner, step),
            checkpoint=lambda step: self._checkpoint(module, loader, step),
            stop_requested=self._stop.is_set,
        )
        module = PlaitModule(learner, loader, self.config.train, Progress(), hooks)
        return module

    def _fit(self, module: PlaitModule) -> None:
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        self._loggers = make_loggers(self.folder, module.progress.step)
        with self._stop_at_next_step():
            fit(module, self._loggers)

    def _log(self, metrics: dict[str, float], step: int) -> None:
        self._losses.append(metrics, step)
        with writing(self.folder / "logs"):
            for logger in self._loggers:
                logger.log_metrics(metrics, step)

    def _validate(self, bench: Workbench) -> float | None:
        samples = bench.data.validation
        return per_token(nll(bench.built.model, bench.reader, samples)) if samples else None

    @property
    def _checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def _keep_best(self, learner: Learner, step: int) -> None:
        folder, kept = self._checkpoints / f"best-{step:06d}", learner.snapshot(weights_only=True)
        checkpoint.save(folder, learner.built, weights=kept.weights)

    def _checkpoint(self, module: PlaitModule, loader: Any, step: int) -> None:
        with writing(self.folder / "logs"):
            for logger in self._loggers:
                logger.save()
        snapshot = module.learner.snapshot()
        assert snapshot.state is not None
        snapshot.state.extra = {
            "loader": loader.state_dict(),
            "progress": asdict(module.progress),
            "losses": self._losses.state(),
            "phases": self.phases.state("train"),
        }
        newest = self._checkpoints / f"step-{step:06d}"
        checkpoint.save(newest, module.learner.built, snapshot.state, weights=snapshot.weights)
        self._prune(newest, module.progress.best_step)

    def _prune(self, newest: Path, best_step: int) -> None:
        """Keep what was just written and those before it; any later one proved damaged."""
        steps = sorted(self._checkpoints.glob("step-*"))
        later = [path for path in steps if path.name > newest.name]
        earlier = [path for path in steps if path.name <= newest.name]
        best = [
            path for path in self._checkpoints.glob("best-*")
            if path.name != f"best-{best_step:06d}"
        ]  # fmt: skip
        for path in [*later, *earlier[: -self.config.train.keep_checkpoints], *best]:
            checkpoint.delete(path)

    def _resume(self, learner: Learner, module: PlaitModule, loader: Any) -> None:
        """Go on from the newest checkpoint that is whole.

        Raises:
            CheckpointError: there are some and none is whole, or they are of another model.
        """
        saved = sorted(self._checkpoints.glob("step-*"), reverse=True)
        for folder in saved:
            try:
                snapshot = checkpoint.read(folder, learner.built)
            except DamagedCheckpointError as error:
                self.console.print(f"[yellow]warning:[/] {error}")
                continue
            state = snapshot.state
            if state is None:
                continue
            learner.restore(snapshot)
            loader.load_state_dict(state.extra["loader"])
            self._losses.restore(state.extra["losses"])
            module.progress = Progress(**state.extra["progress"])
            self.phases.add(state.extra["phases"])
            self.console.print(f"resuming after step {state.step}")
            return
        if saved:
            raise CheckpointError(
                f"a run goes on from a whole checkpoint, and none of the {len(saved)} in "
                f"{self._checkpoints} is; add --fresh to begin anew"
            )
        # What a run that was killed before its first checkpoint wrote is done again.
        loader.ledger.restore(empty_state())
        self._losses.restore(0)

    @contextmanager
    def _stop_at_next_step(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM ends the run at the end of its step; a second one at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {sign: signal.getsignal(sign) for sign in STOPS}

        def request(number: int, frame: FrameType | None) -> None:
            del number, frame
            if self._stop.is_set():  # not KeyboardInterrupt, at which Lightning ends the process
                raise Interrupted(
                    f"stopped in the middle of a step; what was saved before is in {self.folder}, "
                    "and the same command goes on from there"
                )
            self._stop.set()
            self.console.print("\nstopping at the end of this step; a checkpoint will be saved")

        for sign in STOPS:
            signal.signal(sign, request)
        try:
            yield
        finally:
            for sign, handler in before.items():
                signal.signal(sign, handler)

    def finish(
        self, bench: Workbench, learner: Learner, before: dict[str, Any], progress: Progress
    ) -> dict[str, Any]:
        """Measure the best weights on the test rows and write what the report reads."""
        best = self._checkpoints / f"best-{progress.best_step:06d}"
        learner.restore(checkpoint.read(best, bench.built, with_state=False))
        with self.phases("after"):
            self.console.print("measuring the trained model on the test rows")
            measured = bench.suite.measure(bench.data.test)
            shown = self._shown(bench)
            after = bench.suite.captions(shown)
        before = dict(before)
        write_json(self.folder / "captions.json", [
            _caption_row(sample, old, new, self.config.data.limits)
            for sample, old, new in zip(shown, before.pop("captions"), after, strict=True)
        ])  # fmt: skip
        metrics = self._metrics(bench, before, measured, progress)
        write_json(self.folder / "metrics.json", metrics)
        return metrics

    def _metrics(
        self, bench: Workbench, before: dict[str, Any], after: Measured, progress: Progress
    ) -> dict[str, Any]:
        splits = bench.data.splits
        test = asdict(after)
        notes = [*test.pop("notes"), *splits.notes]
        before.pop("notes")
        seconds = {name: round(value, 2) for name, value in self.phases.seconds.items()}
        return {
            "name": self.config.name,
            "test": test,
            "before": before,
            "best_step": progress.best_step,
            "validation_nll": progress.best_nll,
            "steps": progress.step,
            "seconds": seconds | {"total": round(sum(self.phases.seconds.values()), 2)},
            "memory_mb": {name: round(mb) for name, mb in self.phases.memory_mb.items()},
            "peak_memory_mb": round(self.phases.peak_memory_mb),
            "parameters": parameter_counts(bench.built.model),
            "cached_encoders": sorted(bench.loading.caches),
            "packed": bench.built.model.packs,
            "data": {
                "train": len(splits.train),
                "validation": len(splits.validation),
                "test": len(splits.test),
                "moved": splits.moved,
                "classes": bench.data.classes,
                "rows": self._rows,
            },
            "notes": list(dict.fromkeys(notes)),
            "config": plain(self.config),
            "seed": self.config.seed,
            "threads": torch.get_num_threads(),
            "versions": {name: version(name) for name in VERSIONS},
        }


def _row_columns(bench: Workbench) -> list[str]:
    """The columns that say how many rows of each dataset of a blend were trained on so far."""
    names = [share.name for share in bench.data.shares]
    return [f"{ROWS_DRAWN}{name}" for name in names] if len(names) > 1 else []


def _caption_row(sample: Sample, before: str, after: str, limits: Limits) -> dict[str, Any]:
    media = sample.media()
    return {
        "id": sample.id,
        "media": [asdict(show(part, limits)) for part in media],
        "prompt": prompt_text(sample),
        "reference": answer_of(sample),
        "before": before,
        "after": after,
        "label": sample.label,
    }


def train(config: RunConfig, console: Console, *, fresh: bool = False) -> dict[str, Any] | None:
    """Do what is left of a run; None where it is already finished.

    Args:
        fresh: Begin anew whatever the folder holds.

    Raises:
        ConfigError: the folder holds a run with another recipe.
    """
    finished = config.folder / "metrics.json"
    if finished.is_file() and not fresh:
        if decisive(read_json(config.folder / "run.json")) != decisive(plain(config)):
            raise ConfigError(
                f"{config.folder} holds a finished run with another recipe; choose another run_dir "
                "or add --fresh to delete it"
            )
        return None
    return TrainingRun(config, console, fresh).execute()

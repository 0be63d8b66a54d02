"""Trains in forked children that kill themselves at a chosen moment.

A fork server: torch and plait are imported once, each attempt is a process of its own. Reads one
JSON line per attempt, {"folder", "phase", "nth"}, and answers each with one: {"ended"}, the exit
code, or minus the signal. The moments are set by wrapping what the product calls; the product
itself knows nothing of them.
"""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import plait

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger  # noqa: F401  (load it once)
from transformers.models.llama import modeling_llama  # noqa: F401
from transformers.models.vit import modeling_vit  # noqa: F401

import plait.encoders.hf_vision.encoder
from plait import cli
from plait.datasets.ledger import Ledger
from plait.trainer import checkpoint, files, run
from plait.trainer.lightning_run import PlaitModule
from plait.trainer.model import PlaitModel
from plait.trainer.run import TrainingRun

Kill = Callable[[], None]


def around(owner: Any, name: str, kill: Kill, *, before: bool = False,
           when: Callable[..., bool] = lambda *_: True) -> None:  # fmt: skip
    """Call `kill` before or after each call of `owner.name` whose arguments pass `when`."""
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        counts = when(*args)
        if before and counts:
            kill()
        result = original(*args, **kwargs)
        if not before and counts:
            kill()
        return result

    setattr(owner, name, wrapped)


def half_written(kill: Kill) -> None:
    """Weights of a checkpoint to resume from are cut off in the middle of a file."""
    original = checkpoint.save_file

    def wrapped(tensors: Any, path: Path, **kwargs: Any) -> None:
        original(tensors, path, **kwargs)
        if path.parent.name.startswith(".writing-step"):
            os.truncate(path, path.stat().st_size // 2)
            kill()

    checkpoint.save_file = wrapped


def _to_step(path: Path, *_: Any) -> bool:
    return path.name.startswith("step-")


PHASES: dict[str, Callable[[Kill], None]] = {
    "nothing": lambda kill: None,
    "forward pass": lambda kill: around(
        PlaitModel, "compute", kill, when=lambda model, *_: model.training
    ),
    "accumulation": lambda kill: around(
        PlaitModule, "training_step", kill, when=lambda module, *_: module._packs > 0
    ),
    # Half of the parameter groups have stepped, the other half has not.
    "optimiser step": lambda kill: around(import_module("torch.optim.adam"), "adam", kill),
    "after the step": lambda kill: around(PlaitModule, "_after_step", kill, before=True),
    "row logged": lambda kill: around(TrainingRun, "_log", kill),
    "best kept": lambda kill: around(TrainingRun, "_keep_best", kill),
    "ledger synced": lambda kill: around(Ledger, "state", kill),
    "writing a checkpoint": half_written,
    "before its rename": lambda kill: around(files, "_replace", kill, before=True, when=_to_step),
    "after its rename": lambda kill: around(
        Path, "rename", kill, when=lambda path, target: _to_step(target)
    ),
    "pruning": lambda kill: around(
        checkpoint.shutil, "rmtree", kill, before=True, when=lambda path, *_: _to_step(path)
    ),
    "writing metrics": lambda kill: around(
        run, "write_json", kill, before=True, when=lambda path, *_: path.name == "metrics.json"
    ),
}


class Countdown:
    """Kills this process, as no handler can prevent, at the n-th call."""

    def __init__(self, nth: int) -> None:
        self.left = nth

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def child(folder: Path, install: Callable[[], None], words: list[str]) -> None:
    """What an attempt does in its own process: the command line, with its output in a file."""
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 70
    try:
        os.chdir(folder)
        install()
        code = cli.main(words)
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        asked = json.loads(line)
        install = partial(PHASES[asked["phase"]], Countdown(asked["nth"]))
        number = os.fork()
        if number == 0:
            child(Path(asked["folder"]), install, asked["words"])
        _, status = os.waitpid(number, 0)
        print(json.dumps({"ended": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    assert plait.__file__
    serve()

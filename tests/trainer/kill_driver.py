"""Trains in forked children that kill themselves at a chosen moment.

A fork server: torch and plait are imported once, each attempt is a process of its own. Reads one
JSON line per attempt, {"folder", "phase", "nth", "disk"}, and answers each with one: {"ended"}, the
exit code, or minus the signal. The moments are set by wrapping what the product calls; the product
itself knows nothing of them.
"""

import ctypes
import gc
import json
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import plait

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from PIL import Image

from plait import cli
from plait.datasets.ledger import Ledger
from plait.datasets.loader import Loader
from plait.encoders.feature_cache import FeatureCache
from plait.trainer import checkpoint, files, run
from plait.trainer.lightning_run import PlaitModule
from plait.trainer.model import PlaitModel
from plait.trainer.run import TrainingRun

LATER = (
    "jsonargparse", "peft", "plait.encoders.hf_vision.encoder",
    "tensorboard.plugins.hparams.plugin_data_pb2", "torch.utils.tensorboard",
    "transformers.models.auto.tokenization_auto", "transformers.models.llama.modeling_llama",
    "transformers.models.vit.image_processing_vit", "transformers.models.vit.modeling_vit",
)  # fmt: skip
"""What a run would import by itself, in every child again."""

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


def by_the_clock(kill: "Countdown") -> None:
    """At a moment of wall clock, in whatever thread and line that is."""
    after = threading.Timer(kill.when.start / 1000, os.kill, [os.getpid(), kill.number])
    after.daemon = True
    after.start()


def _to_step(path: Path, *_: Any) -> bool:
    return path.name.startswith("step-")


PHASES: dict[str, Callable[[Any], None]] = {
    "nothing": lambda _: None,
    "computing features": lambda kill: around(FeatureCache, "put", kill),
    "by the clock": by_the_clock,
    "decoding ahead": lambda kill: around(Loader, "_work", kill),
    "pack given": lambda kill: around(Loader, "_write_journal", kill),
    "forward pass": lambda kill: around(
        PlaitModel, "score", kill, when=lambda model, *_: model.training
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
    "before its rename": lambda kill: around(
        files, "replace_folder", kill, before=True, when=_to_step
    ),
    "after its rename": lambda kill: around(
        Path, "rename", kill, when=lambda _, target: _to_step(target)
    ),
    "pruning": lambda kill: around(
        checkpoint.shutil, "rmtree", kill, before=True, when=lambda path, *_: _to_step(path)
    ),
    "writing metrics": lambda kill: around(
        run, "write_json", kill, before=True, when=lambda path, *_: path.name == "metrics.json"
    ),
}


INTERRUPTS = {
    "Ctrl-C": (signal.SIGINT, 1),
    "Ctrl-C twice": (signal.SIGINT, 2),
    "SIGTERM": (signal.SIGTERM, 1),
}
"""Signals that come during so many micro-batches, one after another."""

NO_MOUNT, CRASHED = 77, 70
"""Exit codes of a child that may not mount a small disk, and of one that raised."""


class Countdown:
    """Sends a signal to this process at the n-th call, and at the next ones if `times` > 1."""

    def __init__(self, nth: int, number: int = signal.SIGKILL, times: int = 1) -> None:
        self.calls, self.when, self.number = 0, range(nth, nth + times), number

    def __call__(self) -> None:
        self.calls += 1
        if self.calls in self.when:
            os.kill(os.getpid(), self.number)


def install(phase: str, nth: int) -> None:
    if phase in INTERRUPTS:
        around(PlaitModule, "training_step", Countdown(nth, *INTERRUPTS[phase]), before=True)
    else:
        PHASES[phase](Countdown(nth))


def mount(folder: Path, kilobytes: int) -> None:
    """A disk of this size at `folder`, which only this process sees; as root, or in a namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, new_user, private = 0x20000, 0x10000000, (1 << 18) | (1 << 14)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(new_mounts) and not libc.unshare(new_mounts | new_user):
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    libc.mount(b"none", b"/", None, private, None)
    folder.mkdir()
    if libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, f"size={kilobytes}k".encode()):
        folder.rmdir()
        os._exit(NO_MOUNT)


def child(folder: Path, asked: dict[str, Any]) -> None:
    """What an attempt does in its own process: the command line, with its output in a file."""
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = CRASHED
    try:
        os.chdir(folder)
        install(asked["phase"], asked["nth"])
        if asked["disk"]:
            mount(folder / "run", asked["disk"])
        code = cli.main(["train", "recipe.yaml"])
        if asked["disk"]:  # the disk goes with this process
            shutil.copytree("run", "left")
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    torch.set_num_threads(1)
    Image.init()
    for name in LATER:
        import_module(name)
    gc.collect()
    gc.freeze()  # collecting would touch, and so copy, every page that the children share
    for line in sys.stdin:
        asked = json.loads(line)
        number = os.fork()
        if number == 0:
            child(Path(asked["folder"]), asked)
        _, status = os.waitpid(number, 0)
        print(json.dumps({"ended": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    assert plait.__file__
    serve()

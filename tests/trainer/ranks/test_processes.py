"""Processes of ranks end with what they belong to, however that ends."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from plait.errors import RankDiedError
from plait.trainer.engine.controller import Engine, EngineSettings
from plait.trainer.ranks import children
from tests.trainer.ranks.conftest import Driver
from tests.trainer.ranks.test_deaths import kill

PROGRAM = """
import gc
import os
import signal
import sys
import time

import torch
import plait_test_beside
from plait.stream import Message, Sample
from plait.modalities import Text
from plait.trainer.engine import commands
from plait.trainer.losses import Loss
from plait.trainer.model import Objective
from plait.trainer.spec import LoraSpec, ModelSpec
from plait.stream import render
from plait.modalities import Limits
from plait.trainer.engine.controller import Engine, EngineSettings


parent = os.getppid()
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored


def wait(*said):
    try:  # around what is said, too: Ctrl-C follows at once
        print(*said, flush=True)
        while os.getppid() == parent:  # a read that begins as the signal comes would not end
            time.sleep(0.02)
    except KeyboardInterrupt:
        return "interrupted"


spec = ModelSpec(language=sys.argv[1], lora=LoraSpec(rank=2), train=("language",))
engine = Engine(EngineSettings(devices=2))
name, built = engine.create_run(spec, 0, Limits())
print(wait(*engine._work.team.pids), flush=True)
turns = (Message("user", (Text("a shape"),)), Message("assistant", (Text("a red disc"),)))
document = render(Sample(turns), built.tokenizer, built.layout)
loss = Loss(name="beside", function=plait_test_beside.loss, inputs=(), optional=("weights",))
futures = [engine.forward_backward(name, [document] * 2, Objective(loss, {})) for _ in range(3)]
futures.append(engine.submit(commands.DropRun(name)))
del engine
gc.collect()
for future in futures:
    future.result(timeout=60)
wait("done")
while torch.distributed.is_initialized():
    time.sleep(0.01)
engine = Engine(EngineSettings(devices=2))
wait(*engine._work.team.pids)
"""

BESIDE = """
def loss(batch):
    return batch.per_document(-batch.logprobs * batch.weights)
"""


def gone(pids: Sequence[int], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(_alive(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def _alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z"
    return False


def test_interrupted_forgotten_and_killed(tiny_language: Path, tmp_path: Path) -> None:
    """Ctrl-C is the program's alone; an engine that nobody holds ends its ranks when what is
    queued is done, with a loss of a module beside the program; so does a program that is killed."""
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "plait_test_beside.py").write_text(BESIDE)
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py"), str(tiny_language)],
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    ) as program:  # fmt: skip
        assert program.stdout is not None
        try:
            pids = [int(word) for word in program.stdout.readline().split()]
            assert pids and all(map(_alive, pids))
            os.killpg(program.pid, signal.SIGINT)  # as a terminal does
            assert program.stdout.readline() == "interrupted\n"
            assert program.stdout.readline() == "done\n"
            assert gone(pids)
            os.killpg(program.pid, signal.SIGINT)
            pids = [int(word) for word in program.stdout.readline().split()]
            assert pids and all(map(_alive, pids))
        finally:
            program.kill()
        assert gone(pids)


def test_an_engine_whose_ranks_cannot_be_started_says_so_to_all(
    tmp_path: Path, specs: Any, lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(EngineSettings(devices=2, strategy="fsdp"))
    two = Driver(engine, specs["full"], tmp_path)
    two.submit(lab.samples).result()
    monkeypatch.setattr(children.Child, "ready", _never)
    kill(engine)
    futures = [two.submit(lab.samples), two.step(), two.submit(lab.samples)]
    for future in futures:
        with pytest.raises(RankDiedError, match=r"rank 1 ended|make a new ServiceClient"):
            future.result(timeout=60)
    with pytest.raises(RankDiedError, match="make a new ServiceClient"):
        two.step().result(timeout=60)
    engine.close()


def _never(child: Any) -> None:
    raise RankDiedError("it has not come so far")

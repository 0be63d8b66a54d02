"""Three ranks, which most sizes cannot be divided by, and a client closed in the middle."""

from pathlib import Path
from typing import Any

from plait.trainer.engine import commands
from plait.trainer.engine.controller import Engine, EngineSettings
from plait.trainer.model import LEARN
from plait.trainer.optimiser import StepSettings
from tests.trainer.ranks.conftest import Make, assert_close
from tests.trainer.ranks.test_processes import gone

MOMENTUM = StepSettings(
    optimizer="sgd", learning_rate=0.01, grad_clip_norm=0.5, options={"momentum": 0.9}
)


def test_three_ranks_train_what_one_does(
    strategy: str, alone: Engine, drive: Make, lab: Any, loss_module: Path
) -> None:
    three = Engine(EngineSettings(devices=3, strategy=strategy))
    pids = three._work.team.pids
    try:
        for kind in ("lora", "full"):
            _compare(three, alone, drive, lab, kind)
        many = drive(three)
        documents = many.documents(lab.samples * 2)
        batches = [[number] for number in range(len(documents))]
        queued = [
            three.submit(commands.ForwardBackward(many.name, documents, batches, LEARN)),
            many.step(MOMENTUM),
        ]
    finally:
        three.close()
    for future in queued:  # a client that is closed has done what was queued
        future.result(timeout=0)
    assert gone(pids, seconds=0.1)


def _compare(three: Engine, alone: Engine, drive: Make, lab: Any, kind: str) -> None:
    many, one = drive(three, kind), drive(alone, kind)
    for samples in (lab.samples, lab.samples[:1], lab.samples[1:]):
        for driver in (many, one):
            driver.submit(samples)
            driver.step(MOMENTUM)
    many.submit(lab.samples[:3])
    one.submit(lab.samples[:3])
    back = drive(three, kind)
    back.load(one.save())
    for driver in (many, one, back):
        driver.step(MOMENTUM).result()
    assert_close(many.weights(), one.weights(), 1e-4)
    assert_close(back.weights(), one.weights(), 1e-4)

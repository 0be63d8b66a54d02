"""Guarantee 6: killed anywhere and resumed, a run is the uninterrupted run. Real processes."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from plait.datasets.ledger import count
from plait.errors import Interrupted
from plait.trainer.manifest import verify

DRIVER = Path(__file__).with_name("kill_driver.py")

MOMENTS = {
    "computing features": 20,
    "forward pass": 11,
    "accumulation": 9,
    "optimiser step": 9,
    "after the step": 3,
    "row logged": 3,
    "best kept": 1,
    "ledger synced": 2,
    "writing a checkpoint": 4,
    "before its rename": 2,
    "after its rename": 2,
    "pruning": 1,
    "writing metrics": 1,
}
"""Each phase, and the largest n of which the n-th call is the last thing a process does."""

TIMES = ("seconds", "memory_mb", "peak_memory_mb")


class Driver:
    """The fork server of kill_driver.py."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.environment = os.environ | {"PLAIT_HOME": str(home), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, DRIVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self.environment,
            text=True,
        )

    def run(self, folder: Path, phase: str = "nothing", nth: int = 1, disk: int = 0) -> int:
        """Exit code of one attempt; -9 where it was killed. `disk` is in kilobytes."""
        if phase == "computing features":
            shutil.rmtree(self.home / "features", ignore_errors=True)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        asked = {"folder": str(folder), "phase": phase, "nth": nth, "disk": disk}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return int(json.loads(self._process.stdout.readline())["ended"])

    def start(self, folder: Path) -> "subprocess.Popen[str]":
        """The same command in an interpreter of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "plait.cli", "train", "recipe.yaml"],
            cwd=folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    driver = Driver(tmp_path_factory.mktemp("resume-home"))
    yield driver
    driver.close()


@pytest.fixture(scope="module")
def values(tiny_values: dict[str, Any]) -> dict[str, Any]:
    train = tiny_values["train"] | {
        "steps": 8, "accumulate": 4, "prefetch": 4, "checkpoint_every": 2,
        "cache_features": "always",
    }  # fmt: skip
    assert tiny_values["model"]["lora"]["dropout"] > 0
    assert tiny_values["views"]["count"] == 2
    return tiny_values | {"train": train, "evaluation": {"captions": 1}}


def begin(folder: Path, values: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.fixture(scope="module")
def uninterrupted(
    driver: Driver, values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = begin(tmp_path_factory.mktemp("uninterrupted"), values)
    assert driver.run(folder) == 0, (folder / "output.txt").read_text()
    return folder / "run"


def metrics(run: Path) -> dict[str, Any]:
    values = json.loads((run / "metrics.json").read_text())
    return {key: value for key, value in values.items() if key not in TIMES}


def losses(run: Path) -> list[dict[str, str]]:
    with (run / "losses.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def weights(run: Path) -> dict[str, torch.Tensor]:
    found = {}
    for folder in (run / "checkpoints").iterdir():
        for file in folder.glob("*.safetensors"):
            for name, tensor in load_file(file).items():
                found[f"{folder.name}/{file.name}/{name}"] = tensor
    return found


def assert_same_run(run: Path, other: Path) -> None:
    """Weights, optimiser, random state, losses, ledger and metrics: all that a run leaves."""
    mine, theirs = weights(run), weights(other)
    assert mine.keys() == theirs.keys()
    different = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert not different
    assert losses(run) == losses(other)
    mine_count, theirs_count = count(run / "ledger.jsonl"), count(other / "ledger.jsonl")
    assert mine_count == theirs_count
    assert not mine_count.twice
    assert (run / "ledger.jsonl").read_bytes() == (other / "ledger.jsonl").read_bytes()
    assert metrics(run) == metrics(other)


def draw(seed: int) -> list[tuple[str, int]]:
    """Every phase once, in a seeded order, at a seeded call of it."""
    generator = random.Random(seed)
    phases = list(MOMENTS)
    generator.shuffle(phases)
    return [(phase, generator.randint(1, MOMENTS[phase])) for phase in phases]


def test_killed_at_seeded_moments(
    driver: Driver, values: dict[str, Any], uninterrupted: Path, tmp_path: Path
) -> None:
    histogram: Counter[str] = Counter()
    folder = begin(tmp_path / "0", values)
    finished = 0
    for phase, nth in draw(20261):
        ended = driver.run(folder, phase, nth)
        while ended == 0:  # it ended before its moment came: a new run meets it
            assert_same_run(folder / "run", uninterrupted)
            finished += 1
            assert finished < 12, f"{phase} {nth} never comes"
            folder = begin(tmp_path / str(finished), values)
            ended = driver.run(folder, phase, nth)
        assert ended == -signal.SIGKILL, (folder / "output.txt").read_text()
        histogram[phase] += 1
    assert driver.run(folder) == 0, (folder / "output.txt").read_text()
    assert_same_run(folder / "run", uninterrupted)
    print(f"\nkilled in: {dict(histogram)}; {finished + 1} runs resumed to their end")
    assert set(histogram) == set(MOMENTS)


def test_a_fresh_interpreter_killed_then_interrupted(
    driver: Driver, values: dict[str, Any], uninterrupted: Path, tmp_path: Path
) -> None:
    """SIGKILL at a random time, Ctrl-C once, Ctrl-C twice, and then to the end."""
    folder = begin(tmp_path / "fresh", values)
    process = driver.start(folder)
    while not (folder / "run/checkpoints/step-000002").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    time.sleep(random.Random(7).uniform(0, 0.1))
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.communicate()

    reached = newest(folder)
    assert reached < 7, "the killed process was already done"
    assert driver.run(folder, "Ctrl-C", 3) == Interrupted.exit_code
    output = (folder / "output.txt").read_text()
    assert f"resuming after step {reached}" in output
    assert "stopping at the end of this step" in output
    assert f"stopped after step {reached + 1} of 8, which is saved in run" in output
    assert "run the same command again to go on" in output
    assert newest(folder) == reached + 1
    assert not (folder / "run/metrics.json").exists()

    assert driver.run(folder, "Ctrl-C twice", 2) == Interrupted.exit_code
    assert "Traceback" not in (folder / "output.txt").read_text()
    assert newest(folder) == reached + 1, "the second one stops at once"

    assert driver.run(folder) == 0, (folder / "output.txt").read_text()
    assert_same_run(folder / "run", uninterrupted)


def test_a_scheduler_that_stops_it_loses_no_step(
    driver: Driver, values: dict[str, Any], uninterrupted: Path, tmp_path: Path
) -> None:
    """As `timeout`, systemd and Slurm do: it is no success, and the step under way is saved."""
    folder = begin(tmp_path / "fresh", values)
    assert driver.run(folder, "SIGTERM", 3) == Interrupted.exit_code
    step = newest(folder)
    output = (folder / "output.txt").read_text()
    assert f"stopped after step {step} of 8, which is saved in run" in output, output
    assert "Traceback" not in output
    assert driver.run(folder) == 0, (folder / "output.txt").read_text()
    assert_same_run(folder / "run", uninterrupted)


def newest(folder: Path) -> int:
    whole = (folder / "run" / "checkpoints").glob("step-*/manifest.json")
    return max(int(path.parent.name.removeprefix("step-")) for path in whole)


def test_a_full_disk_while_saving(
    driver: Driver, values: dict[str, Any], uninterrupted: Path, tmp_path: Path
) -> None:
    """One clear line, the earlier checkpoint stays, and with more room the run goes on exactly."""
    folder = begin(tmp_path / "full", values)
    one = kilobytes(max((uninterrupted / "checkpoints").glob("step-*")))
    best = kilobytes(next((uninterrupted / "checkpoints").glob("best-*")))
    rest = kilobytes(uninterrupted) - kilobytes(uninterrupted / "checkpoints")
    ended = driver.run(folder, disk=one + best + rest + one // 2)
    if ended == 77:
        pytest.skip("this machine lets nobody mount a size-limited tmpfs")
    output = (folder / "output.txt").read_text()
    assert ended == 1, output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "run/checkpoints/step-000004 cannot be written" in errors[0]
    assert "free some space" in errors[0]
    assert "Traceback" not in output
    left = folder / "left"
    assert not list(left.rglob(".writing-*"))
    verify(left / "checkpoints" / "step-000002")
    assert not (left / "checkpoints" / "step-000004").exists()
    (folder / "run").rmdir()
    left.rename(folder / "run")
    assert driver.run(folder) == 0, (folder / "output.txt").read_text()
    assert "resuming after step 2" in (folder / "output.txt").read_text()
    assert_same_run(folder / "run", uninterrupted)


def kilobytes(folder: Path) -> int:
    """Room that a folder's files take, in pages of 4 KB."""
    return sum(4 * -(-path.stat().st_size // 4096) for path in folder.rglob("*") if path.is_file())


def test_a_run_that_stopped_early_is_not_trained_further(
    driver: Driver, values: dict[str, Any], tmp_path: Path
) -> None:
    """Killed after its last step, a run that lost patience only measures when it is resumed."""
    train = values["train"] | {"learning_rate": 0.0, "validate_every": 1, "patience": 1}
    folder = begin(tmp_path / "patience", values | {"train": train})
    assert driver.run(folder, "writing metrics") == -signal.SIGKILL
    before = losses(folder / "run")
    assert driver.run(folder) == 0
    assert losses(folder / "run") == before
    found = metrics(folder / "run")
    assert (found["steps"], found["best_step"]) == (2, 1)


CLOCK = "by the clock"
MIXED = {
    "decoding ahead": 40,
    "pack given": 12,
    "accumulation": 9,
    "optimiser step": 9,
    "after the step": 3,
    "ledger synced": 2,
    "writing a checkpoint": 4,
}
"""Moments of a mixed run, as `MOMENTS`; every third kill is at a moment of the clock."""


@pytest.fixture(scope="module")
def mixed_values(
    values: dict[str, Any], mixed_media: dict[str, Path], tiny_vision: Path
) -> dict[str, Any]:
    """Four media in a blend, one file in ten of them broken; everything is decoded on the way."""
    data = values["data"]
    pictures = {"name": "pictures", "path": data["path"], "captions": data["captions"]}
    blend = [{"data": pictures, "weight": 2, "epochs": 3}]
    for name, path in mixed_media.items():
        blend.append({"data": {"name": name, "path": str(path)}, "weight": 1})
    image = values["model"]["encoders"]["image"]
    film = {"name": "video", "grid": [1, 1], "timestamps": True}
    film["options"] = {"image": "hf_vision", "weights": str(tiny_vision), "count": 2}
    encoders = {"image": image, "audio": {"name": "mel"}, "video": film}
    split = {"test": 2, "validation": 1, "near_duplicate_bits": None}
    return values | {
        "data": {
            "blend": blend, "split": split,
            "broken": {"on_error": "skip", "max_consecutive": None},
        },
        "model": values["model"] | {"encoders": encoders},
        "train": values["train"] | {"workers": 2, "cache_features": "never", "capacity": 96},
    }  # fmt: skip


@pytest.fixture(scope="module")
def mixed_uninterrupted(
    driver: Driver, mixed_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = begin(tmp_path_factory.mktemp("mixed"), mixed_values)
    assert driver.run(folder) == 0, (folder / "output.txt").read_text()
    return folder / "run"


def test_a_mixed_run_says_what_it_drew(mixed_uninterrupted: Path) -> None:
    found = metrics(mixed_uninterrupted)["data"]["rows"]
    assert set(found) == {"pictures", "sounds", "films", "chats"}
    last = losses(mixed_uninterrupted)[-1]
    assert {name: float(last[f"rows/{name}"]) for name in found} == found
    lines = [json.loads(x) for x in (mixed_uninterrupted / "ledger.jsonl").open()]
    trained = Counter(line["dataset"] for line in lines if line["status"] == "used")
    assert trained == found
    broken = {(line["dataset"], line["row"]) for line in lines if line["status"] == "broken"}
    assert {dataset for dataset, _ in broken} == {"sounds", "films"}
    assert not count(mixed_uninterrupted / "ledger.jsonl").twice


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_a_mixed_run_killed_at_seeded_moments(
    driver: Driver, mixed_values: dict[str, Any], mixed_uninterrupted: Path, tmp_path: Path,
    kills: int,
) -> None:  # fmt: skip
    """Text, pictures, sounds and films in a blend, with workers, look-ahead and accumulation."""
    generator = random.Random(kills)
    folder, attempts, killed = begin(tmp_path / "0", mixed_values), 0, Counter[str]()
    started = time.monotonic()
    while killed.total() < kills:
        attempts += 1
        phase = CLOCK if attempts % 3 == 0 else generator.choice(list(MIXED))
        # What is left of a run takes a second or two here.
        ended = driver.run(folder, phase, generator.randint(1, MIXED.get(phase, 2000)))
        if ended == 0:  # it ended before its moment came: a new run meets the next
            assert_same_run(folder / "run", mixed_uninterrupted)
            folder = begin(tmp_path / str(attempts), mixed_values)
            continue
        assert ended == -signal.SIGKILL, (folder / "output.txt").read_text()
        killed[phase] += 1
    assert driver.run(folder) == 0, (folder / "output.txt").read_text()
    assert_same_run(folder / "run", mixed_uninterrupted)
    print(f"{kills} kills in {time.monotonic() - started:.0f} s: {dict(killed)}")
    assert killed[CLOCK] >= kills // 10, "some fall wherever the clock says"

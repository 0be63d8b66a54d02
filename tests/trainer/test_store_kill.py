"""Guarantee 6 for loops of one's own: killed anywhere, every state that `save_state` acknowledged
loads and goes on bit-equal, and nothing else is left. Real processes."""

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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from plait.trainer.config import config_from
from plait.trainer.spec import LoraSpec

DRIVER = Path(__file__).with_name("store_kill_driver.py")
STEPS = 8

CLOCK = "by the clock"

MOMENTS = {
    CLOCK: 700,
    "computing": 10,
    "optimiser step": 10,
    "writing weights": 24,
    "writing the manifest": 7,
    "before its rename in place": 30,
    "object made": 10,
    "object taken": 4,
    "writing the lifetime": 8,
    "syncing": 80,
    "before its name": 7,
    "old one renamed": 3,
    "new one renamed": 7,
    "half removed": 4,
    "deleting": 2,
    "sweeping": 50,
    "sweeping objects": 7,
    "changing a lifetime": 2,
    "opening": 2,
    "loading": 2,
    "saved, not told": 7,
    "told": 10,
}
"""Each phase, and the largest n of which the n-th call is the last thing a process does; of the
clock, thousandths of the time that a whole loop takes."""

FEW = ["computing", "writing weights", "old one renamed", "object taken", "sweeping objects",
       "saved, not told"]  # fmt: skip

State = tuple[str, float | None] | None
"""What a name may hold: a digest and when it expires, or nothing."""


class Driver:
    """The fork server of store_kill_driver.py."""

    def __init__(self, home: Path, spec: dict[str, Any], picture: Path) -> None:
        self._asked = {"spec": spec, "picture": str(picture), "steps": STEPS}
        self._process = subprocess.Popen(
            [sys.executable, DRIVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PLAIT_HOME": str(home), "OMP_NUM_THREADS": "1"},
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"
        self.whole_seconds = 0.0
        """Of a loop that nobody kills; see `digests`."""

    def run(self, folder: Path, **asked: Any) -> int:
        """Exit code of one attempt; -9 where it was killed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        folder.mkdir(exist_ok=True)
        line = {"folder": str(folder), "phase": "nothing", "nth": 1} | self._asked | asked
        if line["phase"] == CLOCK:
            line["nth"] = max(1, round(line["nth"] * self.whole_seconds))  # milliseconds
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()
        return int(json.loads(self._process.stdout.readline())["ended"])

    def found(self, folder: Path, paths: list[str]) -> dict[str, Any]:
        """What a process that opens a copy of the store finds in it; the store stays as it is."""
        copy = folder.with_name("copy")
        shutil.rmtree(copy, ignore_errors=True)
        subprocess.run(["cp", "-a", folder, copy], check=True)  # keeps hard links
        assert self.run(copy, check=paths) == 0, (copy / "output.txt").read_text()
        found: dict[str, Any] = json.loads((copy / "found").read_text())
        return found

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def driver(
    tiny_values: dict[str, Any], picture_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Driver]:
    model = replace(config_from(tiny_values).model, lora=LoraSpec(rank=12, dropout=0.2))
    picture = picture_folder / "disc" / "00.png"
    driver = Driver(tmp_path_factory.mktemp("kill-home"), asdict(model), picture)
    yield driver
    driver.close()


def journal(folder: Path) -> list[dict[str, Any]]:
    if not (folder / "journal").exists():
        return []
    return [json.loads(line) for line in (folder / "journal").read_text().splitlines()]


class Expected:
    """What a store must and may hold, by what the loop was told.

    Args:
        digests: Of the uninterrupted loop, by kind and step.
    """

    def __init__(self, lines: list[dict[str, Any]], digests: dict[tuple[str, int], str]) -> None:
        self.states: dict[str, set[State]] = {}
        self._digests, self._now = digests, len(lines)
        for clock, line in enumerate(lines, 1):
            self._read(line, clock)

    def _read(self, line: dict[str, Any], clock: int) -> None:
        path = line["path"]
        before = self.states.setdefault(path, {None})
        does = line.get("does", line.get("did"))
        if "did" in line:
            clock -= 1  # of what was intended: nothing ticks between the two
        if does == "delete":
            new: set[State] = {None}
        elif does == "ttl":
            new = {(state[0], float(clock + line["ttl"])) for state in before if state is not None}
            if "did" in line:
                new = {state for state in before if state and state[1] == clock + line["ttl"]}
        else:
            ends = None if line["ttl"] is None else float(clock + line["ttl"])
            new = {(self._digests[path.split("/")[3], line["step"]], ends)}
        if "did" in line and does == "save":
            assert line["digest"] == self._digests[path.split("/")[3], line["step"]]
        self.states[path] = new if "did" in line else before | new

    def live(self, path: str) -> set[State]:
        """What a name may hold now; what expired is nothing."""
        return {
            None if state is None or (state[1] is not None and state[1] <= self._now) else state
            for state in self.states[path]
        }

    def sure(self) -> list[str]:
        """Paths that must be there."""
        return sorted(path for path in self.states if None not in self.live(path))


@pytest.fixture(scope="module")
def digests(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], str]:
    """Of a loop that nobody kills, which runs two steps longer than those that are."""
    folder = tmp_path_factory.mktemp("whole") / "loop"
    start = time.monotonic()
    assert driver.run(folder, steps=STEPS + 2) == 0, (folder / "output.txt").read_text()
    driver.whole_seconds = time.monotonic() - start
    told = [line for line in journal(folder) if line.get("did") == "save"]
    return {(line["path"].split("/")[3], line["step"]): line["digest"] for line in told}


def assert_whole(driver: Driver, folder: Path, digests: dict[tuple[str, int], str]) -> int:
    """Every acknowledged state is there and goes on bit-equal; returns how many went on."""
    lines = journal(folder)
    expected = Expected(lines, digests)
    sure = expected.sure()
    found = driver.found(folder, sure)
    assert found["aside"] == [] and found["unused"] == []
    for path, (digest, ends, problem) in found["listed"].items():
        assert not problem
        assert (digest, ends) in expected.live(path), path
    assert set(sure) <= set(found["listed"])
    for step, digest in found["later"].values():
        assert digest == digests["weights", step + 2]
    return len(found["later"])


def killed(driver: Driver, digests: dict[tuple[str, int], str], root: Path,
           moments: list[tuple[str, int]]) -> Counter[str]:  # fmt: skip
    """Kill at each moment, look, and go on in the same store; the phases that were met."""
    met: Counter[str] = Counter()
    worlds, went_on = 0, 0
    folder = root / "0"
    for phase, nth in moments:
        ended = driver.run(folder, phase=phase, nth=nth)
        tries = 0
        while ended == 0:  # it ended before its moment came: a new loop meets it
            went_on += assert_whole(driver, folder, digests)
            worlds, tries = worlds + 1, tries + 1
            assert tries < 4, f"{phase} {nth} never comes"
            nth = nth // 2 if phase == CLOCK else nth  # the machine is faster than it was
            folder = root / str(worlds)
            if phase in ("loading", "object taken"):  # of a loop that has something to go on from
                assert driver.run(folder, phase="told", nth=9) == -signal.SIGKILL
            ended = driver.run(folder, phase=phase, nth=nth)
        assert ended == -signal.SIGKILL, (folder / "output.txt").read_text()
        met[phase] += 1
        went_on += assert_whole(driver, folder, digests)
    assert driver.run(folder) == 0, (folder / "output.txt").read_text()
    went_on += assert_whole(driver, folder, digests)
    print(f"\n{met.total()} kills in {len(met)} phases: {dict(met)}; {worlds + 1} loops reached "
          f"their end; {went_on} times an acknowledged state went on")  # fmt: skip
    assert went_on > 0
    return met


def drawn(phases: list[str], seed: int) -> list[tuple[str, int]]:
    """Each phase at a seeded call of it, in a seeded order."""
    generator = random.Random(seed)
    shuffled = generator.sample(phases, len(phases))
    return [(phase, generator.randint(1, MOMENTS[phase])) for phase in shuffled]


def test_killed_at_a_few_moments(
    driver: Driver, digests: dict[tuple[str, int], str], tmp_path: Path
) -> None:
    met = killed(driver, digests, tmp_path, drawn(FEW, 7))
    assert set(met) == set(FEW)


@pytest.mark.slow
def test_killed_at_fifty_seeded_moments(
    driver: Driver, digests: dict[tuple[str, int], str], tmp_path: Path
) -> None:
    phases = list(MOMENTS)
    moments = [*drawn(phases, 1), *drawn(phases, 2), *drawn(phases, 3)][:50]
    met = killed(driver, digests, tmp_path, moments)
    assert met.total() == 50 and set(met) == set(MOMENTS)

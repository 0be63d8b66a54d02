"""Nothing that was promised is lost or done twice, whatever is killed when."""

import asyncio
import json
import os
import random
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil
import pytest

from tests.service.kill_driver import ROUND, Clients, Told, differences

RUNS = 4
TARGETS = ("engine", "engine", "engine", "server", "both")
TOLERANCE = 1e-4
"""Relative. Rows are shared with whichever runs are there, so sums differ in their last bits; a
step that is lost or done twice moves logprobs by more than 1e-2."""

OPTIONS = ("--set", "recovery_seconds=0.3", "--set", "gap_seconds=600")


class Killer:
    """Kills at seeded moments, and says what was under way."""

    def __init__(self, server: Any, clients: Clients, seed: int) -> None:
        self._server, self._clients = server, clients
        self._random = random.Random(seed)
        self.targets: Counter[str] = Counter()
        self.phases: Counter[str] = Counter()
        self._position = 0

    async def kill(self) -> None:
        await asyncio.sleep(await self._delay())
        target = self._random.choice(TARGETS)
        engines = self._engines()
        if target != "server" and not engines:
            target = "server"
        self.phases.update(phase for phase, count in self._clients.doing.items() if count)
        if target != "engine":
            os.kill(self._server.process.pid, signal.SIGKILL)
        if target != "server":
            for engine in engines:
                with suppress(psutil.NoSuchProcess):
                    engine.kill()
        self.targets[target] += 1
        if target != "engine":
            await asyncio.to_thread(self._server.process.wait)
            self._read_log()
            self._server.start(wait=False)
        else:
            await asyncio.sleep(0.1)
            self._read_log()

    async def _delay(self) -> float:
        """Mostly in the middle of work, and sometimes while what was killed before comes back."""
        if self.targets and self._random.random() < 0.25:
            return self._random.uniform(0.0, 2.0)
        until, before = time.monotonic() + 60, len(self._clients.told.results)
        while time.monotonic() < until and len(self._clients.told.results) < before + 2 * ROUND:
            await asyncio.sleep(0.05)
        return self._random.uniform(0.0, 1.5)

    def _engines(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self._server.process.pid).children()
        return []

    def _read_log(self) -> None:
        """What the server had begun and not ended when it, or its engine, was killed."""
        text = self._server.log.read_text()
        part, self._position = text[self._position :], len(text)
        begun: dict[str, set[str]] = {"restoring": set(), "keeping": set()}
        for line in part.splitlines():
            event = json.loads(line) if line.startswith("{") else {}
            match event.get("event"):
                case "run_restoring":
                    begun["restoring"].add(event["run"])
                case "run_restored":
                    begun["restoring"].discard(event["run"])
                case "state_keeping":
                    begun["keeping"].add(event["run"])
                case "state_kept":
                    begun["keeping"].discard(event["run"])
        if "engine_ready" not in part:
            self.phases["starting"] += 1
        self.phases.update(phase for phase, which in begun.items() if which)


async def under_kills(server: Any, kills: int, seed: int) -> Told:
    clients = Clients(server.url, RUNS, seed=seed)
    training = asyncio.create_task(clients.run())
    killer = Killer(server, clients, seed)
    for _ in range(kills):
        killing = asyncio.create_task(killer.kill())
        await asyncio.wait([killing, training], return_when=asyncio.FIRST_COMPLETED)
        if training.done():
            training.result()
        await killing
    clients.stop.set()
    try:
        told = await training
    finally:
        print(f"\nkills: {dict(killer.targets)}; under way: {dict(killer.phases)}")
    print(f"operations: {dict(Counter(told.kinds.values()))}; resent: {clients.resent}")
    return told


def check_log(server: Any, told: Told, rows: list[tuple[str, str, int, str]]) -> None:
    """Each promise is in the log once, and is done."""
    done = {(scope, seq): name for name, scope, seq, state in rows if state == "done"}
    assert len(done) == len(rows)
    assert done == told.promises
    for run, rounds in enumerate(told.rounds):
        folder = server.folder / "checkpoints" / told.models[run] / "weights"
        for path in folder.iterdir():
            seq = rounds * ROUND if path.name == "last" else int(path.name[1:])
            steps = sum((one - 1) % ROUND in (2, 4) for one in range(1, seq + 1))
            assert json.loads((path / "state.json").read_text())["step"] == steps, path


async def check_checkpoints(server: Any, told: Told) -> None:
    """Each that was acknowledged is listed, and loads."""
    listed = server.get("/api/v1/checkpoints?limit=1000").json()
    total = listed["cursor"]["total_count"]
    assert total == len(told.saved)
    assert {one["tinker_path"] for one in listed["checkpoints"]} <= set(told.saved)
    clients = Clients(server.url, 0)
    session = told.models[0].split(":")[0]
    for number, path in enumerate(told.saved[:: max(len(told.saved) // 20, 1)]):
        assert await clients.loaded(session, 2000 + number, path)


def run_test(server: Any, kills: int, seed: int, rows: Callable[[], list[Any]]) -> None:
    server.start()
    told = asyncio.run(under_kills(server, kills, seed))
    check_log(server, told, rows())
    asyncio.run(check_checkpoints(server, told))
    reference = asyncio.run(Clients(server.url, RUNS, told.rounds).run())
    server.stop()
    apart = differences(told, reference)
    print(f"largest differences: {apart}")
    assert max(apart.values()) < TOLERANCE, apart


_ROWS = "select id, scope, seq, state from operations"


def sqlite_rows(server: Any) -> list[Any]:
    with sqlite3.connect(server.folder / "plait.db") as connection:
        return connection.execute(_ROWS).fetchall()


def test_a_few_kills(new_server: Callable[..., Any]) -> None:
    server = new_server(*OPTIONS)
    run_test(server, 3, 1, lambda: sqlite_rows(server))


@pytest.mark.slow
def test_seventy_kills(new_server: Callable[..., Any]) -> None:
    server = new_server(*OPTIONS)
    run_test(server, 70, 2, lambda: sqlite_rows(server))


@pytest.mark.slow
def test_thirty_kills_with_postgresql(new_server: Callable[..., Any], postgresql: str) -> None:
    psycopg = pytest.importorskip("psycopg")
    server = new_server(*OPTIONS, "--database", postgresql)

    def rows() -> list[Any]:
        with psycopg.connect(postgresql) as connection:
            return list(connection.execute(_ROWS).fetchall())

    run_test(server, 30, 3, rows)

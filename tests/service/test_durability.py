"""What is on the disk stays, and what the disk or the database does not take is not lost."""

import asyncio
import errno
import os
import socket
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, select

from plait.errors import ConfigError
from plait.service.database.database import Database
from plait.service.database.migrate import migrate
from plait.service.database.payloads import Payloads
from plait.service.database.tables import audit
from plait.service.engine.frames import Channel
from plait.service.errors import UnavailableError
from plait.service.finished import Completions
from plait.service.gate import FairGate, Rate
from plait.service.operations import Outcome
from tests.service.fake_engine import World, in_world, settle, trained


def test_an_operation_ends_once(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        await trained(world)
        learned = await world.log.at("run", 1)
        assert learned is not None
        await world.log.finish(learned, Outcome(error="it came too late"), 0.0)
        assert learned.state == "done" and learned.error is None
        assert (await world.states())[1] == "done"

    in_world(tmp_path, work)


def test_an_unreadable_body_fails_alone(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        await trained(world)
        world.engine.die()
        lost, kept = await world.learn(4, "lost"), await world.learn(5, "c")
        assert lost.body is not None
        file = tmp_path / "payloads" / f"{lost.body.file:010d}.bin"
        for one in (lost, kept):
            one.held = None
        kept.held = b"c"
        file.rename(tmp_path / "away")
        world.engine.start()
        await settle()
        (tmp_path / "away").rename(file)
        assert "cannot be read" in await world.result(lost)

    in_world(tmp_path, work)


def test_a_database_that_is_away_loses_nothing(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        await trained(world)
        world.engine.silent = {"optim_step"}
        stepped = await world.step(4)
        await settle()
        other = sqlite3.connect(tmp_path / "plait.db", isolation_level=None)
        other.execute("PRAGMA busy_timeout=0")
        other.execute("BEGIN IMMEDIATE")
        world.engine.answer("optim_step")
        with pytest.raises(UnavailableError):
            await world.learn(5, "c")
        assert not stepped.ended.is_set()
        other.execute("ROLLBACK")
        await asyncio.wait_for(stepped.ended.wait(), 10)
        await world.ended(await world.learn(5, "c"))
        assert world.engine.held["run"] == ["a", "step 2", "b", "step 4", "c"]
        other.close()

    in_world(tmp_path, work)


def test_a_server_that_stops_does_not_wait_for_a_database_that_is_away(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'plait.db'}"
    migrate(url)
    database = Database(url, patience=600.0)
    other = sqlite3.connect(tmp_path / "plait.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    async def work() -> None:
        writing = asyncio.create_task(database.write(lambda _: None))
        await asyncio.sleep(0.1)
        database.hurry()
        with pytest.raises(UnavailableError):
            await asyncio.wait_for(writing, 30)

    asyncio.run(work())
    other.execute("ROLLBACK")
    other.close()
    database.close()


def test_any_text_may_be_kept_and_looked_for(tmp_path: Path) -> None:
    def work(connection: Any) -> tuple[Any, Any]:
        odd = "\ud800" + 799 * "\0"
        values = {"at": 0.0, "owner": "anna", "key_id": "", "action": "x", "target": odd,
                  "status": 200, "request_id": "x"}  # fmt: skip
        connection.execute(insert(audit).values(**values))
        kept = connection.execute(select(audit.c.target)).scalar_one()
        found = connection.execute(select(audit).where(audit.c.owner == "anna\0")).one_or_none()
        return kept, found

    async def kept(world: World) -> None:
        assert await world.database.write(work) == ("?" + 799 * "␀", None)

    in_world(tmp_path, kept)


def test_a_full_disk_refuses_and_keeps_results_until_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(world: World) -> None:
        await trained(world)
        world.engine.silent = {"optim_step"}
        stepped = await world.step(4)
        await settle()

        def full(_: Any) -> None:
            raise OSError(errno.ENOSPC, "no space left")

        monkeypatch.setattr("os.fdatasync", full)
        with pytest.raises(UnavailableError, match="disk"):
            await world.learn(5, "c")
        world.engine.answer("optim_step")
        await settle()
        assert await world.states() == {0: "done", 1: "done", 2: "done", 3: "done", 4: "queued"}
        monkeypatch.undo()
        await world.ended(stepped, await world.learn(5, "c"))
        assert world.engine.held["run"][-2:] == ["step 4", "c"]

    in_world(tmp_path, work)


def test_completions_that_were_not_told_are_told_by_the_next_process(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        await trained(world)
        await world.ended(await world.view("view", 4))
        await world.sample("view", 0)
        done = await world.log.at("view", 0)
        assert done is not None
        completions = Completions(world.log, lambda: 0.0)
        first = await completions.of("view", 0)
        assert [told["request_id"] for _, told in first.after(0)] == [done.id]
        completions.ended(done)  # as where it ends while it is looked up
        assert len(first.after(0)) == 1
        assert first.after(first.cursor) == []
        await world.log.delivered([done.id], 1.0)
        assert (await Completions(world.log, lambda: 0.0).of("view", 0)).after(0) == []

    in_world(tmp_path, work)


def test_a_file_that_cannot_be_begun_is_not_written_into_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    payloads = Payloads(tmp_path / "payloads", file_bytes=10)
    first = payloads.keep([b"a" * 10])
    opened = os.open

    def full(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if str(path).endswith(".bin"):
            raise OSError(errno.EMFILE, "too many open files")
        return opened(path, flags, *more, **named)

    monkeypatch.setattr("os.open", full)
    with pytest.raises(OSError, match="too many"):
        payloads.keep([b"b"])
    other = (tmp_path / "other").open("wb")  # takes the number of what was closed
    with pytest.raises(OSError, match="too many"):
        payloads.keep([b"c"])
    monkeypatch.undo()
    (ref,) = payloads.keep([b"d"])
    assert (payloads.read(first[0]), payloads.read(ref)) == (b"a" * 10, b"d")
    other.close()
    assert (tmp_path / "other").read_bytes() == b""
    payloads.close()


def test_two_servers_do_not_share_a_folder(tmp_path: Path) -> None:
    first = Payloads(tmp_path)
    with pytest.raises(ConfigError, match="another server"):
        Payloads(tmp_path, lock_seconds=0.0)
    first.close()
    Payloads(tmp_path, lock_seconds=0.0).close()


def test_owners_take_turns() -> None:
    async def work() -> list[str]:
        gate, order = FairGate(1), []
        await gate.enter("first")

        async def one(owner: str) -> None:
            await gate.enter(owner)
            order.append(owner)
            gate.leave()

        tasks = [asyncio.create_task(one(owner)) for owner in ("a", "a", "a", "b", "c")]
        await asyncio.sleep(0)
        tasks[1].cancel()
        gate.leave()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.wait_for(gate.enter("d"), 1)
        return order

    assert asyncio.run(work()) == ["a", "b", "c", "a"]


def test_a_rate_lets_unused_turns_be_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now, slept = [100.0], []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async def work() -> None:
        rate = Rate(3, lambda: now[0])
        for _ in range(4):
            await rate.enter("a")
        assert rate.paused("a") and not rate.paused("b")

    monkeypatch.setattr(asyncio, "sleep", sleep)
    asyncio.run(work())
    assert slept == [20.0]


def test_a_commit_of_sqlite_is_on_the_disk(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        def told(connection: Any) -> list[Any]:
            names = ("journal_mode", "synchronous")
            return [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names]

        assert await world.database.read(told) == ["wal", 2]

    in_world(tmp_path, work)


def test_an_engine_sees_that_its_server_was_killed() -> None:
    """Also where the server had not read its last words: else it would finish what it had begun,
    beside the next one."""
    theirs, mine = socket.socketpair()
    channel = Channel(mine)
    channel.send({"event": "ready"})
    theirs.close()
    assert channel.receive() is None
    channel.close()

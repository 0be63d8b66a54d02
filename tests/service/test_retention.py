"""Results are kept as long as was said, and what a run is made of again as long as it is needed."""

from pathlib import Path

import pytest
from sqlalchemy import func, select

from plait.service.audit import Audit
from plait.service.database.tables import audit, operations
from plait.service.errors import ServiceError
from tests.service.fake_engine import World, in_world, settle, trained

DAY, WEEK = 86_400.0, 7 * 86_400.0


async def rows(world: World) -> int:
    counted = select(func.count(operations.c.id))
    return await world.database.read(lambda connection: connection.execute(counted).scalar_one())


async def at(world: World, seq: int) -> str:
    """A request's state, and whether its result can be read."""
    operation = await world.log.at("run", seq)
    assert operation is not None
    operation.answer = None
    result = await world.log.result(operation)
    return f"{operation.state} {'kept' if result else 'gone'}"


def test_what_was_delivered_is_kept_for_a_day_and_the_rest_for_a_week(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        await trained(world)
        scope = await world.runner.scope("run")
        assert scope is not None
        await world.runner.keep(scope)
        learned = await world.log.at("run", 1)
        assert learned is not None and learned.created_at > 0
        now = learned.created_at + 1.0
        await world.log.delivered([learned.id], now)
        await world.log.forget(now + DAY - 2.0, DAY, WEEK)
        assert [await at(world, seq) for seq in (1, 2)] == ["done kept", "done kept"]
        await world.log.forget(now + DAY + 2.0, DAY, WEEK)
        assert [await at(world, seq) for seq in (1, 2)] == ["gone gone", "done kept"]
        await world.log.forget(now + WEEK + 60.0, DAY, WEEK)
        assert [await at(world, seq) for seq in (1, 2)] == ["gone gone", "gone gone"]
        await world.again()
        await world.ended(await world.step(4))
        assert world.engine.held["run"] == ["a", "step 2", "b", "step 4"]

    in_world(tmp_path, work)


def test_what_no_state_covers_is_not_forgotten(tmp_path: Path) -> None:
    """However old: the run could not be made again."""

    async def work(world: World) -> None:
        await trained(world)
        assert await world.log.forget(1e12, DAY, WEEK) == 0
        await world.log.forget_numbers(1e12)
        await world.again()
        await world.ended(await world.step(4))
        assert world.engine.held["run"] == ["a", "step 2", "b", "step 4"]

    in_world(tmp_path, work)


def test_a_failure_before_a_step_that_is_gone_is_over(tmp_path: Path) -> None:
    """It is kept longer than the step, since nobody asked for it."""

    async def work(world: World) -> None:
        await world.create()
        failed, stepped = await world.learn(1, "bad"), await world.step(2)
        await world.ended(failed, stepped, await world.step(3))
        scope = await world.runner.scope("run")
        assert scope is not None
        await world.runner.keep(scope)
        now = failed.created_at
        await world.log.delivered([stepped.id], now)
        third = await world.log.at("run", 3)
        assert third is not None
        await world.log.delivered([third.id], now)
        await world.log.forget(now + 2 * DAY, DAY, WEEK)
        assert await world.states() == {0: "done", 1: "failed", 2: "gone", 3: "gone"}
        await world.again()
        assert "error" not in await world.result(await world.step(4))
        assert world.engine.held["run"][-1] == "step 4"

    in_world(tmp_path, work)


def test_payload_files_go_with_the_last_that_needs_them(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        await trained(world)
        await world.again()  # into another file
        await world.ended(await world.learn(4, "c"))
        scope = await world.runner.scope("run")
        assert scope is not None
        before = world.payloads.files()
        await world.log.forget(1e12, DAY, WEEK)
        assert world.payloads.files() == before
        await world.runner.keep(scope)
        await world.log.forget(1e12, DAY, WEEK)
        assert world.payloads.files() == [world.payloads.current]

    in_world(tmp_path, work)


def test_numbers_are_forgotten_last_and_nothing_is_done_twice(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        await trained(world)
        scope = await world.runner.scope("run")
        assert scope is not None
        await world.runner.keep(scope)
        await world.log.forget_numbers(1e12)
        assert await rows(world) == 4  # none is gone yet
        await world.log.forget(1e12, DAY, WEEK)
        await world.log.forget_numbers(0.0)
        assert await rows(world) == 4
        await world.log.forget_numbers(1e12)
        assert await world.states() == {0: "gone"}  # what made it
        with pytest.raises(ServiceError, match="another content"):
            await world.create(seed=3)
        late = await world.learn(1, "a")
        assert "it was not done" in await world.result(late)
        await world.again()
        await world.ended(await world.step(4))
        await settle()
        assert world.engine.held["run"] == ["a", "step 2", "b", "step 4"]

    in_world(tmp_path, work)


def test_the_audit_log_goes_back_as_far_as_was_said(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        now = [100.0]
        log = Audit(world.database, lambda: now[0])
        for _ in range(2):
            log.note("x", "", owner="anna", key_id="", status=200, request_id="")
            now[0] += 100.0
        await log.write()
        await log.forget(150.0)
        chosen = select(audit.c.at)
        assert await world.database.read(lambda c: list(c.execute(chosen).scalars())) == [200.0]

    in_world(tmp_path, work)

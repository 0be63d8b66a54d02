"""Operations are done in order and once, whatever ends when: the runner with a real log."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from plait.service.errors import ServiceError
from tests.service.fake_engine import World, in_world, settle, trained


def test_numbers_are_done_in_order_as_they_come_in_any(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        await world.create()
        late = await world.step(3)
        await world.learn(2, "b")
        await settle()
        assert world.engine.held["run"] == []
        await world.learn(1, "a")
        await world.ended(late)
        assert world.engine.held["run"] == ["a", "b", "step 3"]

    in_world(tmp_path, work)


def test_what_the_engine_did_not_answer_is_done_again_and_the_rest_for_its_effect(
    tmp_path: Path,
) -> None:
    async def work(world: World) -> None:
        await trained(world)
        world.engine.silent = {"optim_step"}
        last = await world.step(4)
        await settle()
        world.engine.silent = set()
        await world.crash()
        await world.ended(last)
        assert world.engine.held["run"] == ["a", "step 2", "b", "step 4"]

    in_world(tmp_path, work)


def test_a_new_process_goes_on_with_what_was_promised(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        await trained(world)
        world.engine.die()
        waiting = [await world.step(4), await world.learn(5, "c")]
        await world.again()
        await world.ended(*waiting)
        assert world.engine.held["run"] == ["a", "step 2", "b", "step 4", "c"]

    in_world(tmp_path, work)


def test_no_result_is_in_the_log_without_those_before_it(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        await world.create()
        world.engine.silent = {"forward_backward"}
        learned, stepped = await world.learn(1, "a"), await world.step(2)
        await settle()  # the step is done and answered, what it stepped on is not
        assert await world.states() == {0: "done", 1: "queued", 2: "queued"}
        world.engine.silent = set()
        await world.again()
        await world.ended(learned, stepped)
        assert world.engine.held["run"] == ["a", "step 2"]

    in_world(tmp_path, work)


def test_nothing_before_a_kept_state_is_repeated(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        await trained(world)
        await world.runner.keep(world.runner.scopes["run"])
        await world.ended(await world.step(4))
        await world.runner.keep(world.runner.scopes["run"])
        assert list(world.engine.disk) == ["tinker://run/weights/4"]
        await world.ended(await world.learn(5, "c"))
        world.engine.sent.clear()
        await world.again()
        await world.ended(await world.step(6))
        assert world.engine.held["run"] == ["a", "step 2", "b", "step 4", "c", "step 6"]
        assert world.engine.kinds("drop") == ["create", "forward_backward", "optim_step"]

    in_world(tmp_path, work)


def test_a_kept_state_counts_only_when_all_of_it_is_in_the_log(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        await trained(world)
        world.engine.silent = {"optim_step"}
        last = await world.step(4)
        await settle()
        keeping = asyncio.create_task(world.runner.keep(world.runner.scopes["run"]))
        await settle()
        world.engine.silent = set()
        await world.crash()  # with step 4 in the state, and not in the log
        await asyncio.wait([keeping])
        await world.ended(last)
        assert world.engine.held["run"] == ["a", "step 2", "b", "step 4"]

    in_world(tmp_path, work)


def test_samplers_that_were_never_saved_survive_as_they_were(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        await world.create()
        await world.learn(1, "a")
        await world.view("before", 2)
        await world.ended(await world.step(3))
        await world.crash()
        assert await world.sample("before") == '["a"]'
        await world.view("after", 4)
        await world.ended(await world.learn(5, "b"))
        await world.runner.keep(world.runner.scopes["run"])  # and both samplers with it
        await world.again()
        assert await world.sample("before", 1) == '["a"]'
        assert await world.sample("after") == '["a", "step 3"]'
        assert world.engine.kinds().count("take_view") == 3

    in_world(tmp_path, work)


def test_a_state_is_kept_with_the_samplers_that_a_restored_run_has(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        await world.create()
        await world.learn(1, "a")
        await world.ended(await world.view("view", 2))
        await world.crash()
        await world.ended(await world.step(3))  # nobody has asked the sampler since
        await world.runner.keep(world.runner.scopes["run"])
        await world.crash()
        assert await world.sample("view") == '["a"]'

    in_world(tmp_path, work)


def test_a_run_is_made_once_for_itself_and_for_its_samplers(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        await world.create()
        await world.learn(1, "a")
        await world.ended(await world.view("view", 2))
        world.engine.die()
        await settle()
        stepped = await world.step(3)
        sample = asyncio.create_task(world.sample("view"))
        await settle()
        world.engine.sent.clear()
        world.engine.start()
        await world.ended(stepped)
        assert await sample == '["a"]'
        assert world.engine.kinds().count("create") == 1
        assert world.engine.held["run"] == ["a", "step 3"]

    in_world(tmp_path, work)


def test_a_sampler_waits_for_the_operation_that_takes_it(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        await trained(world)
        world.engine.silent = {"optim_step"}
        await world.step(4)
        await settle()
        world.engine.die()
        await world.view("view", 5)
        sample = asyncio.create_task(world.sample("view"))
        await settle()
        world.engine.silent = set()
        world.engine.start()
        assert await sample == '["a", "step 2", "b", "step 4"]'

    in_world(tmp_path, work)


def test_refused_numbers_are_passed_also_by_the_next_process(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        await trained(world)
        scope = world.runner.scopes["run"]
        await world.runner.refuse(scope, 5)
        world.engine.die()
        last = [await world.step(4), await world.learn(6, "c")]
        await world.again()
        await world.ended(*last)
        assert world.engine.held["run"][-2:] == ["step 4", "c"]
        with pytest.raises(ServiceError, match="was refused"):
            await world.learn(5, "x")

    in_world(tmp_path, work)


def test_a_number_that_was_promised_is_not_passed_by_a_refusal(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        await trained(world)
        world.engine.die()
        promised = await world.step(4)
        await world.runner.refuse(world.runner.scopes["run"], 4)
        world.engine.start()
        await world.ended(promised)
        assert world.engine.held["run"][-1] == "step 4"

    in_world(tmp_path, work)


def test_a_gap_is_given_up_and_the_next_step_says_so_once(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        await trained(world)
        await world.step(6)
        world.runner._gap_seconds = -1.0
        await world.runner.tick(1e9)
        await settle()
        world.runner._gap_seconds = 60.0
        assert (await world.states())[6] == "failed"
        await world.ended(await world.step(7))
        assert world.engine.held["run"] == ["a", "step 2", "b", "step 7"]
        assert "came after later ones" in await world.result(await world.learn(5, "x"))

    in_world(tmp_path, work)


def test_a_gap_that_was_given_up_is_not_forgotten_by_a_crash(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        await trained(world)
        await world.learn(5, "c")
        world.runner._gap_seconds = -1.0
        await world.runner.tick(1e9)
        await settle()
        assert world.engine.held["run"] == ["a", "step 2", "b", "c"]
        await world.again()
        assert "failed" in await world.result(await world.step(6))
        await world.ended(await world.step(7))
        assert world.engine.held["run"] == ["a", "step 2", "b", "c", "step 7"]

    in_world(tmp_path, work)


def test_a_step_refuses_what_failed_before_it_also_after_a_crash(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        await trained(world)
        assert "no data" in await world.result(await world.learn(4, "bad"))
        await world.crash()
        assert "failed" in await world.result(await world.step(5))
        await world.ended(await world.step(6))
        await world.again()
        await world.ended(await world.step(7))
        assert world.engine.held["run"] == ["a", "step 2", "b", "step 6", "step 7"]

    in_world(tmp_path, work)


def test_a_request_that_is_sent_again_is_the_same_promise(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        await trained(world)
        stale, new = await world.log.accept("anna", "run", 2, "optim_step", {"number": 2}, b"", 0.0)
        assert not new and stale.state == "done"
        stale.state = "queued"  # as it was when it was read
        assert (await world.runner.take_up(stale, new)).state == "done"
        with pytest.raises(ServiceError, match="another content"):
            await world.learn(2, "x")
        with pytest.raises(ServiceError, match="another content"):
            await world.log.accept("eve", "run", 2, "optim_step", {"number": 2}, b"", 0.0)
        await settle()
        assert world.engine.held["run"] == ["a", "step 2", "b"]

    in_world(tmp_path, work)


def test_what_ends_the_engine_is_given_up_and_what_was_beside_it_is_done(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        await world.create()
        await world.ended(await world.create("other"))
        world.engine.deadly = {"poison"}
        deadly = await world.learn(1, "poison")
        beside = [await world.learn(seq, f"{seq}", "other") for seq in range(1, 9)]
        assert "given up" in await world.result(deadly)
        await world.ended(*beside)
        await world.ended(await world.learn(9, "9", "other"))
        assert world.engine.held["other"] == [f"{seq}" for seq in range(1, 10)]
        assert world.engine.restarts <= 6 + len(beside)
        assert "failed" in await world.result(await world.step(2))

    in_world(tmp_path, work)


def test_nothing_is_sent_to_an_engine_that_does_not_hold_it(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        await trained(world)
        body = world.log.body

        async def slow(operation: Any) -> bytes:
            """The engine ends, and the next one is up, while a body is read."""
            world.log.body = body  # type: ignore[method-assign]
            world.engine.die()
            world.engine.start()
            return await body(operation)

        world.log.body = slow  # type: ignore[method-assign]
        await world.ended(await world.learn(4, "c"))
        assert world.engine.held["run"] == ["a", "step 2", "b", "c"]

    in_world(tmp_path, work)


def test_a_load_is_kept_before_it_is_told(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        world.engine.disk["tinker://x/weights/y"] = ["y"]
        await trained(world)
        loading = {"path": "tinker://x/weights/y"}
        await world.ended(await world.submit("run", 4, "load", loading))
        await world.ended(await world.create("other", **loading, optimizer=True))
        del world.engine.disk["tinker://x/weights/y"]
        await world.again()
        await world.ended(await world.step(5), await world.step(1, "other"))
        assert world.engine.held["run"] == ["y", "step 5"]
        assert world.engine.held["other"] == ["y", "step 1"]

    in_world(tmp_path, work)


def test_a_run_that_could_not_be_made_says_why(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        world.engine.silent = {"create"}
        created = await world.create()
        await settle()
        world.engine._open[0][2]["error"] = "memory ended"
        world.engine._open[0][2]["category"] = "server"
        world.engine.answer("create")
        assert await world.result(created) == "memory ended"
        assert "memory ended" in await world.result(await world.learn(1, "a"))

    in_world(tmp_path, work)


def test_what_nobody_uses_leaves_memory_and_comes_back(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        await trained(world)
        await world.ended(await world.view("view", 4))
        await world.sample("view")
        await settle()
        for _ in range(2):
            await world.runner.tick(-1.0)
            await settle()
        assert world.engine.held == {}
        assert await world.sample("view", 1) == '["a", "step 2", "b"]'
        await world.ended(await world.step(5))
        assert world.engine.held["run"] == ["a", "step 2", "b", "step 5"]

    in_world(tmp_path, work)


def test_a_sampler_that_was_not_taken_keeps_no_state_from_being_kept(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        await world.create()
        bad = await world.learn(1, "bad")
        world.engine.silent = {"take_view"}
        view = await world.view("view", 2)
        await world.ended(bad)
        await settle()
        world.engine._open[0][2].update(error="memory ended", category="server")
        world.engine.answer("take_view")
        assert await world.result(view) == "memory ended"
        await world.ended(await world.learn(3, "a"))
        scope = await world.runner.scope("run")
        assert scope is not None
        await world.runner.keep(scope)
        assert scope.kept == 3
        assert "tinker://run/weights/3" in world.engine.disk

    in_world(tmp_path, work)


def test_states_that_a_kill_left_go_with_the_next_one(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        await trained(world)
        scope = await world.runner.scope("run")
        assert scope is not None
        await world.runner.keep(scope)
        world.engine.disk["tinker://run/weights/2"] = ["as it was when a process was killed"]
        world.engine.disk["tinker://run2/weights/2"] = ["another run's"]
        await world.ended(await world.learn(4, "c"))
        await world.runner.keep(scope)
        assert sorted(world.engine.disk) == ["tinker://run/weights/4", "tinker://run2/weights/2"]

    in_world(tmp_path, work)


def test_a_sampler_that_is_closed_while_it_is_opened_leaves_nothing(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        await trained(world)
        path = "tinker://run/sampler_weights/x"
        await world.checkpoint(path, ["first"])
        await world.sampler("one", path)
        world.engine.silent = {"open_view"}
        await world.submit("one", 0, "sample", {}, "p")
        await settle()
        assert "one" in world.engine.held
        closing = asyncio.create_task(world.runner.drop_sampler("one"))
        await settle()
        world.engine.answer("open_view")
        await asyncio.wait_for(closing, 10)
        assert "one" not in world.engine.held and "one" not in world.runner.scopes

    in_world(tmp_path, work)


def test_a_sampler_does_not_change_when_its_checkpoint_is_saved_anew(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        await trained(world)
        path = "tinker://run/sampler_weights/x"
        await world.checkpoint(path, ["first"])
        await world.sampler("old", path)
        assert await world.sample("old") == '["first"]'
        await world.checkpoint(path, ["second"])
        assert await world.sample("old", 1) == '["first"]'
        await world.crash()
        assert "saved anew" in await world.sample("old", 2)
        await world.sampler("new", path)
        assert await world.sample("new") == '["second"]'

    in_world(tmp_path, work)

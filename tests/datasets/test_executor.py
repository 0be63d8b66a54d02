"""The executor: order, bounds, errors as values, and no thread left behind."""

import threading
import time
from collections.abc import Iterator

import pytest

from plait.datasets.executor import Executor
from plait.errors import ConfigError


def ahead_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("plait-ahead")]


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    assert not ahead_threads()


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_results_come_in_order(workers: int) -> None:
    def slow_first(task: int) -> int:
        time.sleep(0.004 if task % 3 == 0 else 0)
        return task * 10

    batches = [[0, 1, 2], [], [3], [4, 5]]
    done = list(Executor(workers, ahead=3).map(slow_first, batches))
    assert [[d.value for d in batch] for batch in done] == [[0, 10, 20], [], [30], [40, 50]]


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_are_values_at_their_task(workers: int) -> None:
    def odd_breaks(task: int) -> int:
        if task % 2:
            raise ValueError(f"task {task}")
        return task

    (batch,) = Executor(workers).map(odd_breaks, [range(4)])
    assert [d.task for d in batch] == [0, 1, 2, 3]
    assert [str(d.error) if d.error else d.value for d in batch] == [0, "task 1", 2, "task 3"]
    with pytest.raises(ValueError, match="task 3"):
        batch[3].result()


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_no_more_is_read_than_asked_for(ahead: int) -> None:
    read: list[int] = []

    def batches() -> Iterator[list[int]]:
        for number in range(20):
            read.append(number)
            yield [number]

    for given, _ in enumerate(Executor(2, ahead).map(lambda task: task, batches())):
        assert len(read) == min(given + 1 + ahead, 20)


def test_work_really_runs_ahead() -> None:
    begun = threading.Event()

    def work(task: int) -> int:
        if task == 1:
            begun.set()
        return task

    results = Executor(1, ahead=1).map(work, [[0], [1], [2]])
    next(results)
    assert begun.wait(5), "batch 1 is worked on while the caller holds batch 0"
    results.close()  # type: ignore[attr-defined]


def test_closing_cancels_what_has_not_begun() -> None:
    worked: list[int] = []

    def work(task: int) -> None:
        time.sleep(0.01)
        worked.append(task)

    results = Executor(1, ahead=50).map(work, [[n] for n in range(50)])
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert len(worked) < 10
    assert not ahead_threads()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_the_loop_ends_the_threads(error: type[BaseException]) -> None:
    def loop() -> None:
        for _ in Executor(2, ahead=5).map(lambda task: task, ([n] for n in range(100))):
            raise error

    with pytest.raises(error):
        loop()
    assert not ahead_threads()


def test_an_exception_of_the_batches_ends_the_threads() -> None:
    def batches() -> Iterator[list[int]]:
        yield [0]
        raise RuntimeError("no more plans")

    with pytest.raises(RuntimeError, match="no more plans"):
        list(Executor(2, ahead=0).map(lambda task: task, batches()))


def test_negative_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="workers"):
        Executor(workers=-1)
    with pytest.raises(ConfigError, match="ahead"):
        Executor(ahead=-1)


def test_no_task_begins_while_what_waits_weighs_too_much() -> None:
    begun: list[int] = []

    def work(task: int) -> bytes:
        begun.append(task)
        return bytes(100)

    batches = [[4 * number + task for task in range(4)] for number in range(12)]
    given = Executor(2, ahead=11).map(work, batches, weigh=len, most=600)
    most = 0
    for number, _ in enumerate(given):
        time.sleep(0.01)  # time enough to decode everything
        most = max(most, len(begun) - 4 * (number + 1))
    assert sorted(begun) == list(range(48))
    assert 4 <= most <= 6 + 1 + 2, "600 bytes, one over, and one of each thread"


def test_a_batch_heavier_than_the_bound_is_given_all_the_same() -> None:
    for most in (0, 1, 250):
        heavy = Executor(3, ahead=4).map(
            lambda _: bytes(1000), [range(5)] * 6, weigh=len, most=most
        )  # fmt: skip
        assert [len(batch) for batch in heavy] == [5] * 6


def test_closing_ends_tasks_that_wait_for_room() -> None:
    given = Executor(2, ahead=5).map(lambda _: bytes(1000), [[1, 2]] * 6, weigh=len, most=0)
    next(given)
    time.sleep(0.05)
    given.close()
    assert not ahead_threads()

"""The engine's process keeps order within a scope, and nobody's long work keeps others waiting."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from plait.errors import DataError
from plait.service.engine.worker import Apart, Lanes, Worker


class Channel:
    """Holds what the engine says."""

    def __init__(self) -> None:
        self.said: dict[int, Any] = {}
        self.arrived = threading.Condition()

    def send(self, header: dict[str, Any], body: bytes = b"") -> None:
        with self.arrived:
            self.said[header["id"]] = header
            self.arrived.notify_all()

    def wait(self, *ids: int) -> None:
        with self.arrived:
            assert self.arrived.wait_for(lambda: set(ids) <= self.said.keys(), 20)


@pytest.fixture
def worker(tmp_path: Path) -> Any:
    options = {"data_dir": str(tmp_path), "capacity": 64, "sampler_memory_mb": 1, "devices": 1,
               "media_bytes": 1000}  # fmt: skip
    made = Worker(Channel(), options, {})  # type: ignore[arg-type]
    yield made
    made.engine.close()


def begin(worker: Any, number: int, scope: str, work: Any) -> None:
    header = {"id": number, "scope": scope, "do": "work"}
    worker._lanes.put(scope, lambda: worker._answering(header, work))


def test_long_work_keeps_its_own_scope_waiting_and_no_other(worker: Any) -> None:
    go_on, order = threading.Event(), []

    def long() -> Any:
        go_on.wait(20)
        order.append("long")
        return {}, b""

    def short(name: str) -> Any:
        order.append(name)
        return {}, b""

    for number in range(40):  # more than there are threads of any kind
        begin(worker, number, f"run {number}", lambda: Apart(long))
    begin(worker, 100, "run 0", lambda: short("behind"))
    begin(worker, 101, "another", lambda: short("another"))
    worker._channel.wait(101)
    assert order == ["another"]
    go_on.set()
    worker._channel.wait(*range(40), 100)
    assert order.index("behind") > order.index("long")


def test_what_fails_apart_is_told_and_its_scope_goes_on(worker: Any) -> None:
    def fail() -> Any:
        raise DataError("this is no data")

    begin(worker, 1, "run", lambda: Apart(fail))
    begin(worker, 2, "run", lambda: ({}, b""))
    worker._channel.wait(1, 2)
    assert worker._channel.said[1]["error"] == "this is no data"


def test_a_lane_goes_on_when_what_it_waits_for_is_done() -> None:
    with ThreadPoolExecutor(4) as pool:
        lanes, held, done = Lanes(pool), Future[None](), threading.Event()
        lanes.put("a", lambda: held)
        lanes.put("a", done.set)
        assert not done.wait(0.1)
        held.set_result(None)
        assert done.wait(10)


def test_uploads_of_a_request_are_read_once_and_are_so_large_together(
    worker: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "media" / "anna"
    folder.mkdir(parents=True)
    for name, size in (("a", 600), ("b", 600)):
        (folder / (64 * name)).write_bytes(bytes(size))
    read = worker.uploaded({"owner_key": "anna"})
    assert read(64 * "a") is read(64 * "a")
    with pytest.raises(DataError, match="up to 1000 bytes together"):
        read(64 * "b")
    assert len(worker.uploaded({"owner_key": "anna"})(64 * "b")) == 600
    with pytest.raises(DataError, match="there is no upload"):
        worker.uploaded({"owner_key": "ben"})(64 * "a")

"""What was changed is written down, once, and says nothing that is secret."""

import asyncio
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from plait.service import audit
from plait.service.audit import Audit
from plait.service.database.database import Database
from plait.service.database.migrate import migrate
from plait.service.database.payloads import Payloads
from plait.service.database.tables import audit as table
from plait.service.errors import UnavailableError


@pytest.fixture(scope="module")
def guarded(new_server: Callable[..., Any]) -> Any:
    return new_server().start()


@pytest.fixture(scope="module")
def keys(guarded: Any) -> dict[str, str]:
    roles = {"anna": "user", "root": "admin", "reader": "read-only"}
    return {owner: guarded.new_key(owner, role) for owner, role in roles.items()}


def entries(server: Any, keys: dict[str, str], **wanted: Any) -> list[dict[str, Any]]:
    """Those that have these values, the oldest first; written within a second or two."""
    time.sleep(2.5)
    found = server.get("/api/v1/audit?limit=1000", keys["root"]).json()["entries"]
    told = [{"action": one["event"], **one["event_details"]} for one in found]
    return [one for one in told if all(one[k] == v for k, v in wanted.items())]


def test_changes_are_written_down_once(guarded: Any, keys: dict[str, str]) -> None:
    key = keys["anna"]
    made = guarded.post("/api/v1/create_session", {"sdk_version": "0.38.0"}, key)
    session = made.json()["session_id"]
    guarded.post("/api/v1/session_heartbeat", {"session_id": session}, key)
    guarded.get(f"/api/v1/sessions/{session}", key)
    guarded.post("/api/v1/telemetry", {}, key)
    guarded.post("/api/v1/weights_info", {"tinker_path": "tinker://a/weights/b"}, key)
    failed = guarded.post("/api/v1/optim_step", {"model_id": "none", "seq_id": 1}, key)
    sample = {"sampling_session_id": "none", "seq_id": 1, "prompt": {"chunks": []}}
    guarded.post("/api/v1/asample", sample, key)
    guarded.ask("DELETE", "/api/v1/training_runs/run/checkpoints/weights/x", key)
    guarded.post(f"/api/v1/sessions/{session}/finish", {"reason": {}}, key)
    guarded.post("/api/v1/create_session", {}, keys["reader"])
    guarded.post("/api/v1/create_session", {})
    found = entries(guarded, keys, owner="anna")
    assert [(one["action"], one["target"], one["status"]) for one in found] == [
        ("POST /api/v1/create_session", "", 200),
        ("POST /api/v1/optim_step", "none", 404),
        ("POST /api/v1/asample", "none", 404),
        ("DELETE /api/v1/training_runs/{run_id}/checkpoints/{kind}/{name}", "run/weights/x", 404),
        ("POST /api/v1/sessions/{session_id}/finish", session, 200),
    ]
    assert found[0]["request_id"] == made.headers["x-request-id"]
    assert found[1]["request_id"] == failed.headers["x-request-id"]
    assert {one["key_id"] for one in found} == {key.split("-")[2]}
    (refused,) = entries(guarded, keys, owner="reader")
    assert refused["status"] == 403


def test_only_an_admin_reads_it(guarded: Any, keys: dict[str, str]) -> None:
    for owner in ("anna", "reader"):
        assert guarded.get("/api/v1/audit", keys[owner]).status_code == 403


def test_keys_of_the_command_line_are_in_it(guarded: Any, keys: dict[str, str]) -> None:
    name = guarded.new_key("carl").split("-")[2]
    guarded.command("keys", "revoke", name, "--data-dir", str(guarded.folder))
    found = entries(guarded, keys, target=name)
    assert [one["action"] for one in found] == ["keys create", "keys revoke"]
    assert {one["owner"] for one in found} == {audit.OPERATOR}


def test_no_key_is_in_the_log_nor_in_the_database(guarded: Any, keys: dict[str, str]) -> None:
    """Neither whole nor without its id, where it was right, wrong, or in the wrong place."""
    key = keys["anna"]
    wrong = key[:-4] + "AAAA"
    guarded.get("/api/v1/status", wrong)
    guarded.get(f"/api/v1/sessions?limit=x&key={key}", key)
    guarded.post("/api/v1/create_session", {"display_name": 3}, key)
    guarded.get("/api/v1/status", headers={"Authorization": f"Bearer {key}"})
    answers = guarded.get("/api/v1/sessions/none", key).text
    answers += guarded.get("/api/v1/status", wrong).text
    time.sleep(1.5)
    with sqlite3.connect(guarded.folder / "plait.db") as connection:
        kept = "\n".join(connection.iterdump())
    for secret in (key, wrong, key.split("-", 3)[3]):
        assert secret not in guarded.log.read_text()
        assert secret not in kept
        assert secret not in answers


def test_what_is_noted_when_a_server_stops_is_written(new_server: Callable[..., Any]) -> None:
    server = new_server().start()
    for _ in range(20):
        server.post("/api/v1/create_session", {})
    server.stop()
    with sqlite3.connect(server.folder / "plait.db") as connection:
        rows = connection.execute("select owner, status from audit").fetchall()
    assert rows == [("local", 200)] * 20


def note(log: Audit, number: int) -> None:
    log.note(f"a{number}", "t", owner="o", key_id="k", status=200, request_id="r")


def rows(folder: Path, story: Callable[[Audit, Database], Any]) -> list[str]:
    """The actions in the database, after a story."""
    url = f"sqlite:///{folder / 'plait.db'}"
    migrate(url)
    database = Database(url, Payloads(folder / "payloads"))

    async def told() -> list[str]:
        await story(Audit(database, time.time), database)
        return await database.read(
            lambda connection: list(
                connection.execute(select(table.c.action).order_by(table.c.id)).scalars()
            )
        )

    try:
        return asyncio.run(told())
    finally:
        database.close()


def test_entries_are_written_in_batches(tmp_path: Path) -> None:
    async def story(log: Audit, database: Database) -> None:
        writes = 0
        write = database.write

        async def counted(work: Any, *blobs: bytes) -> Any:
            nonlocal writes
            writes += 1
            return await write(work, *blobs)

        database.write = counted  # type: ignore[method-assign]
        begun = time.perf_counter()
        for number in range(2500):
            note(log, number)
        assert time.perf_counter() - begun < 0.5
        await log.write()
        await log.write()
        assert writes == 3

    assert rows(tmp_path, story) == [f"a{number}" for number in range(2500)]


def test_entries_wait_for_a_database_that_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "_MOST", 5)

    async def story(log: Audit, database: Database) -> None:
        write = database.write

        async def away(work: Any, *blobs: bytes) -> Any:
            raise UnavailableError("the database does not answer")

        database.write = away  # type: ignore[method-assign]
        for number in range(7):
            note(log, number)
            await log.write()
        database.write = write  # type: ignore[method-assign]
        await log.write()

    assert rows(tmp_path, story) == [f"a{number}" for number in range(2, 7)]

"""Weights that were kept of samplers go when nobody will ask for them any more."""

import asyncio
from pathlib import Path
from typing import Any

from sqlalchemy import insert, select

from plait.service.database.database import Database
from plait.service.database.migrate import migrate
from plait.service.database.payloads import Payloads
from plait.service.database.tables import operations, samplers, sessions
from plait.service.sweeping import close_forgotten


class Engine:
    """Notes what it is told to forget."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    async def call(self, header: dict[str, Any]) -> None:
        assert header["do"] == "forget"
        self.paths += header["paths"]


async def swept(folder: Path) -> tuple[list[str], list[tuple[str, bool, bool]]]:
    url = f"sqlite:///{folder / 'plait.db'}"
    migrate(url)
    database, engine = Database(url, Payloads(folder / "payloads")), Engine()
    rows = [("old", 10.0, None), ("new", 100.0, None), ("closed", 100.0, 90.0),
            ("sampling", 10.0, None)]  # fmt: skip

    def fill(connection: Any) -> None:
        for name, seen, closed in rows:
            connection.execute(
                insert(sessions).values(
                    id=name, owner="anna", about_json="{}", created_at=0.0, seen_at=seen
                )
            )
            connection.execute(
                insert(samplers).values(
                    id=f"{name}:sample:0", session_id=name, owner="anna", base_model="tiny",
                    kept_path=f"tinker://{name}/sampler_weights/kept", created_at=0.0,
                    closed_at=closed,
                )
            )  # fmt: skip

        values = {"id": "drawn", "owner": "anna", "scope": "sampling:sample:0", "seq": 0,
                  "kind": "sample", "options_json": "{}", "digest": "", "state": "done",
                  "created_at": 60.0}  # fmt: skip
        connection.execute(insert(operations).values(**values))

    await database.write(fill)
    assert await close_forgotten(database, engine, 50.0) == 2  # type: ignore[arg-type]
    assert await close_forgotten(database, engine, 50.0) == 0  # type: ignore[arg-type]
    c = samplers.c
    left = await database.read(
        lambda connection: connection.execute(select(c.session_id, c.closed_at, c.kept_path)).all()
    )
    database.close()
    return engine.paths, sorted((one[0], one[1] is not None, one[2] is not None) for one in left)


def test_kept_weights_go_with_their_session(tmp_path: Path) -> None:
    paths, left = asyncio.run(swept(tmp_path))
    assert sorted(paths) == [f"tinker://{name}/sampler_weights/kept" for name in ("closed", "old")]
    assert left == [("closed", True, False), ("new", False, True), ("old", True, False),
                    ("sampling", False, True)]  # fmt: skip

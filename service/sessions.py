"""Sessions: who is there, since when, and whether they still are."""

import json
import uuid
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, Row, select, update

from plait.service.database.database import Database
from plait.service.database.tables import sessions
from plait.service.errors import NotFoundError, ServiceError
from plait.service.operations import insert_new


class Sessions:
    """Sessions in the database; the last sign of life is written at most once a minute."""

    _WRITE_EVERY = 60.0

    def __init__(self, database: Database) -> None:
        self._database = database
        self._seen: dict[str, tuple[str, float, float]] = {}
        """By id: owner, when it was seen last, when that was written."""

    async def create(self, owner: str, about: Mapping[str, Any], now: float) -> str:
        name = uuid.uuid4().hex
        values = {
            "id": name,
            "owner": owner,
            "about_json": json.dumps(dict(about)),
            "created_at": now,
            "seen_at": now,
        }
        await self._database.write(
            lambda connection: connection.execute(
                insert_new(connection, sessions).values(**values).on_conflict_do_nothing()
            )
        )
        self._seen[name] = (owner, now, now)
        return name

    async def get(self, owner: str, name: str) -> Row[Any]:
        """
        Raises:
            NotFoundError: this owner has none.
        """
        row: Row[Any] | None = await self._database.read(
            lambda connection: connection.execute(
                select(sessions).where((sessions.c.id == name) & (sessions.c.owner == owner))
            ).one_or_none()
        )
        if row is None:
            raise NotFoundError("session", name)
        return row

    async def require(self, owner: str, name: str, now: float) -> None:
        """That it is there, and is not finished; a request is a sign of life.

        Raises:
            NotFoundError: this owner has none.
            ServiceError: it is finished.
        """
        if name not in self._seen or self._seen[name][0] != owner:
            row = await self.get(owner, name)
            if row.finished_at is not None:
                raise ServiceError(f"session {name} is finished; create a new one", 410)
            self._seen[name] = (owner, row.seen_at, row.seen_at)
        await self._touch(name, now)

    async def _touch(self, name: str, now: float) -> None:
        owner, _, written = self._seen[name]
        due = now - written >= self._WRITE_EVERY
        self._seen[name] = (owner, now, now if due else written)
        if due:
            await self._database.write(
                lambda connection: connection.execute(
                    update(sessions).where(sessions.c.id == name).values(seen_at=now)
                )
            )

    async def finish(self, owner: str, name: str, reason: Any, now: float) -> None:
        """Its end, as the client tells it; telling it again changes nothing."""
        await self.get(owner, name)
        self._seen.pop(name, None)
        await self._database.write(
            lambda connection: connection.execute(
                update(sessions)
                .where((sessions.c.id == name) & sessions.c.finished_at.is_(None))
                .values(finished_at=now, finish_json=json.dumps(reason))
            )
        )

    def forget_before(self, time: float) -> None:
        """Let go of those not seen since then; they are looked up when they come back."""
        self._seen = {name: one for name, one in self._seen.items() if one[1] >= time}

    def seen_at(self, name: str) -> float | None:
        """When it was seen last, where this process has seen it."""
        return self._seen[name][1] if name in self._seen else None

    async def page(self, owner: str, limit: int, offset: int) -> list[Row[Any]]:
        """An owner's, the newest first."""

        def work(connection: Connection) -> list[Row[Any]]:
            chosen = select(sessions).where(sessions.c.owner == owner)
            chosen = chosen.order_by(sessions.c.created_at.desc(), sessions.c.id)
            return list(connection.execute(chosen.limit(limit).offset(offset)).all())

        return await self._database.read(work)

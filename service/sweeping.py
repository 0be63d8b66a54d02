"""What nobody will ask for any more."""

from typing import Any

from sqlalchemy import Connection, select, update

from plait.service.database.database import Database
from plait.service.database.tables import operations, samplers, sessions
from plait.service.engine.host import EngineHost

_TOGETHER = 100


async def close_forgotten(database: Database, host: EngineHost, before: float) -> int:
    """Close samplers that sampled last before that time, if their session was seen last before it
    or they are of a run's weights at some step, of which a session makes very many; and remove the
    weights that were kept of samplers that are closed; how many.

    Raises:
        UnavailableError: the database or the engine is away; it is tried again.
    """
    s = samplers.c
    forgotten = select(sessions.c.id).where(sessions.c.seen_at < before)
    recent = (operations.c.scope == s.id) & (operations.c.created_at >= before)
    samples = select(operations.c.id).where(recent).exists()

    def close(connection: Connection) -> list[Any]:
        connection.execute(
            update(samplers)
            .where(s.closed_at.is_(None) & (s.created_at < before) & ~samples)
            .where(s.session_id.in_(forgotten) | s.run_id.is_not(None))
            .values(closed_at=before)
        )
        kept = select(s.id, s.kept_path).where(s.closed_at.is_not(None) & s.kept_path.is_not(None))
        return list(connection.execute(kept.limit(_TOGETHER)).all())

    rows = await database.write(close)
    if not rows:
        return 0
    await host.call({"do": "forget", "scope": "sweep", "paths": [row.kept_path for row in rows]})
    names = [row.id for row in rows]
    await database.write(
        lambda connection: connection.execute(
            update(samplers).where(s.id.in_(names)).values(kept_path=None)
        )
    )
    return len(rows)

"""Who changed what: noted with each request, written in batches."""

from collections import deque
from collections.abc import Callable
from typing import Any

import structlog
from sqlalchemy import delete, insert

from plait.service.database.database import Database
from plait.service.database.tables import audit
from plait.service.errors import ServiceError

_LOG = structlog.get_logger()
_MOST = 100_000
"""Entries that wait while the database is away; the oldest are let go of, and the log says so."""

_TOGETHER = 1000

OPERATOR = "(operator)"
"""Who works on the server's own machine, with its commands."""


def entry(
    action: str, target: str, now: float, *, owner: str, key_id: str = "", status: int = 200,
    request_id: str = "",
) -> dict[str, Any]:  # fmt: skip
    """A row of the table."""
    return {
        "at": now, "owner": owner[:200], "key_id": key_id[:32], "action": action[:100],
        "target": target[:800], "status": status, "request_id": request_id[:64],
    }  # fmt: skip


class Audit:
    """Entries on their way to the database.

    Args:
        clock: Seconds since the epoch.
    """

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database, self._clock = database, clock
        self._waiting: deque[dict[str, Any]] = deque()
        self._lost = 0

    def note(
        self, action: str, target: str, *, owner: str, key_id: str, status: int, request_id: str
    ) -> None:
        """Remember it; `write` brings it to the disk."""
        if len(self._waiting) >= _MOST:
            self._waiting.popleft()
            self._lost += 1
        self._waiting.append(
            entry(action, target, self._clock(), owner=owner, key_id=key_id, status=status,
                  request_id=request_id)
        )  # fmt: skip

    async def forget(self, before: float) -> None:
        """Let go of entries that are older."""
        await self._database.write(
            lambda connection: connection.execute(delete(audit).where(audit.c.at < before))
        )

    async def write(self) -> None:
        """All that waits; what the database does not take waits on."""
        if self._lost:
            _LOG.error("audit_entries_lost", count=self._lost)
            self._lost = 0
        while self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(_TOGETHER, len(self._waiting)))]
            try:
                await self._database.write(
                    lambda connection, batch=batch: connection.execute(insert(audit), batch)
                )
            except BaseException as error:
                self._waiting.extendleft(reversed(batch))
                if not isinstance(error, ServiceError):
                    raise
                _LOG.warning("audit_not_written", error=error.message)
                return

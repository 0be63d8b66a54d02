"""States on the disk to go on from after a crash, and room for what nobody uses."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import structlog
from sqlalchemy import Connection, update

from plait.service.database.database import Database
from plait.service.database.tables import runs, samplers
from plait.service.engine.frames import Header
from plait.service.engine.host import raise_error
from plait.service.errors import ServiceError
from plait.service.operations import Also
from plait.service.restoring import unkept_views
from plait.service.scopes import Clock, Scope, Scopes, message_of

_LOG = structlog.get_logger()

QUIET = 5.0
"""Seconds without work after which a run's state is kept."""

_FORGOTTEN = 600.0
"""Seconds after which the server itself forgets what it knows of a scope; it is in the database."""


class Keeper:
    """Keeps states of runs, and weights of samplers that are in memory alone."""

    def __init__(self, scopes: Scopes, database: Database, clock: Clock) -> None:
        self._scopes, self._database, self._clock = scopes, database, clock

    async def keep(self, scope: Scope) -> None:
        """Have a run's state on the disk, so that nothing before it must be repeated.

        Raises:
            EngineDiedError: the engine ended meanwhile.
            ServiceError: the disk, or the database, did not take it.
        """
        async with scope.keeping:
            last, recorded = scope.last, scope.before
            if not scope.resident or last <= scope.kept:
                scope.cost = 0.0
                return
            _LOG.info("state_keeping", run=scope.id, seq=last)
            also = await self.state(scope, last)
            # The state has what was sent before it: it counts when all of that is in the log.
            if recorded is not None and not await asyncio.shield(recorded):
                return
            await self._database.write(also)
            await self.kept(scope, last)

    async def state(self, scope: Scope, last: int) -> Also:
        """Save the state behind operation `last`, which was sent last; what makes it count."""
        life = scope.life
        await self._ask(scope, {"do": "keep", "name": str(last)}, life)
        paths: dict[str, str] = {}
        for row in await unkept_views(self._database, scope.id):
            if row.run_seq <= last:
                paths[row.id] = await self._save_view(row.id, life)

        def work(connection: Connection) -> None:
            newer = (runs.c.id == scope.id) & (runs.c.kept_seq < last)
            values = {"kept_seq": last, "next_seq": last + 1}
            connection.execute(update(runs).where(newer).values(**values))
            for name, path in paths.items():
                mine = samplers.c.id == name
                connection.execute(update(samplers).where(mine).values(kept_path=path))

        return work

    async def kept(self, scope: Scope, last: int) -> None:
        """A state counts: older ones are not needed any more, those neither that a kill left."""
        _LOG.info("state_kept", run=scope.id, seq=last)
        scope.kept, scope.cost = max(scope.kept, last), 0.0
        await self._ask(scope, {"do": "forget", "paths": [], "below": scope.kept}, scope.life)

    async def _save_view(self, name: str, life: int) -> str:
        path = f"tinker://{name}/sampler_weights/kept"
        sampler = await self._scopes.get(name)
        if sampler is None or sampler.life != life:
            raise ServiceError(f"the engine does not hold {name}", 500, "server")
        await self._ask(sampler, {"do": "keep_view", "path": path}, life)
        return path

    async def _ask(self, scope: Scope, header: Header, life: int) -> None:
        said, _ = await scope.host.send(message_of(scope, None, header), life=life)
        raise_error(said)

    # Letting go

    async def let_go(self, scope: Scope) -> None:
        """Take a run or a sampler out of the engine's memory; its next operation brings it back."""
        if scope.is_run:
            await self.keep(scope)
        else:
            await self._keep_sampler(scope)
        unkept = scope.is_run and scope.last > scope.kept
        if not scope.resident or not scope.idle or unkept:
            return
        life, scope.life = scope.life, -1
        await self._ask(scope, {"do": "drop", "what": "run" if scope.is_run else "sampler"}, life)

    async def _keep_sampler(self, scope: Scope) -> None:
        row = await self._scopes.row(samplers, scope.id)
        if row is None or row.run_id is None or row.kept_path is not None or not scope.resident:
            return
        path = await self._save_view(scope.id, scope.life)
        await self._database.write(
            lambda connection: connection.execute(
                update(samplers).where(samplers.c.id == scope.id).values(kept_path=path)
            )
        )

    def look_after(self, scope: Scope, idle_seconds: float) -> None:
        """Keep or let go of what nobody uses, beside whatever else goes on."""
        if not scope.idle or (scope.keeper is not None and not scope.keeper.done()):
            return
        quiet = self._clock() - scope.used_at
        if scope.resident and quiet > idle_seconds:
            self._beside(scope, self.let_go(scope))
        elif scope.resident and scope.is_run and scope.last > scope.kept and quiet > QUIET:
            self._beside(scope, self.keep(scope))
        elif not scope.resident and quiet > max(idle_seconds, _FORGOTTEN):
            fed = scope.feeder is not None and not scope.feeder.done()
            if not fed and not scope.making.locked():
                self._scopes.forget(scope.id)

    def _beside(self, scope: Scope, work: Coroutine[Any, Any, None]) -> None:
        scope.keeper = asyncio.create_task(quietly(work), name=f"keep {scope.id}")


async def quietly(work: Coroutine[Any, Any, None]) -> None:
    """What may be tried again later is no error."""
    try:
        await work
    except ServiceError as error:
        _LOG.warning("keeping_failed", error=error.message)
    except Exception:
        _LOG.exception("keeping_failed")

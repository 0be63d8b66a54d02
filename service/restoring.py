"""A run or a sampler as it was: from the state that was kept, and what was done since.

Operations that are done are repeated for their effect alone; their results are in the log.
"""

import asyncio
import contextlib
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import Any

import structlog
from sqlalchemy import Row, select

from plait.service.database.database import Database
from plait.service.database.tables import checkpoints, runs, samplers
from plait.service.engine.frames import Header
from plait.service.engine.host import EngineDiedError, raise_error
from plait.service.errors import ServiceError, UnavailableError
from plait.service.operations import JobLog, Operation
from plait.service.scopes import Scope, Scopes, message_of

_LOG = structlog.get_logger()

MOST_ATTEMPTS = 5
"""Ends of the engine while it did one thing alone, before that one is given up."""

_SUSPECT = 2
"""Ends of the engine after which a scope is made again alone."""

_AT_ONCE = 16
"""Messages that are under way while a run is made again."""

CHANGES = ("forward_backward", "optim_step", "load")
"""Kinds that leave a trace in a run."""


class Restorer:
    """Has the engine hold what operations need.

    Args:
        live: Operations that are not done, by id.
        solo: Held by what may be the reason for the engine's end.
    """

    def __init__(
        self,
        scopes: Scopes,
        log: JobLog,
        database: Database,
        live: Mapping[str, Operation],
        solo: asyncio.Lock,
    ) -> None:
        self._scopes, self._log, self._database = scopes, log, database
        self._live, self._solo = live, solo

    async def bring_back(self, scope: Scope) -> None:
        """Have it in the engine as it was; a run that was never made waits for its first operation.

        Raises:
            EngineDiedError: the engine ended meanwhile.
            ServiceError: it cannot be made.
        """
        async with scope.making:
            if scope.resident:
                return
            await scope.settled()
            scope.before = None
            if not scope.host.up:
                raise EngineDiedError("the engine is being started again")
            if scope.is_run:
                await self._run(scope)
            elif ":loss:" in scope.id:  # the engine keeps nothing of it
                scope.life = scope.host.life
            else:
                await self._sampler(scope)

    @contextlib.asynccontextmanager
    async def _counted(self, scope: Scope) -> AsyncIterator[None]:
        """Where it ends the engine again and again, it is tried alone, and then given up."""
        alone = scope.deaths >= _SUSPECT
        async with self._solo if alone else contextlib.nullcontext():
            try:
                yield
            except EngineDiedError:
                scope.deaths += 1
                if scope.deaths < _SUSPECT + MOST_ATTEMPTS:
                    raise
                raise ServiceError(
                    f"the engine ended {scope.deaths} times while {scope.id} was made again; it "
                    "was given up", 500, "server",
                ) from None  # fmt: skip
            scope.deaths = 0

    async def _run(self, scope: Scope) -> None:
        life, begun = scope.host.life, time.monotonic()
        row = await self._scopes.row(runs, scope.id)
        scope.kept = row.kept_seq
        done = [
            one
            for one in await self._log.finished_after(scope.id, scope.kept)
            if one.seq < scope.next
        ]
        if scope.kept < 0 and not done:
            return
        if scope.kept < 0 and done[0].state == "failed":
            raise ServiceError(f"{scope.id} was not made: {done[0].error}")
        views = await self._views_of(scope.id)
        _LOG.info("run_restoring", run=scope.id, kept=scope.kept, repeats=len(done))
        async with self._counted(scope):
            await self._repeat(scope, life, row, done, views)
        for name in {
            view for one in done if one.state == "done" for view in views.get(one.seq, ())
        }:
            sampler = await self._scopes.get(name)
            if sampler is not None:
                sampler.life = life
        scope.last = max([scope.kept, *(one.seq for one in done)])
        scope.cost = time.monotonic() - begun
        scope.life = life
        _LOG.info("run_restored", run=scope.id)

    async def _repeat(
        self, scope: Scope, life: int, row: Any, done: list[Operation], views: dict[int, list[str]]
    ) -> None:
        under_way: deque[asyncio.Future[tuple[Header, bytes]]] = deque()

        async def send(header: Header, body: bytes = b"") -> None:
            message = message_of(scope, None, header)
            under_way.append(scope.host.send(message, body, life=life))
            if len(under_way) >= _AT_ONCE:
                raise_error((await under_way.popleft())[0])

        created: Header = {"spec": json.loads(row.spec_json), "seed": row.seed}
        if scope.kept < 0:
            created = done[0].options
        else:
            created["kept"] = str(scope.kept)
        await send({"do": "drop"})  # what an attempt that failed may have left
        await send({**created, "do": "create"})
        for operation in done:
            if operation.repeats and operation.kind in CHANGES:
                body = await self._body(operation)
                await send({**operation.options, "do": operation.kind}, body)
            for view in views.get(operation.seq, []) if operation.state == "done" else []:
                await send({"do": "take_view", "sampler": view})
        reason = await self._log.after_last_failure(scope.id, scope.next)
        if reason is not None:
            await send({"do": "abandon", "reason": reason})
        while under_way:
            raise_error((await under_way.popleft())[0])

    async def _body(self, operation: Operation) -> bytes:
        try:
            return await self._log.body(operation)
        except OSError as error:
            raise ServiceError(
                f"request {operation.seq} cannot be read any more ({error})", 500, "server"
            ) from error

    async def _views_of(self, run: str) -> dict[int, list[str]]:
        """Samplers of a run's weights that are to be taken again, by the operation that did."""
        found: dict[int, list[str]] = {}
        for row in await unkept_views(self._database, run):
            sampler = await self._scopes.get(row.id)
            if sampler is not None and not sampler.resident:
                found.setdefault(row.run_seq, []).append(row.id)
        return found

    async def _sampler(self, scope: Scope) -> None:
        row = await self._scopes.row(samplers, scope.id)
        if row.run_id is not None and row.kept_path is None:
            await self._taken(row.run_id, row.run_seq)
            run = await self._scopes.get(row.run_id)
            if run is not None and not scope.resident:
                await self.bring_back(run)
            if scope.resident:
                return
            row = await self._scopes.row(samplers, scope.id)
        if row.closed_at is not None or (row.run_id is not None and row.kept_path is None):
            raise ServiceError(f"the weights of {scope.id} are not kept any more: save them anew")
        header: Header = {"do": "open_view"}
        if row.kept_path is not None:
            header |= {"path": row.kept_path, "kept": True}
        else:
            await self._unchanged(row)
            header |= {"path": row.model_path, "weights": row.weights}
            header["spec"] = json.loads(row.spec_json) if row.spec_json else None
        life = scope.host.life
        async with self._counted(scope):
            said, _ = await scope.host.send(message_of(scope, None, header), life=life)
            raise_error(said)
        scope.life = life

    async def _unchanged(self, sampler: Row[Any]) -> None:
        """
        Raises:
            ServiceError: its checkpoint was saved anew since: these would be other weights.
        """
        c = checkpoints.c
        saved = select(c.created_at).where(c.path == sampler.model_path)
        at = await self._database.read(lambda connection: connection.execute(saved).scalar())
        if at is not None and at > sampler.created_at:
            raise ServiceError(
                f"{sampler.model_path} was saved anew after {sampler.id} was made: create another "
                "sampler"
            )

    async def _taken(self, run: str, seq: int) -> None:
        """The operation that takes a view is done.

        Raises:
            ServiceError: it failed.
        """
        operation = await self._log.at(run, seq)
        if operation is not None and operation.state == "queued":
            if operation.id not in self._live:
                raise UnavailableError(f"request {seq} of {run} is not under way yet")
            operation = self._live[operation.id]
            await operation.ended.wait()
        if operation is not None and operation.error is not None:
            raise ServiceError(operation.error)


async def unkept_views(database: Database, run: str) -> list[Any]:
    """(id, run_seq) of samplers of a run's weights that are nowhere but in memory."""
    c = samplers.c
    mine = (c.run_id == run) & c.kept_path.is_(None) & c.closed_at.is_(None)
    return await database.read(
        lambda connection: list(connection.execute(select(c.id, c.run_seq).where(mine)).all())
    )

"""From promises to the engine: in order within a run, in turns between owners, once each.

A run's operations go to the engine in the order of their numbers, several under way at once, and
their results into the log in the same order. When the engine ends, what it did not answer is still
in the log: the run is made again from the state that was kept last, what was done since is
repeated for its effect alone, and the rest goes on.
"""

import asyncio
import time
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

import structlog

from plait.service.database.database import Database
from plait.service.engine.frames import Header
from plait.service.engine.host import EngineDiedError, EngineHost, TokenListener, raise_error
from plait.service.errors import NotFoundError, ServiceError, UnavailableError
from plait.service.gate import FairGate, Rate
from plait.service.keeping import Keeper, quietly
from plait.service.operations import MISSING, REFUSED, JobLog, Operation, too_late
from plait.service.recording import PAUSE, Recorder
from plait.service.restoring import CHANGES, Restorer
from plait.service.scopes import Clock, Scope, Scopes, message_of

_LOG = structlog.get_logger()

TOGETHER = 64
"""Operations that the engine has at once, of all owners."""


@dataclass(frozen=True, slots=True)
class _Sent:
    """An operation that the engine has."""

    operation: Operation
    reply: "asyncio.Future[tuple[Header, bytes]]"
    life: int
    alone: bool
    before: "asyncio.Future[bool] | None"
    """Whether the operation before it is in the log; none of a sampler is waited for."""

    recorded: "asyncio.Future[bool]"


class Runner:
    """Brings operations to the engine.

    Args:
        recovery_seconds: Computing of a run after which its state is kept.
        gap_seconds: How long a missing number is waited for.
        clock: Seconds since the epoch.
    """

    def __init__(
        self,
        log: JobLog,
        database: Database,
        host: EngineHost,
        *,
        recovery_seconds: float,
        gap_seconds: float,
        clock: Clock,
        rate: Rate | None = None,
    ) -> None:
        self.log, self.host, self._clock = log, host, clock
        self._recovery_seconds, self._gap_seconds = recovery_seconds, gap_seconds
        self._gate = FairGate(TOGETHER)
        self.rate = rate or Rate(None)
        self._solo = asyncio.Lock()
        self._beside: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._scopes = Scopes(log, database, host, clock)
        self._keeper = Keeper(self._scopes, database, clock)
        self.recorder = Recorder(self._scopes, log, self._keeper, clock)
        self._restorer = Restorer(self._scopes, log, database, self.recorder.live, self._solo)

    @property
    def live(self) -> Mapping[str, Operation]:
        """Operations that are not done, by id."""
        return self.recorder.live

    @property
    def waiting_of(self) -> Mapping[str, int]:
        """How many of them each owner has."""
        return self.recorder.waiting_of

    @property
    def busy(self) -> bool:
        return self._gate.full

    @property
    def scopes(self) -> dict[str, Scope]:
        return self._scopes.here

    async def scope(self, name: str) -> Scope | None:
        """A run, a sampler or a loss that is there, from the database where need be."""
        return await self._scopes.get(name)

    # What comes in

    async def take_up(self, operation: Operation, new: bool) -> Operation:
        """Bring an accepted operation on its way, once; it, as this process knows it.

        Raises:
            NotFoundError: nothing of this name is there any more.
        """
        scope = await self.scope(operation.scope)
        if scope is None:
            raise NotFoundError("run or sampler", operation.scope)
        if not new and operation.id not in self.live:  # it may have ended since it was read
            operation = await self.log.by_id(operation.id) or operation
        if operation.id not in self.live:
            self.put(scope, operation)
        return self.live.get(operation.id, operation)

    def put(self, scope: Scope, operation: Operation) -> None:
        """Bring an operation on its way that is not under way."""
        if operation.id in self.live or operation.state != "queued":
            return
        self.recorder.begin(operation)
        scope.used_at = self._clock()
        if scope.is_run and operation.seq < scope.next:
            self._start(self.recorder.fail(operation, ServiceError(
                f"request {operation.seq} of {scope.id} came after later ones had stopped waiting "
                "for it; it was not done"
            ), too_late(operation)))  # fmt: skip
            return
        scope.waiting[operation.seq] = operation
        self._feed(scope)

    async def refuse(self, scope: Scope, seq: int) -> None:
        """Nothing will come under this number; durable when this returns."""
        if not scope.is_run or seq < scope.next:
            return
        reason = f"request {seq} of {scope.id} was refused before"
        there = await self.log.pass_over(
            scope.id, scope.owner, seq, REFUSED, reason, self._clock(), seq
        )
        if there.kind == REFUSED and seq >= scope.next:
            scope.passed[seq] = seq + 1
            self._feed(scope)

    async def cancel(self, operation: Operation) -> None:
        """Take a sample back, whether it waits or is being drawn."""
        scope = await self.scope(operation.scope)
        if scope is None or scope.is_run:
            return
        waiting = scope.waiting.pop(operation.seq, None)
        if waiting is not None:
            await self.recorder.fail(waiting, ServiceError("it was cancelled"))
        elif self.host.up:
            header = {"do": "cancel", "scope": "", "sampler": scope.id, "operation": operation.id}
            await quietly(_told(self.host, header))

    async def begin(self) -> None:
        """Take up what an earlier process promised."""
        for operation in await self.log.queued():
            try:
                await self.take_up(operation, new=True)
            except NotFoundError as error:
                await self.recorder.fail(operation, error)

    async def with_scope(
        self, name: str, header: Header, body: bytes = b"", listener: TokenListener | None = None
    ) -> tuple[Header, bytes]:
        """Ask something of a run or a sampler as it is after all that was sent; it is brought back
        for it.

        Raises:
            ServiceError: it cannot be brought back, or the answer is an error.
        """
        scope = await self.scope(name)
        if scope is None:
            raise ServiceError(f"there is no run or sampler {name}", 404)
        await self._restorer.bring_back(scope)
        if not scope.resident:
            raise UnavailableError(f"{name} is being made; try again in a moment")
        message = {**message_of(scope, None, {}), **header, "scope": name}
        said, answer = await self.host.send(message, body, listener, scope.life)
        raise_error(said)
        return said, answer

    # Feeding the engine

    def engine_changed(self, up: bool) -> None:
        """The engine is up, or down, and with it all that it held."""
        if up:
            for scope in list(self.scopes.values()):
                self._feed(scope)

    def _feed(self, scope: Scope) -> None:
        running = scope.feeder is not None and not scope.feeder.done()
        ready = scope.first() is not None
        if ready:
            scope.waits_since = None
        elif scope.waiting and scope.waits_since is None:
            scope.waits_since = self._clock()
        if ready and self.host.up and not running and not self._stopping:
            scope.feeder = asyncio.create_task(self._feeding(scope), name=f"feed {scope.id}")

    async def _feeding(self, scope: Scope) -> None:
        try:
            while scope.first() is not None and self.host.up:
                await self._restorer.bring_back(scope)
                await self._next(scope)
        except EngineDiedError:
            return  # `engine_changed` feeds it again
        except UnavailableError as error:
            _LOG.warning("feeding_waits", scope=scope.id, error=error.message)
            await asyncio.sleep(PAUSE)
        except ServiceError as error:
            await self._fail_scope(scope, error)
        except Exception as error:
            _LOG.exception("feeding_failed", scope=scope.id)
            await self._fail_scope(
                scope, ServiceError(f"the server failed ({type(error).__name__})", 500, "server")
            )
        finally:
            asyncio.get_running_loop().call_soon(self._feed, scope)

    async def _next(self, scope: Scope) -> None:
        """Send the first operation, where it may be sent."""
        if scope.is_run and scope.cost >= self._recovery_seconds:
            scope.cost = 0.0  # where it fails, it is not tried again with each operation
            await quietly(self._keeper.keep(scope))
        await self.rate.enter(scope.owner)
        await self._gate.enter(scope.owner)
        task = None
        try:
            operation = scope.first()
            alone = operation is not None and operation.id in self.recorder.suspects
            if alone:
                await self._solo.acquire()
            try:
                task = None if operation is None else await self._send(scope, operation, alone)
            finally:
                if alone and task is None:
                    self._solo.release()
        finally:
            if task is None:
                self._gate.leave()
        if operation is not None and task is not None and (alone or _makes(operation)):
            await asyncio.wait([task])

    async def _send(
        self, scope: Scope, operation: Operation, alone: bool
    ) -> asyncio.Task[None] | None:
        try:
            body = await self.log.body(operation)
        except OSError as error:
            await self._unreadable(scope, operation, error)
            return None
        # Nothing waits from here on: it goes to the engine that is looked at now, or not at all.
        making = operation.kind == "create" and self.host.up
        if scope.first() is not operation or not (scope.resident or making):
            return None
        scope.take(operation)
        header = message_of(scope, operation, {**operation.options, "do": operation.kind})
        reply = self.host.send(header, body)
        recorded: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        sent = _Sent(operation, reply, self.host.life, alone, scope.before, recorded)
        if scope.is_run:
            scope.before = recorded
        task = asyncio.create_task(self._finish(scope, sent))
        scope.under_way.add(task)
        task.add_done_callback(scope.under_way.discard)
        return task

    async def _unreadable(self, scope: Scope, operation: Operation, error: OSError) -> None:
        """What it asked for is lost: it fails, and the run is made again with that in mind."""
        _LOG.error("body_lost", operation=operation.id, error=str(error))
        await scope.settled()
        if scope.first() is operation:
            scope.take(operation)
            scope.life = -1
            await self.recorder.fail(operation, ServiceError(
                "what was sent cannot be read any more; send it again", 500, "server"
            ))  # fmt: skip

    # What comes of it

    async def _finish(self, scope: Scope, sent: _Sent) -> None:
        recorded, begun = False, time.monotonic()
        answer: tuple[Header, bytes] | None = None
        try:
            try:
                answer = await sent.reply
            except EngineDiedError:
                self.recorder.suspects.add(sent.operation.id)
            finally:
                self._gate.leave()
                if sent.alone:
                    self._solo.release()
            self._count(scope, sent.operation, begun)
            if sent.before is None or await asyncio.shield(sent.before):
                recorded = await self._recorded(scope, sent, answer)
        except Exception:
            _LOG.exception("finishing_failed", operation=sent.operation.id)
            await asyncio.sleep(PAUSE)
        finally:
            if not recorded:  # what the engine holds may be ahead of the log: it is made again
                scope.put_back(sent.operation)
                scope.life = -1 if scope.is_run else scope.life
            if not sent.recorded.done():
                sent.recorded.set_result(recorded)
        scope.used_at = self._clock()
        self._feed(scope)

    async def _recorded(
        self, scope: Scope, sent: _Sent, answer: tuple[Header, bytes] | None
    ) -> bool:
        if answer is None:
            return await self.recorder.given_up(sent.operation, sent.alone)
        return await self.recorder.record(scope, sent.operation, *answer, sent.life)

    def _count(self, scope: Scope, operation: Operation, begun: float) -> None:
        """What it took would have to be repeated after a crash."""
        if operation.kind in CHANGES:
            now = time.monotonic()
            scope.cost += now - max(begun, scope.replied_at)
            scope.replied_at = now

    async def _fail_scope(self, scope: Scope, error: ServiceError) -> None:
        """The scope cannot be made: what waits for it fails, each for this reason."""
        await scope.settled()
        if scope.is_run:
            scope.life = -1
        while (operation := scope.first()) is not None:
            scope.take(operation)
            await self.recorder.fail(operation, error)

    # What time brings

    async def tick(self, idle_seconds: float) -> None:
        """Give up gaps that do not close, and let go of what nobody uses; waits for nothing."""
        now = self._clock()
        for scope in list(self.scopes.values()):
            since = scope.waits_since
            if since is not None and scope.waiting and now - since > self._gap_seconds:
                scope.waits_since = None
                self._start(quietly(self._skip_gap(scope)))
            self._keeper.look_after(scope, idle_seconds)

    async def _skip_gap(self, scope: Scope) -> None:
        """Go on without the numbers that did not come; the next step of the run says so."""
        try:
            await scope.settled()
            if scope.first() is not None or not scope.waiting:
                return
            missing = scope.next
            for operation in await self.log.queued_below(scope.id, min(scope.waiting)):
                self.put(scope, operation)  # promised, and then its request was torn off
            until = min(scope.waiting) - 1
            if until < missing:
                return
            reason = f"request {missing} of this run never came"
            there = await self.log.pass_over(
                scope.id, scope.owner, missing, MISSING, reason, self._clock(), until
            )
            if there.kind != MISSING:
                return
            _LOG.warning("gap_skipped", run=scope.id, missing=missing, until=until)
            if scope.resident:
                message = message_of(scope, None, {"do": "abandon", "reason": reason})
                self.host.send(message, life=scope.life)
            scope.passed[missing] = until + 1
            for seq in [seq for seq in scope.waiting if seq <= until]:
                operation = scope.waiting.pop(seq)
                await self.recorder.fail(operation, ServiceError(f"{reason}, nor did those next"))
        finally:
            self._feed(scope)

    async def keep(self, scope: Scope) -> None:
        """Have a run's state on the disk, so that nothing before it must be repeated."""
        await self._keeper.keep(scope)

    async def let_go(self, scope: Scope) -> None:
        """Take a run out of the engine's memory; its next operation brings it back."""
        await self._keeper.let_go(scope)

    async def drop_sampler(self, name: str) -> None:
        """Take a sampler that is closed out of the engine's memory, once it is there if it is being
        opened."""
        scope = self.scopes.get(name)
        if scope is None:
            return
        async with scope.making:
            self.scopes.pop(name, None)
            if scope.resident:
                await self.host.call({"do": "drop", "scope": name, "what": "sampler"})

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)

    async def stop(self) -> None:
        """Send nothing more; what is under way is done again by the next process."""
        self._stopping = True
        tasks = [task for s in self.scopes.values() for task in (s.feeder, s.keeper) if task]
        tasks += [task for s in self.scopes.values() for task in s.under_way]
        tasks += self._beside
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _makes(operation: Operation) -> bool:
    """Whether nothing may be sent before its end."""
    return operation.kind in ("create", "load")


async def _told(host: EngineHost, header: Header) -> None:
    await host.call(header)

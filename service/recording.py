"""What comes of operations: into the log, and with it what it means for everything else."""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from plait.service.effects import failed_with, outcome_of, together, written_with
from plait.service.engine.frames import Header
from plait.service.engine.host import EngineDiedError
from plait.service.errors import ServiceError
from plait.service.keeping import Keeper, quietly
from plait.service.operations import Also, JobLog, Operation, Outcome
from plait.service.restoring import MOST_ATTEMPTS
from plait.service.scopes import Clock, Scope, Scopes

_LOG = structlog.get_logger()

PAUSE = 1.0
"""Seconds until something is tried again that the database or the disk did not take."""


class Recorder:
    """Ends operations, each once."""

    def __init__(self, scopes: Scopes, log: JobLog, keeper: Keeper, clock: Clock) -> None:
        self._scopes, self._log, self._keeper, self._clock = scopes, log, keeper, clock
        self.live: dict[str, Operation] = {}
        """Operations that are not done, by id."""

        self.waiting_of: dict[str, int] = {}
        """How many of them each owner has."""

        self.bytes_of: dict[str, int] = {}
        """How many bytes they are."""

        self.suspects: set[str] = set()
        """Operations during which the engine ended: each is tried alone."""

        self.ended: Callable[[Operation], None] = lambda _: None
        """Is told of each operation that is done."""

    def begin(self, operation: Operation) -> None:
        """It is not done from now on, until it is ended."""
        self.live[operation.id] = operation
        owner = operation.owner
        self.waiting_of[owner] = self.waiting_of.get(owner, 0) + 1
        self.bytes_of[owner] = self.bytes_of.get(owner, 0) + operation.size

    async def given_up(self, operation: Operation, alone: bool) -> bool:
        """The engine ended: whether that was once too often."""
        if alone:
            await self._retrying(lambda: self._log.tried(operation))
        if operation.attempts < MOST_ATTEMPTS:
            return False
        await self.end(operation, _failed(ServiceError(
            f"the engine ended {operation.attempts} times while it did this, and nothing else; it "
            "was given up", 500, "server",
        )))  # fmt: skip
        return True

    async def record(
        self, scope: Scope, operation: Operation, said: Header, body: bytes, life: int
    ) -> bool:
        """Write what came of it; False where the engine ended before that was possible."""
        if "error" in said:
            await self.end(operation, outcome_of(said, body))
            return True
        if operation.kind == "create":
            scope.life = life
        if operation.kind == "take_view":
            await self._retrying(lambda: self._has_view(operation.options["sampler"], life))
        effects = [written_with(operation, said, self._clock())]
        keeps = _reads_checkpoint(operation)
        if keeps:
            # What it read may be gone when it would have to be repeated.
            try:
                effects.append(await self._keeper.state(scope, operation.seq))
            except EngineDiedError:
                return False
            except ServiceError as error:
                keeps = False
                _LOG.warning("keeping_failed", error=error.message)
        await self.end(operation, outcome_of(said, body), together(effects))
        if keeps:
            await quietly(self._keeper.kept(scope, operation.seq))
        return True

    async def _has_view(self, name: str, life: int) -> None:
        sampler = await self._scopes.get(name)
        if sampler is not None:
            sampler.life = life

    async def fail(
        self, operation: Operation, error: ServiceError, also: Also | None = None
    ) -> None:
        await self.end(operation, _failed(error), also)

    async def end(self, operation: Operation, outcome: Outcome, also: Also | None = None) -> None:
        if outcome.error is not None:
            also = together([also, failed_with(operation, self._clock())])
        try:
            await self._retrying(lambda: self._log.finish(operation, outcome, self._clock(), also))
        except Exception as error:
            _LOG.exception("result_refused", operation=operation.id)
            lost = _failed(ServiceError(
                f"the server could not keep the result ({type(error).__name__})", 500, "server"
            ))  # fmt: skip
            await self._retrying(lambda: self._log.finish(operation, lost, self._clock()))
        self.suspects.discard(operation.id)
        if self.live.pop(operation.id, None) is not None:
            owner = operation.owner
            self.waiting_of[owner] -= 1
            self.bytes_of[owner] -= operation.size
            if not self.waiting_of[owner]:
                del self.waiting_of[owner], self.bytes_of[owner]
        self.ended(operation)

    async def _retrying(self, work: Callable[[], Awaitable[None]]) -> None:
        """What the database did not take is not lost: it is offered again."""
        while True:
            try:
                await work()
                return
            except ServiceError as error:
                _LOG.error("result_not_kept", error=error.message)
                await asyncio.sleep(PAUSE)


def _failed(error: ServiceError) -> Outcome:
    return Outcome(error=error.message, category=error.category)


def _reads_checkpoint(operation: Operation) -> bool:
    loads = operation.kind == "create" and operation.options.get("path") is not None
    return loads or operation.kind == "load"

"""Runs, samplers and losses, and what waits for each of them."""

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Row, Table, select

from plait.service.database.database import Database
from plait.service.database.tables import losses, runs, samplers
from plait.service.engine.frames import Header
from plait.service.engine.host import EngineHost
from plait.service.operations import JobLog, Operation

Clock = Callable[[], float]


@dataclass(slots=True, eq=False)
class Scope:
    """A run, a sampler or a loss, and what it waits for."""

    id: str
    owner: str
    is_run: bool
    host: EngineHost
    next: int = 0
    """The number of a run's next operation; those of others have no order."""

    waiting: dict[int, Operation] = field(default_factory=dict)
    under_way: set[asyncio.Task[None]] = field(default_factory=set)
    feeder: asyncio.Task[None] | None = None
    keeper: asyncio.Task[None] | None = None
    life: int = -1
    """The engine's life in which it is held."""

    before: "asyncio.Future[bool] | None" = None
    """Whether the operation that was sent last, and with it each before it, is in the log: results
    of a run are written in order, so that no crash leaves one without those before it."""

    last: int = -1
    """The number of the last operation that was sent."""

    kept: int = -1
    """The number whose state is on the disk."""

    cost: float = 0.0
    """Seconds of what would have to be repeated after a crash."""

    replied_at: float = 0.0
    used_at: float = 0.0
    passed: dict[int, int] = field(default_factory=dict)
    """Numbers that are done with, though they were never sent: by each, the one behind it."""

    waits_since: float | None = None
    """Since when operations wait for one of a smaller number."""

    deaths: int = 0
    """Ends of the engine while it was made again, since it last was."""

    making: asyncio.Lock = field(default_factory=asyncio.Lock)
    keeping: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def resident(self) -> bool:
        """Whether the engine has it."""
        return self.host.up and self.life == self.host.life

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.under_way

    def first(self) -> Operation | None:
        """The operation whose turn it is, where it is there."""
        if not self.is_run:
            return next(iter(self.waiting.values()), None)
        while self.next in self.passed:
            self.next = self.passed.pop(self.next)
        return self.waiting.get(self.next)

    def take(self, operation: Operation) -> None:
        """The first one is under way from now on."""
        del self.waiting[operation.seq]
        if self.is_run:
            self.next = operation.seq + 1
            self.last = max(self.last, operation.seq)

    def put_back(self, operation: Operation) -> None:
        """It was not done: it waits again, in its place."""
        self.waiting[operation.seq] = operation
        if self.is_run:
            self.next = min(self.next, operation.seq)

    async def settled(self) -> None:
        """What is under way has ended, or waits again."""
        while self.under_way:
            await asyncio.wait(set(self.under_way))


class Scopes:
    """All scopes that this process has had to do with, made from the database as needed."""

    def __init__(self, log: JobLog, database: Database, host: EngineHost, clock: Clock) -> None:
        self._log, self._database, self._host, self._clock = log, database, host, clock
        self.here: dict[str, Scope] = {}

    async def get(self, name: str) -> Scope | None:
        """None where there is none."""
        if name not in self.here:
            made = await self._made(name)
            if made is None:
                return None
            self.here.setdefault(name, made)
        scope = self.here[name]
        scope.used_at = self._clock()
        return scope

    async def _made(self, name: str) -> Scope | None:
        run = await self.row(runs, name)
        if run is not None:
            return await self._run(run)
        row = await self.row(samplers, name) or await self.row(losses, name)
        gone = row is None or getattr(row, "closed_at", None) is not None
        return None if gone else Scope(name, row.owner, False, self._host)

    async def _run(self, row: Row[Any]) -> Scope:
        made = Scope(row.id, row.owner, True, self._host, next=row.next_seq, kept=row.kept_seq)
        for operation in await self._log.finished_after(row.id, row.next_seq - 1):
            made.passed[operation.seq] = operation.behind
        made.first()
        made.last = made.next - 1
        return made

    async def row(self, table: Table, name: str) -> Any:
        return await self._database.read(
            lambda connection: connection.execute(
                select(table).where(table.c.id == name)
            ).one_or_none()
        )

    def forget(self, name: str) -> None:
        """It is made from the database when it is needed again."""
        del self.here[name]


def owner_folder(owner: str) -> str:
    """An owner's folder of uploads: a name that any file system takes."""
    return hashlib.sha256(owner.encode()).hexdigest()[:32]


def message_of(scope: Scope, operation: Operation | None, more: Mapping[str, Any]) -> Header:
    """What the engine is told of a scope; of an operation, or to make again what one did."""
    return {
        **more,
        "scope": scope.id,
        "operation": "" if operation is None else operation.id,
        "owner_key": owner_folder(scope.owner),
    }

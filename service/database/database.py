"""One writer that commits what waits together, and readers beside it.

A write is acknowledged when its transaction is on the disk. While a commit is under way others
gather, and go into the next one: under load the price of a sync is shared.
"""

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sqlalchemy import Connection, create_engine, event
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from plait.service.database.payloads import Payloads, Ref
from plait.service.errors import UnavailableError

Value = TypeVar("Value")
Work = Callable[..., Value]

PATIENCE = 60.0
"""Seconds that a database may be locked or away before what waits for it is refused."""

_HURRIED = 2.0
_MOST_TOGETHER = 256
_READERS = 4


@dataclass(slots=True, eq=False)
class _Waiting:
    work: Callable[..., Any]
    blobs: Sequence[bytes]
    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[Any]"
    value: Any = None
    error: BaseException | None = None
    refs: tuple[Ref, ...] = field(default=())

    def settle(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits any more
            self.loop.call_soon_threadsafe(self._settle)

    def _settle(self) -> None:
        if self.future.done():  # nobody waits any more
            return
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.value)


class Database:
    """Tables and payload files, written together.

    Args:
        url: SQLAlchemy's, of SQLite or PostgreSQL.
        payloads: Where bodies and results lie; None where only tables are asked.
        patience: Seconds to try again while the database is locked or away.
    """

    def __init__(
        self, url: str, payloads: Payloads | None = None, patience: float = PATIENCE
    ) -> None:
        self.url, self._payloads, self._patience = url, payloads, patience
        self._engine = create_engine(driver(url), pool_pre_ping=not url.startswith("sqlite"))
        if url.startswith("sqlite"):
            event.listen(self._engine, "connect", _prepare_sqlite)
            event.listen(self._engine, "begin", _begin_sqlite)
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._readers = ThreadPoolExecutor(_READERS, "plait-database-read")
        self._thread = threading.Thread(target=self._write, name="plait-database", daemon=True)
        self._thread.start()

    @property
    def payloads(self) -> Payloads:
        assert self._payloads is not None, "this database has tables alone"
        return self._payloads

    async def write(self, work: Work[Value], *blobs: bytes) -> Value:
        """Do `work(connection, *refs)` in a transaction; returns when it is on the disk.

        It may be done again where the database was away: it must change nothing but the database.

        Args:
            blobs: Payloads to be kept; `work` is told where each lies.

        Raises:
            UnavailableError: the database or the disk did not take it.
        """
        loop = asyncio.get_running_loop()
        waiting = _Waiting(work, blobs, loop, loop.create_future())
        self._queue.put(waiting)
        value: Value = await waiting.future
        return value

    async def read(self, work: Work[Value]) -> Value:
        """Do `work(connection)`, which reads, in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._read, work)

    def _read(self, work: Work[Value]) -> Value:
        begun = time.monotonic()
        while True:
            try:
                with self._engine.connect() as connection:
                    return work(connection)
            except (OperationalError, InterfaceError) as error:
                self._wait_or_raise(error, begun)

    def _write(self) -> None:
        while True:
            first = self._queue.get()
            if first is None:
                return
            batch, last = [first], False
            while len(batch) < _MOST_TOGETHER:
                try:
                    more = self._queue.get_nowait()
                except queue.Empty:
                    break
                if more is None:
                    last = True
                    break
                batch.append(more)
            self._commit(batch)
            if last:
                return

    def _commit(self, batch: list[_Waiting]) -> None:
        try:
            self._keep_payloads(batch)
            self._transact(batch)
        except BaseException as error:
            for one in batch:
                one.error = one.error or error
        for one in batch:
            one.settle()

    def _keep_payloads(self, batch: Sequence[_Waiting]) -> None:
        blobs = [blob for one in batch for blob in one.blobs]
        if not blobs:
            return
        try:
            refs = iter(self.payloads.keep(blobs))
        except OSError as error:
            raise UnavailableError(f"the disk did not take it: {error.strerror}") from error
        for one in batch:
            one.refs = tuple(next(refs) for _ in one.blobs)

    def _transact(self, batch: Sequence[_Waiting]) -> None:
        begun = time.monotonic()
        while True:
            for one in batch:
                one.error = None
            try:
                with self._engine.begin() as connection:
                    for one in batch:
                        _do(connection, one)
                return
            except (OperationalError, InterfaceError) as error:
                self._wait_or_raise(error, begun)

    def _wait_or_raise(self, error: DBAPIError, begun: float) -> None:
        if time.monotonic() - begun >= self._patience:
            raise UnavailableError("the database does not answer; try again later") from error
        time.sleep(0.05)

    def hurry(self) -> None:
        """The server is being stopped: nothing waits long for a database that is away any more."""
        self._patience = min(self._patience, _HURRIED)

    def close(self) -> None:
        """Commit what waits and stop."""
        self._queue.put(None)
        self._thread.join()
        self._readers.shutdown()
        self._engine.dispose()


def _do(connection: Connection, one: _Waiting) -> None:
    """One of a transaction's works; its own failure undoes it alone."""
    try:
        with connection.begin_nested():
            one.value = one.work(connection, *one.refs)
    except (OperationalError, InterfaceError):  # of the connection: all of it is done again
        raise
    except Exception as error:
        one.error = error


def driver(url: str) -> str:
    """PostgreSQL through psycopg 3, whatever the URL says."""
    for name in ("postgresql://", "postgres://"):
        if url.startswith(name):
            return "postgresql+psycopg://" + url.removeprefix(name)
    return url


def _prepare_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # SQLAlchemy says BEGIN, not the driver
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=5000"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN")

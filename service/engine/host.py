"""The engine's process, watched: started, spoken to, and started again when it dies."""

import asyncio
import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import structlog

import plait
from plait.service.engine.frames import Header, packed
from plait.service.errors import ServiceError, UnavailableError

_LOG = structlog.get_logger()
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 30.0
_STEADY = 60.0
"""Seconds after which a start counts as a good one."""

TokenListener = Callable[[Header], None]
"""Is told each event of a sample: a token, or more of a text."""


class EngineDiedError(UnavailableError):
    """The engine ended before it answered; what was asked may be asked again."""


class EngineHost:
    """One engine process at a time.

    Args:
        options: What the worker is told first.
        changed: Is called when the engine is up, and when it is down.
    """

    def __init__(self, options: Header, changed: Callable[[bool], None]) -> None:
        self._options, self._changed = options, changed
        self.up = False
        self.life = 0
        """Counts processes that came as far as to answer: what one holds the next does not."""

        self.restarts = 0
        self.pid: int | None = None
        self.started_at: float | None = None
        self._ids = count()
        self._replies: dict[int, asyncio.Future[tuple[Header, bytes]]] = {}
        self._listeners: dict[int, TokenListener] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._was_up = False
        """Whether the last process came as far as to answer."""

        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._watch(), name="engine")

    async def _watch(self) -> None:
        """Until `stop` cancels it."""
        pause = _FIRST_PAUSE
        while True:
            begun = time.monotonic()
            try:
                await self._live()
            except OSError as error:
                _LOG.error("engine_start_failed", error=str(error))
            except Exception:  # a message that cannot be read, say: the next engine may do better
                _LOG.exception("engine_lost")
            self._died()
            self.restarts += 1
            _LOG.warning("engine_ended", pid=self.pid, restarts=self.restarts)
            await asyncio.sleep(pause)
            early = time.monotonic() - begun < _STEADY  # a machine that cannot start it is spared
            pause = min(2 * pause, _LONGEST_PAUSE) if early and not self._was_up else _FIRST_PAUSE

    async def _live(self) -> None:
        """One process, from its start to its end."""
        mine, theirs = socket.socketpair()
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "plait.service.engine.doing", str(theirs.fileno()),
                pass_fds=[theirs.fileno()], stdin=asyncio.subprocess.DEVNULL, env=_environment(),
                start_new_session=True,  # Ctrl-C is for the server, which ends it when all is done
            )  # fmt: skip
        finally:
            theirs.close()
        self.pid = self._process.pid
        reader, self._writer = await asyncio.open_connection(sock=mine, limit=1 << 20)
        self._writer.write(packed(self._options))
        try:
            await self._receive(reader)
        finally:
            self._writer.close()
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        while True:
            try:
                lengths = await reader.readexactly(12)
                said = await reader.readexactly(int.from_bytes(lengths[:4], "little"))
                body = await reader.readexactly(int.from_bytes(lengths[4:], "little"))
            except (asyncio.IncompleteReadError, ConnectionError):
                return
            self._take(json.loads(said), body)

    def _take(self, header: Header, body: bytes) -> None:
        if header.get("event") == "ready":
            self.up, self.started_at = True, time.time()
            self.life += 1
            _LOG.info("engine_ready", pid=self.pid)
            self._changed(True)
        elif "event" in header:
            listener = self._listeners.get(header["of"])
            if listener is not None:
                listener(header)
        else:
            self._listeners.pop(header["id"], None)
            reply = self._replies.pop(header["id"], None)
            if reply is not None and not reply.done():
                reply.set_result((header, body))

    def _died(self) -> None:
        was_up, self.up, self._writer = self.up, False, None
        self._was_up = was_up
        replies, self._replies = self._replies, {}
        self._listeners.clear()
        for reply in replies.values():
            if not reply.done():
                _fail(reply)
        if was_up:
            self._changed(False)

    def send(
        self,
        header: Header,
        body: bytes = b"",
        listener: TokenListener | None = None,
        life: int | None = None,
    ) -> "asyncio.Future[tuple[Header, bytes]]":
        """Ask; messages go out in the order of these calls.

        Args:
            life: In which the engine has what this is about; a later one is not asked.

        The future raises `EngineDiedError` where the engine ends first, and `ServiceError` where
        it answers with an error.
        """
        future: asyncio.Future[tuple[Header, bytes]] = asyncio.get_running_loop().create_future()
        other = life is not None and life != self.life
        if not self.up or self._writer is None or other:
            _fail(future)
            return future
        number = next(self._ids)
        self._replies[number] = future
        if listener is not None:
            self._listeners[number] = listener
        if not self._writer.is_closing():  # else it was killed just now, as `_died` is about to say
            self._writer.write(packed({**header, "id": number}, body))
        return future

    async def call(self, header: Header, body: bytes = b"") -> tuple[Header, bytes]:
        """Ask, and wait for the answer.

        Raises:
            EngineDiedError: the engine ended first.
            ServiceError: the answer is an error.
        """
        said, answer = await self.send(header, body)
        raise_error(said)
        return said, answer

    async def stop(self) -> None:
        """End the process; what it was doing is done again by the next one."""
        if self._task is not None:
            self._task.cancel()
        if self._writer is not None:
            self._writer.close()
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        if self._task is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._died()


def raise_error(said: Header) -> None:
    """
    Raises:
        ServiceError: the answer says that it failed.
    """
    if "error" in said:
        raise ServiceError(said["error"], 400, said["category"])


def _fail(reply: "asyncio.Future[tuple[Header, bytes]]") -> None:
    reply.set_exception(EngineDiedError("the engine is being started again"))
    reply.exception()  # whoever does not wait for it any more need not be warned


def _environment() -> dict[str, str]:
    """The worker imports plait from where this process has it."""
    root = str(Path(plait.__file__).resolve().parent.parent)
    before = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{before}" if before else root}

"""The engine's process: does what the server says, and answers each message with what came of it.

It holds nothing that may not be lost. What it had in memory is made again from the last state that
was kept and the operations after it, which the server's log has.

`plait.service.engine.doing` says what each message does, and is what the server starts.
"""

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from plait.datasets.decoding import Decoder
from plait.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ModelError,
    PlaitError,
)
from plait.service.engine.frames import Channel, Header
from plait.trainer.build import Built
from plait.trainer.engine.controller import Engine, EngineSettings
from plait.trainer.store import Store

_THREADS = 16
"""That read requests and write answers, of different runs at once."""

_APART = 2
"""Threads for what may take long: the others answer everybody."""

Answer = tuple[Header, bytes]
Does = Mapping[str, Callable[["Worker", Header, bytes], "Answer | Future[Answer] | Apart"]]


@dataclass(frozen=True, slots=True)
class Apart:
    """What is done on a thread of its own kind, before anything else of its scope."""

    work: Callable[[], "Answer | Future[Answer]"]


@dataclass(frozen=True, slots=True)
class Hosted:
    """A run or a view: what the engine calls it, and what renders its samples."""

    name: str
    built: Built


class Lanes:
    """Tasks of each run or sampler, one after another, on threads that all share."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool, self._lock = pool, threading.Lock()
        self._waiting: dict[str, deque[Callable[[], Future[None] | None]]] = {}
        """By scope, the one that is being done first; a scope without tasks is not there."""

    def put(self, scope: str, task: Callable[[], "Future[None] | None"]) -> None:
        """
        Args:
            task: May return what the scope's next one waits for.
        """
        with self._lock:
            if scope in self._waiting:
                self._waiting[scope].append(task)
                return
            self._waiting[scope] = deque([task])
        self._pool.submit(self._work, scope)

    def _work(self, scope: str) -> None:
        held = self._waiting[scope][0]()
        if held is None:
            self._go_on(scope)
        else:
            held.add_done_callback(lambda _: self._go_on(scope))

    def _go_on(self, scope: str) -> None:
        with self._lock:
            self._waiting[scope].popleft()
            if not self._waiting[scope]:
                del self._waiting[scope]
                return
        self._pool.submit(self._work, scope)


class Worker:
    """Does messages, those of one scope in their order, those of several side by side.

    Args:
        channel: To the server.
        options: `data_dir`, and settings of the engine.
        does: What each kind of message is done by.
    """

    def __init__(self, channel: Channel, options: Header, does: "Does") -> None:
        self._does = does
        data_dir = Path(options["data_dir"])
        self._channel = channel
        self.store = Store(data_dir / "checkpoints")
        self.kept = Store(data_dir / "recovery")
        self.store.open()
        self.kept.open()
        self.uploads, self._most_uploaded = data_dir / "media", options["media_bytes"]
        self.engine = Engine(
            EngineSettings(
                capacity=options["capacity"],
                sampler_memory_mb=options["sampler_memory_mb"],
                devices=options["devices"],
            )
        )
        self.decoder = Decoder()
        self.hosted: dict[str, Hosted] = {}
        self._pool = ThreadPoolExecutor(_THREADS, "plait-requests")
        self._apart = ThreadPoolExecutor(_APART, "plait-apart")
        self._lanes = Lanes(self._pool)

    def run(self) -> None:
        """Until the server is gone."""
        self._channel.send({"event": "ready", "pid": os.getpid()})
        while (message := self._channel.receive()) is not None:
            header, body = message
            lane: str = header.get("lane") or header.get("scope", "")
            self._lanes.put(lane, partial(self._begin, header, body))

    def _begin(self, header: Header, body: bytes) -> "Future[None] | None":
        """Start one message; its answer goes out when it is done."""
        return self._answering(header, lambda: self._does[header["do"]](self, header, body))

    def _answering(
        self, header: Header, work: Callable[[], "Answer | Future[Answer] | Apart"]
    ) -> "Future[None] | None":
        try:
            answer = work()
        except BaseException as error:
            self._failed(header, error)
            return None
        if isinstance(answer, Apart):
            return self._apart.submit(lambda: self._told_apart(header, answer.work))
        if isinstance(answer, Future):
            answer.add_done_callback(lambda done: self._pool.submit(self._ended, header, done))
        else:
            self._answer(header, *answer)
        return None

    def _told_apart(self, header: Header, work: "Callable[[], Answer | Future[Answer]]") -> None:
        self._answering(header, work)

    def _ended(self, header: Header, done: "Future[Answer]") -> None:
        try:
            self._answer(header, *done.result())
        except BaseException as error:
            self._failed(header, error)

    def _answer(self, header: Header, said: Header, body: bytes = b"") -> None:
        self.send({"id": header["id"], **said}, body)

    def _failed(self, header: Header, error: BaseException) -> None:
        self.send({"id": header["id"], "error": told(error), "category": category_of(error)})

    def send(self, header: Header, body: bytes = b"") -> None:
        try:
            self._channel.send(header, body)
        except OSError:  # the server is gone, and so is this process in a moment
            os._exit(1)

    def uploaded(self, header: Header) -> Callable[[str], bytes]:
        """The uploads that this message may name, each read once."""
        folder, here = self.uploads / header.get("owner_key", "none"), dict[str, bytes]()

        def read(sha256: str) -> bytes:
            if sha256 in here:
                return here[sha256]
            if not (sha256.isalnum() and len(sha256) == 64):
                raise DataError(f"an upload is named by its SHA-256; got {sha256[:80]!r}")
            try:
                size = (folder / sha256).stat().st_size + sum(map(len, here.values()))
                if size > self._most_uploaded:
                    raise DataError(
                        f"the uploads of one request have up to {self._most_uploaded} bytes "
                        "together: send less at once"
                    )
                here[sha256] = (folder / sha256).read_bytes()
            except OSError:
                raise DataError(
                    f"there is no upload {sha256}; POST /api/v1/media brings one"
                ) from None
            return here[sha256]

        return read

    def held(self, scope: str) -> Hosted:
        if scope not in self.hosted:
            raise ModelError(f"the engine does not hold {scope}")
        return self.hosted[scope]


def told(error: BaseException) -> str:
    """One sentence for a client: never a traceback, nor what only a developer should see."""
    if isinstance(error, PlaitError):
        return str(error)[:2000]
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return "memory ended; send less at once"
    print(f"plait engine: {type(error).__name__}: {error}", file=sys.stderr)
    return f"the engine failed ({type(error).__name__}); its log says more"


def category_of(error: BaseException) -> str:
    user = isinstance(error, (ConfigError, DataError, CheckpointError, ModelError))
    return "user" if user else "server"


def then(future: "Future[Any]", convert: Callable[[Any], Answer]) -> "Future[Answer]":
    """The answer of what the engine will have done."""
    made: Future[Answer] = Future()

    def done(ended: "Future[Any]") -> None:
        try:
            made.set_result(convert(ended.result()))
        except BaseException as error:
            made.set_exception(error)

    future.add_done_callback(done)
    return made

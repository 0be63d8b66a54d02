"""Decoding that cannot take the run with it.

Pictures are decoded in the caller's thread; Pillow is robust, and a process costs a copy. Sounds,
films and, on request, pictures nobody vouches for are decoded in processes that can be killed: a
stuck or crashing decoder costs one row, and a new process takes the next.
"""

import contextlib
import os
import pickle
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import plait
from plait.errors import ConfigError, DataError, DecodeTimeoutError, MediaError, Origin, PlaitError
from plait.modalities import Limits, MediaHeader, MediaPart
from plait.modalities.worker import Replies, lengths_of, packed, unpacked

_STARTING_SECONDS = 120.0
"""A busy machine imports the decoders slowly; that is no file's fault."""

_OURS = "plait.modalities."
_PIPE_BYTES = 1 << 20


class _StuckError(Exception):
    """The time is up."""


class _Worker:
    """One decoding process and the two pipes to it, for one request at a time.

    Raises:
        PlaitError: it does not start.
    """

    def __init__(self, memory: int) -> None:
        place = str(Path(plait.__file__).resolve().parent.parent)
        found = [path for path in sys.path if path]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([place, *found]),
            # Threads of libraries that are not used would only take address space.
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "plait.modalities.worker", str(memory)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=environment, bufsize=0,
        )  # fmt: skip
        assert self.process.stdin is not None and self.process.stdout is not None
        self._to, self._from = self.process.stdin.fileno(), self.process.stdout.fileno()
        for pipe in (self._to, self._from):
            os.set_blocking(pipe, False)
            _widen(pipe)
        self._deadline = time.monotonic() + _STARTING_SECONDS
        try:
            self._read(1)
        except (EOFError, _StuckError):
            self.close()
            raise PlaitError(
                "a decoding process must start; it ended first: run `python -m "
                "plait.modalities.worker 4000000000` to see why"
            ) from None

    def ask(self, request: tuple[str, MediaPart, Limits, Any], seconds: float) -> Any:
        """
        Raises:
            _StuckError: the worker needs longer.
            EOFError: it ended.
        """
        self._deadline = time.monotonic() + seconds
        for block in packed(request):
            self._write(block)
        return unpacked([self._read(length) for length in lengths_of(self._read)], Replies)

    def kill(self) -> None:
        """End it now, whatever it does; a thread that waits for its reply gets an EOFError."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """End it, and give back its pipes: for the thread that has it alone."""
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _wait(self, pipe: int, event: int) -> None:
        left = self._deadline - time.monotonic()
        poll = select.poll()
        poll.register(pipe, event)
        if left <= 0 or not poll.poll(1000 * left):
            raise _StuckError

    def _write(self, block: memoryview) -> None:
        block = block.cast("B")
        while block.nbytes:
            self._wait(self._to, select.POLLOUT)
            try:
                block = block[os.write(self._to, block) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise EOFError from None

    def _read(self, size: int) -> bytearray:
        found = bytearray(size)
        view = memoryview(found)
        while view.nbytes:
            self._wait(self._from, select.POLLIN)
            try:
                count = os.readv(self._from, [view])
            except BlockingIOError:
                continue
            if not count:
                raise EOFError
            view = view[count:]
        return found


class Decoder:
    """Headers and contents of media parts, for any number of threads.

    Args:
        workers: Decoding processes at most; each starts when it is first needed.
        untrusted: Whether pictures are decoded in processes too.
        memory: Bytes of address space that a process may take, of which 0.3 GB are its libraries.

    Close it, or use it in a `with`; a process that ends takes its workers with it.
    """

    def __init__(self, workers: int = 2, untrusted: bool = False, memory: int = 4 << 30) -> None:
        if workers < 1:
            raise ConfigError(f"decoding workers must be 1 or more, not {workers}")
        self.workers, self.untrusted, self.memory = workers, untrusted, memory
        self._free = threading.BoundedSemaphore(workers)
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._all: set[_Worker] = set()
        self._closed = threading.Event()
        self._finalizer = weakref.finalize(self, _kill_all, self._all)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all workers, also those at work; whoever waits for one gets an error."""
        with self._lock:
            self._closed.set()
            for worker in self._all:
                worker.kill()
            for worker in self._idle:
                worker.close()
            self._idle.clear()
            self._all.clear()

    def header(self, part: MediaPart, limits: Limits) -> MediaHeader:
        """`part.header`, in a process where its medium asks for one.

        Raises:
            DecodeTimeoutError: it took longer than `limits.max_decode_seconds`.
            MediaError: as of `part.header`, or the decoder crashed.
        """
        if not self._apart(part):
            return part.header(limits)
        found: MediaHeader = self._ask("header", part, limits, None)
        return found

    def decode(self, part: MediaPart, limits: Limits, wanted: Any = None) -> Any:
        """`part.decode`, of which `load` happens in a process where its medium asks for one.

        Raises:
            DecodeTimeoutError: it took longer than `limits.max_decode_seconds`.
            MediaError: as of `part.load`, or the decoder crashed.
        """
        if not self._apart(part):
            return part.decode(limits, wanted)
        return part.finish(self._ask("load", part, limits, wanted), wanted)

    def _apart(self, part: MediaPart) -> bool:
        """Arrays need no decoder; a part of one's own may not be known to another process."""
        if part.in_memory or not type(part).__module__.startswith(_OURS):
            return False
        return self.untrusted or part.medium != "image"

    def _ask(self, method: str, part: MediaPart, limits: Limits, wanted: Any) -> Any:
        with self._free:
            worker = self._worker()
            try:
                reply = worker.ask((method, part, limits, wanted), limits.max_decode_seconds)
            except BaseException as error:
                with self._lock:
                    self._all.discard(worker)
                worker.close()
                if self._closed.is_set():
                    raise self._is_closed() from None
                raise self._explained(error, worker, part, limits) from None
            with self._lock:
                if not self._closed.is_set():
                    self._idle.append(worker)
        if isinstance(reply, DataError):
            raise reply
        return reply

    def _worker(self) -> _Worker:
        with self._lock:
            if self._closed.is_set():
                raise self._is_closed()
            while self._idle:
                worker = self._idle.pop()
                if worker.process.poll() is None:
                    return worker
                self._all.discard(worker)
                worker.close()
        made = _Worker(self.memory)
        with self._lock:
            if not self._closed.is_set():
                self._all.add(made)
                return made
        made.close()
        raise self._is_closed()

    def _is_closed(self) -> PlaitError:
        return PlaitError("this decoder is closed; make another one")

    def _explained(
        self, error: BaseException, worker: _Worker, part: MediaPart, limits: Limits
    ) -> BaseException:
        origin = Origin(file=part.file)
        if isinstance(error, _StuckError):
            return DecodeTimeoutError(
                f"a {_NOUNS[part.medium]} must be decoded in {limits.max_decode_seconds:g} s; this "
                "one took longer and was given up; shorten it or raise max_decode_seconds",
                origin,
            )
        if isinstance(error, EOFError | pickle.UnpicklingError):
            return MediaError(
                f"a {_NOUNS[part.medium]} must be decoded without a crash; the decoder ended with "
                f"status {worker.process.returncode}; replace the file or remove the row",
                origin,
            )
        return error


_NOUNS = {"image": "picture", "audio": "sound", "video": "film"}


def _kill_all(workers: set[_Worker]) -> None:
    while workers:
        workers.pop().kill()


def _widen(pipe: int) -> None:
    """Fewer switches between the processes, where the system lets us."""
    import fcntl

    widen: Callable[..., Any] = fcntl.fcntl
    with contextlib.suppress(OSError, AttributeError):
        widen(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

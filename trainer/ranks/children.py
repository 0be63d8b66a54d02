"""The processes of the ranks above 0: started, spoken to, ended."""

import contextlib
import os
import pickle
import socket
import subprocess
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from plait.errors import ModelError, RankDiedError
from plait.trainer.ranks.group import Seat

_PATIENCE = 60.0
"""Seconds for an answer when this rank has failed already, and the other may wait for it."""


UNREADABLE = (AttributeError, TypeError, ImportError, pickle.PickleError)
"""What pickle raises for an object that only one process knows."""


def unreadable(error: Exception) -> ModelError:
    return ModelError(
        f"with several devices a command must be read in other processes, and {error}: define "
        "losses of your own in a module that can be imported, or use forward_backward_custom"
    )


@dataclass(frozen=True, slots=True)
class Start:
    """The first thing that a child is told."""

    seat: Seat
    threads: int
    """Of torch, in the child."""

    sampler_bytes: int

    path: tuple[str, ...] = ()
    """Where this process finds modules: one of the user's may hold a loss."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a child says to a command: its result, or the error it raised."""

    result: Any = None
    error: Exception | None = None


def packed(value: Any) -> bytes:
    """By plain pickle: torch's own for processes shares memory, whose owner may be killed.

    Raises:
        ModelError: another process cannot have it.
    """
    try:
        return pickle.dumps(value, protocol=5)
    except UNREADABLE as error:
        raise unreadable(error) from error


def tell(connection: Connection, value: Any) -> None:
    connection.send_bytes(packed(value))


def heard(connection: Connection) -> Any:
    """What the other process told, which is one of this user's own."""
    return pickle.loads(connection.recv_bytes())


def check_readable(function: Any) -> None:
    """
    Raises:
        ModelError: other processes cannot import it.
    """
    packed(function)
    if getattr(function, "__module__", None) == "__main__":
        raise unreadable(ImportError(f"{function.__qualname__} stands in the program itself"))


class Child:
    """One rank's process. It ends when this end of its connection closes, whatever closes it."""

    def __init__(self, start: Start) -> None:
        self.rank = start.seat.rank
        mine, its = socket.socketpair()
        environment = {**os.environ, "OMP_NUM_THREADS": str(start.threads)}
        command = [sys.executable, "-P", "-m", "plait.trainer.ranks.worker", str(its.fileno())]
        with its:
            self._process = subprocess.Popen(
                command,
                pass_fds=[its.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C is the first rank's to answer
            )
        self._connection = Connection(mine.detach())
        self.send(packed(start))

    def ready(self) -> None:
        """Wait until it has started, and is about to join the group.

        Raises:
            RankDiedError: it has not come so far.
        """
        self.answer()

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, command: bytes) -> None:
        """Tell it to do what is `packed`; one that is dead says so when it is asked to answer."""
        with contextlib.suppress(OSError):
            self._connection.send_bytes(command)

    def answer(self, *, waits: bool = True) -> Any:
        """What its command returned.

        Args:
            waits: For as long as it takes; else for a while.

        Raises:
            RankDiedError: it has ended, or has not answered.
        """
        try:
            if not waits and not self._connection.poll(_PATIENCE):
                raise RankDiedError(
                    f"rank {self.rank} has not answered for {_PATIENCE:.0f} seconds"
                )
            answer = heard(self._connection)
        except (EOFError, OSError) as error:
            code = self._code()
            raise RankDiedError(f"rank {self.rank} ended with exit code {code}") from error
        assert isinstance(answer, Answer)
        if answer.error is not None:
            raise answer.error
        return answer.result

    def _code(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout=5)
        return None

    def end(self) -> None:
        """Close the connection and wait until it is gone; idempotent."""
        self._connection.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End it at once; idempotent."""
        self._process.kill()
        self._process.wait()
        self._connection.close()


def threads_each(size: int) -> int:
    """Of torch on each rank, so that all together have as many as this process."""
    return max(1, torch.get_num_threads() // size)

"""The process of a rank above 0: `python -P -m plait.trainer.ranks.worker DESCRIPTOR`.

It does what the controller tells it over the inherited descriptor, in order, and answers each
command. It ends when the connection does, and whenever it fails where other ranks wait for it:
they notice that, and are started again together.
"""

import pickle
import sys
from multiprocessing.connection import Connection
from typing import Any

import torch

from plait.errors import ModelError, PlaitError
from plait.trainer.engine.commands import UNANSWERED, Compute
from plait.trainer.engine.executor import Executor
from plait.trainer.ranks.children import UNREADABLE, Answer, Start, heard, tell, unreadable
from plait.trainer.ranks.group import OutOfStepError, Ranks, UndoneError
from plait.trainer.ranks.sharding import shard_layers


def serve(connection: Connection, executor: Executor) -> None:
    """Do and answer until the connection ends."""
    while True:
        try:
            command = heard(connection)
        except (EOFError, OSError):
            return
        except UNREADABLE as error:  # a row with a loss that only the first rank can import
            executor.group.all_true(False)  # as any rank whose row cannot be begun
            tell(connection, Answer(error=unreadable(error)))
            continue
        answer = _answer(executor, command)
        if not isinstance(command, UNANSWERED):
            tell(connection, answer)


def _answer(executor: Executor, command: Any) -> Answer:
    """
    Raises:
        Exception: the other ranks do not know of it, and may wait for this one.
    """
    computes = isinstance(command, Compute)
    try:
        result = executor.execute(command)
    except (PlaitError, UndoneError) as error:
        if isinstance(error, OutOfStepError):
            raise
        return Answer(error=error)
    except Exception as error:
        if not computes:
            raise
        return Answer(error=_sendable(error))
    return Answer(result if computes else None)


def _sendable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return ModelError(f"{type(error).__name__}: {error}")
    return error


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    start = heard(connection)
    assert isinstance(start, Start)
    torch.set_num_threads(start.threads)
    sys.path += [folder for folder in start.path if folder not in sys.path]
    tell(connection, Answer())
    group = Ranks(start.seat, shard_layers)
    serve(connection, Executor(start.sampler_bytes, group))
    group.close()


if __name__ == "__main__":
    main()

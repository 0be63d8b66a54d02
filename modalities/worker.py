"""A process that decodes for another one, and may be killed.

It is `python -P -m plait.modalities.worker BYTES`, with the memory that it may take.
Requests come over standard input and replies go over standard output, each a pickle with the
arrays behind it as they lie in memory. It ends when its input does, and when one request takes
longer than the limit: even if nobody is left to kill it.
"""

import io
import os
import pickle
import signal
import struct
import sys
from collections.abc import Sequence
from typing import IO, Any, BinaryIO

from plait.errors import DataError, MediaError, Origin

_COUNT = struct.Struct("<I")
_LENGTH = struct.Struct("<Q")

_GRACE = 5.0
"""Seconds beyond the limit after which the worker ends itself, if its parent has not ended it."""

_REPLIES = {
    "numpy": {"dtype", "ndarray"},
    "numpy._core.numeric": {"_frombuffer"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "plait.modalities.audio": {"AudioHeader", "Sound"},
    "plait.modalities.frames": {"Frames", "FrameSampling"},
    "plait.modalities.image": {"ImageHeader"},
    "plait.modalities.video": {"VideoHeader"},
    "plait.errors": {"DataError", "MediaError", "Origin"},
}
"""All that a reply may hold: a worker that a file has taken over must not run code elsewhere."""


class Replies(pickle.Unpickler):
    """Reads a worker's reply, of known types only."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        if global_name not in _REPLIES.get(module_name, ()):
            raise pickle.UnpicklingError(f"a reply may not hold {module_name}.{global_name}")
        return super().find_class(module_name, global_name)


def packed(value: Any) -> list[memoryview]:
    """A value as blocks of bytes: how many, how long, the pickle, and its arrays uncopied."""
    arrays: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(value, protocol=5, buffer_callback=arrays.append)
    blocks = [memoryview(pickled), *(array.raw() for array in arrays)]
    lengths = b"".join(_LENGTH.pack(block.nbytes) for block in blocks)
    return [memoryview(_COUNT.pack(len(blocks)) + lengths), *blocks]


def lengths_of(read: Any) -> list[int]:
    """The lengths of the blocks that follow; `read` gives so many bytes."""
    (count,) = _COUNT.unpack(read(_COUNT.size))
    return [_LENGTH.unpack(read(_LENGTH.size))[0] for _ in range(count)]


def unpacked(blocks: Sequence[Any], unpickler: type[pickle.Unpickler] = pickle.Unpickler) -> Any:
    """The value of blocks that `packed` made; its arrays use the blocks' memory."""
    return unpickler(io.BytesIO(blocks[0]), buffers=blocks[1:]).load()


def answer(request: tuple[str, Any, Any, Any]) -> Any:
    """The part's header or what it loads, or the error that tells why there is none."""
    method, part, limits, wanted = request
    try:
        return part.header(limits) if method == "header" else part.load(limits, wanted)
    except DataError as error:
        return error
    except MemoryError:
        return MediaError(
            "a file must be decoded in the memory that a decoder has; this one needs more; shrink "
            "it or remove the row",
            Origin(file=part.file),
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        return MediaError(
            f"a file must be decoded without an accident; {type(error).__name__}: {reason}; "
            "replace the file or remove the row",
            Origin(file=part.file),
        )


def serve(requests: BinaryIO, replies: IO[bytes]) -> None:
    """Answer until the requests end."""

    def read(size: int) -> bytes:
        found = requests.read(size)
        if len(found) < size:
            raise EOFError
        return found

    while True:
        try:
            blocks = [bytearray(read(length)) for length in lengths_of(read)]
        except EOFError:
            return
        request = unpacked(blocks)
        signal.setitimer(signal.ITIMER_REAL, request[2].max_decode_seconds + _GRACE)
        reply = packed(answer(request))
        signal.setitimer(signal.ITIMER_REAL, 0)
        for block in reply:
            replies.write(block)
        replies.flush()


def main() -> None:
    """Serve on standard input and output; the argument is the memory, in bytes, to stay within."""
    memory = int(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not stand among the replies
    _bound_memory(memory)
    # Both are loaded before the first request: their time is no file's.
    import av
    import PIL.Image

    av.logging.set_level(None)
    PIL.Image.init()
    replies.write(b"!")
    replies.flush()
    serve(sys.stdin.buffer, replies)


def _bound_memory(size: int) -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    except (ImportError, ValueError, OSError):  # a system that knows no such bound
        return


if __name__ == "__main__":
    main()

"""Messages between the server and its engine: a JSON header, and bytes behind it."""

import json
import socket
import struct
import threading
from typing import Any

_LENGTHS = struct.Struct("<IQ")

Header = dict[str, Any]


def packed(header: Header, body: bytes = b"") -> bytes:
    said = json.dumps(header).encode()
    return _LENGTHS.pack(len(said), len(body)) + said + body


class Channel:
    """One end of a stream socket; any thread sends, one receives."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._lock = connection, threading.Lock()
        self._file = connection.makefile("rb", buffering=1 << 16)

    def send(self, header: Header, body: bytes = b"") -> None:
        """
        Raises:
            OSError: the other end is gone.
        """
        data = packed(header, body)
        with self._lock:
            self._connection.sendall(data)

    def receive(self) -> tuple[Header, bytes] | None:
        """The next message; None where the other end is gone."""
        try:
            lengths = self._file.read(_LENGTHS.size)
            if len(lengths) < _LENGTHS.size:
                return None
            said, behind = _LENGTHS.unpack(lengths)
            data = self._file.read(said + behind)
        except OSError:  # it was killed, and had not read what was sent to it
            return None
        if len(data) < said + behind:
            return None
        header: Header = json.loads(data[:said])
        return header, data[said:]

    def close(self) -> None:
        self._connection.close()

"""Around every request: an id, a line in the log, how long it took, and how much it may send."""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import structlog
import zstandard
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from plait.service.errors import BusyError, ServiceError
from plait.service.metrics import REQUESTS, SECONDS

_LOG = structlog.get_logger()
_QUIET = ("/healthz", "/readyz", "/metrics", "/api/v1/session_heartbeat", "/api/v1/healthz")
STREAMED = ("/api/v1/media",)
"""Paths whose bodies are read as they come, by the route itself."""

BINARY = ("/api/v1/forward_backward",)
"""Paths whose bodies are not JSON."""

LARGE = (
    *BINARY, "/api/v1/asample", "/api/v1/stream", "/api/v1/render", "/v1/chat/completions",
    "/v1/completions",
)  # fmt: skip
"""Paths whose bodies carry prompts, data and media."""

_OTHERS = 4_000_000
"""Bytes of any other body: it is read at once, and others wait meanwhile."""

_UNKNOWN = 65_536
"""Bytes of a body that is read before it is known who sends it."""

_SLOWEST = 100_000
"""Bytes a second of a body, at least."""

_LINGER_SECONDS, _LINGER_BYTES = 2.0, 32_000_000
_SMALL = 4_000_000
_MOST_VALUES, _MOST_LISTS = 1 << 24, 1 << 20
"""Of a body larger than `_SMALL`."""


class Observed:
    """Gives each request an id, and tells of its end."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        name, begun, status = uuid.uuid4().hex[:16], time.perf_counter(), 500
        scope.setdefault("state", {})["request_id"] = name

        async def told(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message.setdefault("headers", []).append((b"x-request-id", name.encode()))
            await send(message)

        try:
            await self._app(scope, receive, told)
        finally:
            self._tell(scope, name, status, time.perf_counter() - begun)

    def _tell(self, scope: Scope, name: str, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "none")
        REQUESTS.labels(route, scope["method"], str(status)).inc()
        SECONDS.labels(route).observe(seconds)
        if scope["path"] not in _QUIET or status >= 500:
            caller = scope["state"].get("caller")
            _LOG.info(
                "request", id=name, method=scope["method"], path=scope["path"], status=status,
                ms=round(1000 * seconds, 1), owner=getattr(caller, "owner", None),
            )  # fmt: skip
        state = scope["state"]
        if state.get("changes") and state.get("caller") is not None:
            caller = state["caller"]
            scope["app"].state.service.audit.note(
                f"{scope['method']} {route}", state.get("target", ""), owner=caller.owner,
                key_id=caller.key_id, status=status, request_id=name,
            )  # fmt: skip


OwnerOf = Callable[[Scope], Awaitable[str]]


async def anybody(_: Scope) -> str:
    """Where nobody is asked who they are."""
    return ""


class Bounded:
    """Reads bodies up to a size, and unpacks those that are zstd-compressed, up to the same.

    Args:
        most: Bytes of one body.
        together: Bytes of all bodies that are in memory, those that are still coming too; of one
            owner's, half of them.
        patience: Seconds that a client may send nothing in the middle of a body.
        owner_of: Who sends a request that says these headers; raises ServiceError where nobody may.
    """

    def __init__(
        self,
        app: ASGIApp,
        most: int,
        together: int,
        patience: float = 30.0,
        owner_of: OwnerOf = anybody,
    ) -> None:
        self._app, self._most, self._left, self._patience = app, most, together, patience
        self._share, self._owner_of = together // 2, owner_of
        self._of: dict[str, int] = {}
        """Bytes of each owner's bodies."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(STREAMED):
            await self._app(scope, receive, send)
            return
        held = _Held()
        try:
            try:
                if self._may_be_large(scope):
                    held.owner = await self._owner_of(scope)
                body = await self._body(scope, receive, held)
            except ServiceError as error:
                await _refuse(receive, send, error)
                return
            if body is not None:  # None: the client went away
                await self._app(scope, _replaying(body, receive), send)
        finally:
            self._let_go(held)

    def _may_be_large(self, scope: Scope) -> bool:
        """Whether it must be known who sends a body before it is read.

        Raises:
            ServiceError: the length that it says is none, or too large.
        """
        if "\0" in scope["path"]:
            raise ServiceError("a path has no zero bytes")
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 18 or int(length) > self._most_of(scope):
            raise _too_large(self._most_of(scope))
        grows = b"transfer-encoding" in headers or b"content-encoding" in headers
        return grows or int(length) > _UNKNOWN

    def _most_of(self, scope: Scope) -> int:
        return self._most if scope["path"] in LARGE else min(self._most, _OTHERS)

    async def _body(self, scope: Scope, receive: Receive, held: "_Held") -> bytes | None:
        headers, most = dict(scope["headers"]), self._most_of(scope)
        encoding = headers.get(b"content-encoding", b"identity").decode("latin-1").lower()
        if encoding not in ("identity", "zstd"):
            raise ServiceError(f"a body is plain or zstd-compressed; it is {encoding[:40]}", 415)
        body = await self._read(receive, held, most)
        if body is None:
            return None
        if encoding == "zstd":
            body = await asyncio.to_thread(unpacked, body, most)
            self._hold(held, len(body))
        if scope["path"] not in BINARY and crowded(body):
            raise ServiceError("a JSON body has too many values; send less at once", 413)
        return body

    async def _read(self, receive: Receive, held: "_Held", most: int) -> bytes | None:
        parts, size, begun = list[bytes](), 0, time.monotonic()
        while True:
            try:
                async with asyncio.timeout(self._patience):
                    message = await receive()
            except TimeoutError:
                message = {"type": "late"}
            slow = time.monotonic() - begun > self._patience + size / _SLOWEST
            if message["type"] == "late" or slow:
                raise ServiceError("the body comes too slowly; send it again", 408)
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > most:
                raise _too_large(most)
            self._hold(held, len(parts[-1]))
            if not message.get("more_body", False):
                return b"".join(parts)

    def _hold(self, held: "_Held", size: int) -> None:
        """
        Raises:
            ServiceError: with it, too much would be in memory.
        """
        if size > self._left:
            raise ServiceError("the server is reading too much already; try again", 503, "server")
        mine = self._of.get(held.owner, 0) + size
        if mine > self._share:
            raise BusyError("too much of what you send is being read already; try again")
        self._left, self._of[held.owner] = self._left - size, mine
        held.bytes += size

    def _let_go(self, held: "_Held") -> None:
        self._left += held.bytes
        left = self._of.pop(held.owner, 0) - held.bytes
        if left:
            self._of[held.owner] = left


@dataclass(slots=True)
class _Held:
    """Bytes of memory that one request has for its body."""

    bytes: int = 0
    owner: str = ""


def _replaying(body: bytes, receive: Receive) -> Receive:
    """Gives the body at once, and then what comes behind it: that the client went away."""
    left = [body]

    async def again() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return again


def crowded(body: bytes) -> bool:
    """Whether a JSON body would be many times larger when it is parsed."""
    if len(body) <= _SMALL:
        return False
    return body.count(b",") > _MOST_VALUES or body.count(b"[") + body.count(b"{") > _MOST_LISTS


def unpacked(body: bytes, most: int) -> bytes:
    """
    Raises:
        ServiceError: it is not one whole zstd frame, or is larger than `most` when it is unpacked.
    """
    try:
        size = zstandard.get_frame_parameters(body).content_size
        known = size != zstandard.CONTENTSIZE_UNKNOWN
        if size > most if known else _is_longer(body, most):
            raise _too_large(most)
        reader = _zstd().decompressobj()
        data = reader.decompress(body)
    except zstandard.ZstdError as error:
        raise ServiceError("the body is not zstd-compressed data") from error
    if not reader.eof or reader.unused_data:
        raise ServiceError("the body is not one whole frame of zstd-compressed data")
    return bytes(data)


def _zstd() -> Any:
    return zstandard.ZstdDecompressor(max_window_size=1 << 27)


def _is_longer(body: bytes, most: int) -> bool:
    size = 0
    try:
        with _zstd().stream_reader(body) as reader:
            while size <= most and (block := reader.read(1 << 20)):
                size += len(block)
    except zstandard.ZstdError:
        return False
    return size > most


def _too_large(most: int) -> ServiceError:
    return ServiceError(
        f"a body has up to {most} bytes, unpacked too; send less at once, or upload media", 413
    )


async def _refuse(receive: Receive, send: Send, error: ServiceError) -> None:
    """Answer, and read on for a moment: who is still sending would not see the answer otherwise."""
    said = {"error": error.message, "category": error.category, "detail": error.message}
    body = json.dumps(said).encode()
    headers: list[Any] = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    read = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_SECONDS):
            while read < _LINGER_BYTES and (message := await receive()).get("more_body", False):
                read += len(message["body"])
    await send({"type": "http.response.body", "body": b""})

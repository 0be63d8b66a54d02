"""Requests to a server, from one thread of their own: in order where order counts, again where a
connection breaks.
"""

import asyncio
import contextlib
import hashlib
import json
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

import httpx

from plait.errors import ConfigError, DataError, ModelError, PlaitError
from plait.service.wire.certificates import certificates

Value = TypeVar("Value")
Sending = Callable[[], Coroutine[Any, Any, Any]]

PATIENCE = 600.0
"""Seconds to try again while a server does not answer."""

HEARTBEAT = 10.0
UPLOAD_BYTES = 1_000_000
"""A larger file is sent once, and named by its hash."""

_BLOCK = 8_000_000
_AGAIN = (408, 429, 500, 502, 503, 504)
_TOGETHER = 64


class Transport:
    """
    Args:
        url: The server's address.
        key: Of the caller, where the server asks for one.
    """

    def __init__(self, url: str, key: str | None) -> None:
        self.url = url.rstrip("/")
        self._headers = {"X-API-Key": key} if key else {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, daemon=True, name="plait-http"
        )
        self._thread.start()
        self._client = httpx.AsyncClient(
            base_url=self.url, headers=self._headers, timeout=httpx.Timeout(60, pool=None),
            trust_env=False, verify=certificates(), limits=httpx.Limits(max_connections=_TOGETHER),
        )  # fmt: skip
        self._sent: set[str] = set()
        """Uploads that the server has."""

        self.end = weakref.finalize(self, _stop, self._loop, self._client)

    def run(self, work: Coroutine[Any, Any, Value]) -> "Future[Value]":
        """Start it on the transport's own thread.

        Raises:
            ModelError: the client was closed.
        """
        if not self.end.alive:
            work.close()
            raise ModelError("this client is closed; create a new one")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def call(self, method: str, path: str, **options: Any) -> Any:
        """Ask, and wait for the answer; from any thread but the transport's own.

        Raises:
            PlaitError: the server refuses, or does not answer.
        """
        return self.run(self.ask(method, path, **options)).result()

    async def ask(self, method: str, path: str, **options: Any) -> Any:
        """The JSON of an answer.

        Raises:
            PlaitError: as `call`.
        """
        response = await self.answer(method, path, **options)
        return response.json() if response.content else None

    async def answer(
        self, method: str, path: str, but: Collection[int] = (), **options: Any
    ) -> httpx.Response:
        """An answer that is no error; asked for again while the server is away or busy.

        Args:
            but: Errors that are answers, too.
        """
        until, pause = self._loop.time() + PATIENCE, 0.2
        while True:
            problem = ""
            try:
                response = await self._client.request(method, path, **options)
                if response.is_success or response.status_code in but:
                    return response
                if response.status_code not in _AGAIN:
                    raise _refused(response)
                problem = str(_refused(response))
            except httpx.HTTPError as error:
                if "CERTIFICATE_VERIFY_FAILED" in str(error):  # it will not be another one later
                    raise ModelError(
                        f"the certificate of {self.url} is not trusted: {error}; SSL_CERT_FILE "
                        "names a file of those that are"
                    ) from error
                problem = f"{type(error).__name__} {error}"
            if self._loop.time() > until:
                raise ModelError(f"{self.url} does not answer: {problem}")
            await asyncio.sleep(pause)
            pause = min(2 * pause, 10.0)

    async def result(self, promise: Mapping[str, Any]) -> httpx.Response:
        """What came of a promise, however long it takes.

        Raises:
            PlaitError: it failed.
        """
        body = {"request_id": promise["request_id"]}
        while True:
            response = await self.answer("POST", "/api/v1/retrieve_future", (408,), json=body)
            if response.status_code == 408:
                continue
            if response.headers["content-type"].startswith("application/json"):
                said = response.json()
                if isinstance(said, dict) and "error" in said and "category" in said:
                    raise failed(said["error"], said["category"])
            return response

    async def lines(self, method: str, path: str, **options: Any) -> AsyncIterator[str]:
        """An answer's lines, as they come.

        Raises:
            PlaitError: the server refuses, or the answer ends with an error.
        """
        async with self._client.stream(method, path, **options) as response:
            if not response.is_success:
                await response.aread()
                raise _refused(response)
            async for line in response.aiter_lines():
                if line.startswith('{"error"'):
                    said = json.loads(line)
                    raise failed(said["error"], said["category"])
                if line:
                    yield line

    async def repeating(self, seconds: float, path: str, body: Mapping[str, Any]) -> None:
        """A sign of life, until it is cancelled."""
        while True:
            await asyncio.sleep(seconds)
            with contextlib.suppress(PlaitError):
                await self.ask("POST", path, json=dict(body))

    async def upload(self, data: bytes) -> str:
        """Send a file once; its SHA-256."""
        sha256 = await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())
        if sha256 in self._sent:
            return sha256
        path = f"/api/v1/media/{sha256}"
        offset, until = None, self._loop.time() + PATIENCE
        while True:
            if offset is None:  # the server knows how much has come, whatever was torn off
                there = await self.answer("GET", path, (404,))
                offset = there.json()["received"] if there.is_success else 0
            else:
                there = await self.answer(
                    "POST", "/api/v1/media", (409,), content=data[offset : offset + _BLOCK],
                    params={"sha256": sha256, "size": len(data), "offset": offset},
                )  # fmt: skip
                offset = there.json()["received"] if there.is_success else None
            if there.is_success and there.json()["complete"]:
                self._sent.add(sha256)
                return sha256
            if there.is_success:
                until = self._loop.time() + PATIENCE
            elif self._loop.time() > until:
                raise _refused(there)
            elif there.status_code == httpx.codes.CONFLICT:
                await asyncio.sleep(0.5)


def _refused(response: httpx.Response) -> Exception:
    try:
        said = response.json()
        message, category = said["error"], said.get("category", "user")
    except (ValueError, KeyError, TypeError):
        message, category = f"the server answers {response.status_code}", "server"
    return failed(message, category)


def failed(message: str, category: str) -> PlaitError:
    """The error that a server's words stand for."""
    if category != "user":
        return ModelError(message)
    return DataError(message) if message.startswith("datum ") else ConfigError(message)


def _stop(loop: asyncio.AbstractEventLoop, client: httpx.AsyncClient) -> None:
    async def close() -> None:
        for task in asyncio.all_tasks():
            if task is not asyncio.current_task():
                task.cancel()
        await client.aclose()
        loop.call_soon(loop.stop)

    if not loop.is_closed():
        asyncio.run_coroutine_threadsafe(close(), loop)


class InOrder:
    """Sends requests one after another, each when the one before it was promised."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._lock = threading.Lock()
        self._last: asyncio.Task[Any] | None = None

    def put(
        self,
        send: Sending,
        convert: Callable[[httpx.Response], Value],
    ) -> "Future[Value]":
        """Queue a request; the future holds what its result is converted to."""
        with self._lock:  # so that the loop takes them in the order of these calls
            return self._transport.run(self._put(send, convert))

    async def _put(
        self,
        send: Sending,
        convert: Callable[[httpx.Response], Value],
    ) -> Value:
        before = self._last
        promised = asyncio.create_task(self._send(before, send))
        self._last = promised
        response = await self._transport.result(await promised)
        return await asyncio.to_thread(convert, response)

    async def _send(self, before: "asyncio.Task[Any] | None", send: Sending) -> Any:
        if before is not None:
            await asyncio.wait([before])
        return await send()

"""Results on their way."""

import asyncio
from collections.abc import Generator
from concurrent.futures import Future
from typing import Any, Generic, Self, TypeVar

Value = TypeVar("Value")


class APIFuture(Generic[Value]):
    """A result on its way: `.result()` waits for it, `await` does too."""

    def __init__(self, future: "Future[Any]", convert: Any) -> None:
        self._future, self._convert = future, convert

    def result(self, timeout: float | None = None) -> Value:
        """The result, or the error of its command.

        Args:
            timeout: Seconds to wait at most; TimeoutError after them.
        """
        value: Value = self._convert(self._future.result(timeout))
        return value

    def __await__(self) -> Generator[Any, None, Value]:
        raw = yield from asyncio.wrap_future(self._future).__await__()
        value: Value = self._convert(raw)
        return value


class Ready:
    """Clients are ready when they are returned; `.result()` and `await` are accepted as well."""

    def result(self, timeout: float | None = None) -> Self:
        del timeout
        return self

    def __await__(self) -> Generator[Any, None, Self]:
        yield from ()
        return self

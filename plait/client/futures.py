"""Results on their way."""

import asyncio
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import Future
from typing import Any, Generic, Self, TypeVar

Value = TypeVar("Value")
Other = TypeVar("Other")


class APIFuture(Generic[Value]):
    """A result on its way: `.result()` waits for it, `await` does too."""

    def __init__(
        self,
        future: "Future[Any]",
        convert: Callable[[Any], Any],
        cancel: Callable[[], object] | None = None,
    ) -> None:
        self._future, self._convert, self._cancel = future, convert, cancel

    def result(self, timeout: float | None = None) -> Value:
        """The result, or the error of its command.

        Args:
            timeout: Seconds to wait at most; TimeoutError after them.
        """
        value: Value = self._convert(self._future.result(timeout))
        return value

    def then(self, convert: Callable[[Value], Other]) -> "APIFuture[Other]":
        """The same, with its result converted; `convert` runs where the result is asked for."""
        return APIFuture(self._future, lambda raw: convert(self._convert(raw)), self._cancel)

    def done(self) -> bool:
        """Whether `result` would not wait."""
        return self._future.done()

    def cancel(self) -> bool:
        """Ask that it not be computed to its end; False where that cannot be, or is too late.

        Only samples can be taken back: a training step behind another relies on it. The result
        is then `concurrent.futures.CancelledError`.
        """
        if self._cancel is None or self._future.done():
            return False
        self._cancel()
        return True

    def __await__(self) -> Generator[Any, None, Value]:
        try:
            raw = yield from asyncio.wrap_future(self._future).__await__()
        except asyncio.CancelledError:  # nobody waits for it any more, as after `wait_for`'s time
            self.cancel()
            raise
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


class AsyncNames:
    """Every method under its name with `_async` behind it, as the Tinker API has them.

    What it does is done in a thread, so that the event loop goes on; awaiting it gives what the
    method returns.
    """

    def __getattr__(self, name: str) -> Callable[..., Coroutine[Any, Any, Any]]:
        method = name.removesuffix("_async")
        if method == name or method.startswith("_") or not hasattr(type(self), method):
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
        bound: Callable[..., Any] = getattr(self, method)

        async def call(*args: Any, **options: Any) -> Any:
            return await asyncio.to_thread(bound, *args, **options)

        call.__name__ = name
        return call

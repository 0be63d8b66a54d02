"""What a client is told when something is refused or fails: a status, a category, one sentence."""

from typing import Literal

from plait.errors import PlaitError

_LONGEST = 1000
"""Characters of a message: it may repeat what was sent."""

Category = Literal["user", "server", "unknown"]


class ServiceError(PlaitError, RuntimeError):
    """A request that is answered with an error.

    Args:
        message: Rule, value and remedy.
        status: Of HTTP.
        category: Whose fault it is, in the Tinker API's words.
    """

    def __init__(self, message: str, status: int = 400, category: Category = "user") -> None:
        message = message[:_LONGEST]
        super().__init__(message)
        self.message, self.status, self.category = message, status, category

    def __reduce__(self) -> tuple[type, tuple[str, int, str]]:
        return type(self), (self.message, self.status, self.category)


class NotFoundError(ServiceError):
    """There is none, or it is another owner's: one is not told which."""

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(f"there is no {kind} {name[:_LONGEST]!r}", 404)
        self.kind, self.name = kind, name

    def __reduce__(self) -> tuple[type, tuple[str, str]]:  # type: ignore[override]
        return type(self), (self.kind, self.name)


class UnavailableError(ServiceError):
    """The database, the disk or the engine cannot take it now."""

    def __init__(self, message: str) -> None:
        super().__init__(message, 503, "server")

    def __reduce__(self) -> tuple[type, tuple[str]]:  # type: ignore[override]
        return type(self), (self.message,)


class BusyError(ServiceError):
    """Too much waits already, or too much was asked for in a minute."""

    def __init__(self, message: str) -> None:
        super().__init__(message, 429)

    def __reduce__(self) -> tuple[type, tuple[str]]:  # type: ignore[override]
        return type(self), (self.message,)

"""Since when a checkpoint of a store is there, and until when: all that ever changes in one."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from plait.errors import CheckpointError
from plait.ranges import check_number
from plait.trainer.manifest import LIFETIME, read_sealed, write_sealed


def check_ttl(ttl_seconds: float | None) -> None:
    """
    Raises:
        ConfigError: it is not above 0; None is for ever.
    """
    if ttl_seconds is not None:
        check_number("ttl_seconds", ttl_seconds, "(0, inf)")


@dataclass(frozen=True, slots=True)
class Lifetime:
    """In seconds since the epoch; what never expires has no end."""

    saved_at: float = 0.0
    expires_at: float | None = None

    @classmethod
    def begin(cls, now: float, ttl_seconds: float | None, saved_at: float | None = None) -> Self:
        """One that ends so many seconds after `now`."""
        expires_at = None if ttl_seconds is None else now + ttl_seconds
        return cls(now if saved_at is None else saved_at, expires_at)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """
        Raises:
            DamagedCheckpointError: it is missing, or not what was written.
        """
        return cls(**read_sealed(folder / LIFETIME))

    @classmethod
    def found(cls, folder: Path) -> Self:
        """As `read`, but one that cannot be read never ends: nothing is removed by mistake."""
        try:
            return cls.read(folder)
        except CheckpointError:
            return cls()

    def write(self, folder: Path) -> None:
        write_sealed(folder / LIFETIME, asdict(self))

    def over(self, now: float) -> bool:
        return self.expires_at is not None and self.expires_at <= now

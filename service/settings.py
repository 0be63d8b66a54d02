"""What an operator sets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from plait.errors import ConfigError, UnknownNameError
from plait.ranges import check_number
from plait.service.catalog import Offer

_DURATIONS = (
    "hold_seconds", "gap_seconds", "retention_seconds", "undelivered_seconds", "known_seconds",
    "audit_seconds", "session_seconds", "recovery_seconds",
)  # fmt: skip
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, kw_only=True)
class Quotas:
    """What one owner may have and ask for at once."""

    requests_per_minute: int | None = None
    """Operations of an owner a minute; what is over waits, as `paused_rate_limit`."""

    waiting: int = 10_000
    """Operations of an owner that wait for the engine; another one is answered 429."""

    waiting_bytes: int = 2_000_000_000
    """Bytes of their bodies from which on another one is answered 429."""

    runs: int = 10_000
    """Runs of an owner, those that are not in memory too."""

    upload_bytes: int = 100_000_000_000
    """Bytes of an owner's uploads on the disk, those that have come in part too."""

    def __post_init__(self) -> None:
        for name in ("waiting", "waiting_bytes", "runs", "upload_bytes"):
            check_number(name, getattr(self, name), "[1, inf)", whole=True)
        if self.requests_per_minute is not None:
            check_number("requests_per_minute", self.requests_per_minute, "[1, inf)", whole=True)


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """One server.

    Args:
        models: What may be trained and sampled, by the name that clients say.
        data_dir: Checkpoints, payloads, uploads, and the database if none is named.
    """

    models: Mapping[str, Offer]
    data_dir: Path
    database: str | None = None
    """A SQLAlchemy URL; SQLite in `data_dir` by default."""

    host: str = "127.0.0.1"
    port: int = 8000
    tls_cert: Path | None = None
    tls_key: Path | None = None

    quotas: Quotas = field(default_factory=Quotas)

    body_bytes: int = 256_000_000
    """Of one request, before and after it is decompressed."""

    media_bytes: int = 1_000_000_000
    """Of one uploaded file."""

    allowed_hosts: tuple[str, ...] = ()
    """Hosts from which `image_url` and the like may be fetched; none by default."""

    hold_seconds: float = 30.0
    """How long a request for a result is held before it is answered 408."""

    gap_seconds: float = 60.0
    """How long operations wait for one of a smaller number that has not come."""

    retention_seconds: float = 86_400.0
    """How long a result that was delivered is kept; others are kept `undelivered_seconds`."""

    undelivered_seconds: float = 7 * 86_400.0

    known_seconds: float = 30 * 86_400.0
    """How long a request is known by its number after it was done, so that it is not done again."""

    audit_seconds: float = 366 * 86_400.0
    """How long the audit log goes back."""

    session_seconds: float = 3_600.0
    """A run that nobody used for so long leaves memory; its next request brings it back."""

    recovery_seconds: float = 30.0
    """Computing that may have to be repeated after a crash, of each run."""

    engine_capacity: int = 4096
    """Positions of a micro-batch."""

    sampler_memory_mb: int = 1024
    devices: int = 1
    threads: int | None = None
    """Of torch in the engine; as many as the machine has by default."""

    jwt_secret: str | None = field(default=None, repr=False)
    """Accept JSON web tokens that are signed with it (HS256)."""

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError("a server needs a model; name one: plait serve --model NAME")
        for name in ("body_bytes", "media_bytes", "engine_capacity", "sampler_memory_mb"):
            check_number(name, getattr(self, name), "[1, inf)", whole=True)
        for name in _DURATIONS:
            check_number(name, getattr(self, name), "(0, inf)")
        check_number("port", self.port, "[0, 65536)", whole=True)
        check_number("devices", self.devices, "[1, inf)", whole=True)
        if self.threads is not None:
            check_number("threads", self.threads, "[1, inf)", whole=True)
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("TLS needs both a certificate and its key: --tls-cert and --tls-key")

    @property
    def database_url(self) -> str:
        return self.database or f"sqlite:///{self.data_dir / 'plait.db'}"

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host in LOOPBACK


def make_folder(folder: Path) -> None:
    """The folder of a server's data.

    Raises:
        ConfigError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be the folder of a server's data: {error.strerror}; name another "
            "--data-dir"
        ) from error


def _numbers(settings: type[ServiceSettings | Quotas], prefix: str = "") -> dict[str, type]:
    return {
        prefix + field.name: field.type
        for field in fields(settings)
        if field.type in (int, float) and isinstance(field.type, type)
    }


_QUOTAS = "quotas."
_NUMBERS = _numbers(ServiceSettings) | _numbers(Quotas, _QUOTAS)


def overridden(settings: ServiceSettings, words: Sequence[str]) -> ServiceSettings:
    """The settings with `NAME=NUMBER` changed, `quotas.NAME=NUMBER` for one of `Quotas`.

    Raises:
        ConfigError: a name is unknown, or a number is none.
    """
    changed: dict[str, Any] = {}
    quotas: dict[str, Any] = {}
    for word in words:
        name, _, text = word.partition("=")
        if name not in _NUMBERS:
            raise UnknownNameError("setting of the server", name, _NUMBERS)
        try:
            number = _NUMBERS[name](text)
        except ValueError:
            raise ConfigError(f"{name} is a number; it is {text!r}") from None
        if name.startswith(_QUOTAS):
            quotas[name.removeprefix(_QUOTAS)] = number
        else:
            changed[name] = number
    return replace(settings, **changed, quotas=replace(settings.quotas, **quotas))

"""Run one server."""

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import structlog
import uvicorn

from plait.errors import ConfigError
from plait.service.app import create_app
from plait.service.keys import has_keys
from plait.service.settings import ServiceSettings

_DRAIN_SECONDS = 20


class _Server(uvicorn.Server):
    """Ends as asked for, and not by the signal that asked: an operator sees success."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        signals = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(sign, self.handle_exit) for sign in signals]
        try:
            yield
        finally:
            for sign, handler in zip(signals, before, strict=True):
                signal.signal(sign, handler)


def serve(settings: ServiceSettings) -> None:
    """Until it is told to stop (SIGTERM, SIGINT); open requests are answered first.

    Raises:
        ConfigError: others could reach it, and nobody has a key.
    """
    log_lines()
    _require_keys(settings)
    config = uvicorn.Config(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        ssl_certfile=None if settings.tls_cert is None else str(settings.tls_cert),
        ssl_keyfile=None if settings.tls_key is None else str(settings.tls_key),
        timeout_graceful_shutdown=_DRAIN_SECONDS,
        timeout_keep_alive=75,
        access_log=False,
        log_level="warning",
        backlog=4096,
    )
    _Server(config).run()


def _require_keys(settings: ServiceSettings) -> None:
    if settings.loopback or settings.jwt_secret is not None or has_keys(settings):
        return
    raise ConfigError(
        f"a server on {settings.host} can be reached by others, and there is no key yet: make one "
        "(plait keys create OWNER), or leave --host out"
    )


def log_lines() -> None:
    """JSON, a line an event, to standard error."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
    )

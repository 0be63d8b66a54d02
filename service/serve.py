"""Run one server."""

import logging
import signal
import socket
import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import structlog
import uvicorn

from plait.errors import ConfigError
from plait.service.app import create_app
from plait.service.keys import has_keys
from plait.service.service import Service
from plait.service.settings import ServiceSettings

_LOG = structlog.get_logger()
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
    listening = _listening(settings)
    config = uvicorn.Config(
        create_app(settings, service=Service(settings)),
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
        timeout_graceful_shutdown=_DRAIN_SECONDS,
        timeout_keep_alive=75,
        access_log=False,
        log_level="warning",
    )
    scheme, port = "http" if settings.tls_cert is None else "https", listening.getsockname()[1]
    _LOG.info(
        "serving", url=f"{scheme}://{settings.host}:{port}", models=list(settings.models),
        data_dir=str(settings.data_dir),
    )  # fmt: skip
    _Server(config).run([listening])


def _listening(settings: ServiceSettings) -> socket.socket:
    """
    Raises:
        ConfigError: the address or the certificate cannot be used.
    """
    if settings.tls_cert is not None:
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(settings.tls_cert, settings.tls_key)
        except OSError as error:
            raise ConfigError(
                f"{settings.tls_cert} and {settings.tls_key} are no certificate and its key, in "
                f"PEM: {error.strerror or error}"
            ) from error
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=4096)
    except OSError as error:
        raise ConfigError(
            f"{settings.host} cannot be listened on at port {settings.port}: {error.strerror}; "
            "choose another --port or --host"
        ) from error


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

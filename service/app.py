"""The application: routes over one service."""

import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from plait.errors import PlaitError
from plait.service.errors import ServiceError
from plait.service.middleware import Bounded, Observed
from plait.service.routes import (
    futures,
    media,
    openai,
    operating,
    own,
    sampling,
    sessions,
    training,
    weights,
)
from plait.service.routes.context import owner_of
from plait.service.service import Service
from plait.service.settings import ServiceSettings

_LOG = structlog.get_logger()
_TOGETHER = 4
"""Bodies of the largest size that are in memory at once."""


def create_app(
    settings: ServiceSettings,
    clock: Callable[[], float] = time.time,
    service: Service | None = None,
) -> FastAPI:
    """The server of these settings; it starts its engine when it is started.

    Args:
        service: One of them that is made already.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.service = made = service or Service(settings, clock)
        await made.start()
        try:
            yield
        finally:
            await made.stop()

    app = FastAPIOffline(title="Plait", version="1", lifespan=lifespan)
    app.add_middleware(
        Bounded,
        most=settings.body_bytes,
        together=_TOGETHER * settings.body_bytes,
        owner_of=owner_of,
    )
    app.add_middleware(Observed)
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(PlaitError, _plait_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unforeseen)
    for router in (
        sessions.router, training.router, sampling.router, futures.router, weights.router,
        operating.router, openai.router, media.router, own.router,
    ):  # fmt: skip
        app.include_router(router)
    return app


def _answer(request: Request, status: int, message: str, category: str) -> JSONResponse:
    if request.url.path.startswith("/v1/"):
        error = ServiceError(message, status, category)  # type: ignore[arg-type]
        return JSONResponse({"error": openai.openai_error(error)}, status)
    return JSONResponse({"error": message, "category": category, "detail": message}, status)


async def _service_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServiceError)
    return _answer(request, error.status, error.message, error.category)


async def _plait_error(request: Request, error: Exception) -> JSONResponse:
    return _answer(request, 422, str(error)[:1000], "user")


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first: dict[str, Any] = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    if first["type"] == "extra_forbidden":
        return _answer(request, 422, f"{where} is not a field of this request", "user")
    return _answer(request, 422, f"{where or 'the body'}: {first['msg']}", "user")


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    response = _answer(request, error.status_code, str(error.detail), "user")
    response.headers.update(error.headers or {})
    return response


async def _unforeseen(request: Request, error: Exception) -> JSONResponse:
    _LOG.error("unforeseen_error", path=request.url.path, exc_info=error)
    return _answer(
        request, 500, f"the server failed ({type(error).__name__}); its log says more", "server"
    )

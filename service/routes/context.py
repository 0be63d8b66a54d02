"""What every route needs: the service, and who asks."""

from typing import Annotated, Any, Literal

from fastapi import Depends, Query, Request
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.types import Scope

from plait.service.errors import ServiceError
from plait.service.keys import ANYBODY, Caller
from plait.service.service import Service


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Serving = Annotated[Service, Depends(service_of)]


async def caller_of(request: Request, service: Serving) -> Caller:
    """Who asks, by the key in X-API-Key or behind Bearer.

    Raises:
        ServiceError: there is no key, or it is not known; or it may only read, and this writes.
    """
    _check_query(request)
    caller = await identified(request.headers, service)
    request.state.caller, reads = caller, _reads(request)
    request.state.changes = not reads and not _marked(request, "x-heartbeat")
    if request.state.changes:
        request.state.target = _target(request)
    if not caller.may_write() and not reads:
        raise ServiceError("this key may only read", 403)
    return caller


async def identified(headers: Headers, service: Service) -> Caller:
    """
    Raises:
        ServiceError: there is no key, or it is not known.
    """
    key = headers.get("x-api-key") or _bearer(headers)
    if not await service.keys.any() and service.settings.jwt_secret is None:
        return ANYBODY  # the server has seen to it that only this machine can ask
    if not key:
        raise ServiceError("a key is needed: send it in X-API-Key, or as Bearer", 401)
    return await service.identify(key)


async def owner_of(scope: Scope) -> str:
    """Who sends a request, before its body is read.

    Raises:
        ServiceError: as `identified`.
    """
    return (await identified(Headers(scope=scope), scope["app"].state.service)).owner


def _check_query(request: Request) -> None:
    """That a request asks by no parameter that its route would not read.

    Raises:
        ServiceError: it does.
    """
    route = request.scope.get("route")
    if not isinstance(route, APIRoute) or _marked(request, "x-refused"):
        return
    known = {field.alias for field in route.dependant.query_params}
    for name in request.query_params:
        if name not in known:
            raise ServiceError(f"{name[:80]!r} is not a parameter of this request", 422)


def _reads(request: Request) -> bool:
    """Whether a request changes nothing, as its route says."""
    return request.method in ("GET", "HEAD") or _marked(request, "x-reads")


def _marked(request: Request, word: str) -> bool:
    more = getattr(request.scope.get("route"), "openapi_extra", None) or {}
    return bool(more.get(word))


_OBJECTS = ("request_id", "model_id", "sampling_session_id", "session_id", "path")
"""Fields of bodies that say what a request is about, the narrowest first."""


def _target(request: Request) -> str:
    """What a request that changes something is about, for the audit log."""
    if request.path_params:
        return "/".join(map(str, request.path_params.values()))
    if getattr(request.scope.get("route"), "body_field", None) is None:
        return ""  # the route reads the body, and says it itself
    body = getattr(request, "_json", None)  # parsed for the route already, where it is JSON
    said = body if isinstance(body, dict) else {}
    return next((str(said[name]) for name in _OBJECTS if isinstance(said.get(name), str)), "")


def _bearer(headers: Headers) -> str | None:
    kind, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if kind.lower() == "bearer" else None


Offset = Annotated[int, Query(lt=2**62)]
"""Where a page begins; databases take 64 bits."""

AccessScope = Literal["owned", "accessible"]
"""Of lists, as the Tinker client asks: nobody can list what is another's, so both are the same."""

Asking = Annotated[Caller, Depends(caller_of)]

READS: dict[str, Any] = {"x-reads": True}
"""Marks a POST that changes nothing, which a read-only key may send."""

HEARTBEAT: dict[str, Any] = {"x-heartbeat": True}
"""Marks a sign of life, which the audit log does not keep."""


async def admin_of(caller: Asking) -> Caller:
    """
    Raises:
        ServiceError: the key is no admin's.
    """
    if caller.role != "admin":
        raise ServiceError("this needs an admin's key", 403)
    return caller


Admin = Annotated[Caller, Depends(admin_of)]

"""What an operator asks: health, metrics, keys, the audit log."""

from datetime import UTC, date, datetime
from typing import Any, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from sqlalchemy import Row, select

from plait.service import metrics
from plait.service.database.tables import audit
from plait.service.routes.context import Admin, Asking, Serving

router = APIRouter(tags=["operating"])


@router.get("/healthz")
@router.get("/api/v1/healthz")
async def healthz() -> dict[str, str]:
    """The server answers."""
    return {"status": "ok"}


@router.get("/readyz")
async def readyz(service: Serving) -> Response:
    """The engine and the database answer, and the server is not being stopped."""
    database = await service.database_answers()
    ready = service.host.up and database and not service.draining
    said = {"engine": service.host.up, "database": database, "draining": service.draining}
    return JSONResponse({"ready": ready, **said}, 200 if ready else 503)


@router.get("/metrics")
async def prometheus(service: Serving) -> Response:
    live = list(service.runner.live.values())
    metrics.WAITING.set(len(live))
    oldest = min((one.created_at for one in live), default=service.clock())
    metrics.OLDEST.set(max(service.clock() - oldest, 0.0))
    resident = sum(scope.is_run and scope.resident for scope in service.runner.scopes.values())
    metrics.RUNS.set(resident)
    metrics.ENGINE_UP.set(service.host.up)
    metrics.ENGINE_RESTARTS.set(service.host.restarts)
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


@router.get("/api/v1/status")
async def status(caller: Asking, service: Serving) -> dict[str, Any]:
    """The server in a few numbers."""
    engine: dict[str, Any] = {"up": service.host.up, "restarts": service.host.restarts}
    if caller.role == "admin":
        engine["pid"] = service.host.pid
    return {
        "engine": engine,
        "models": list(service.settings.models),
        "waiting": service.runner.waiting_of.get(caller.owner, 0),
        "owner": caller.owner,
        "role": caller.role,
    }


@router.get("/api/v1/audit")
async def audit_log(
    caller: Admin, service: Serving, limit: int = 1000, event_type: Literal["all"] = "all",
    day: date | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What was changed, by whom, the oldest first: on a day (UTC), or the newest of all days."""
    chosen = select(audit).order_by(audit.c.id.desc()).limit(min(max(limit, 1), 1000))
    if day is not None:
        begin = datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()
        chosen = chosen.where((audit.c.at >= begin) & (audit.c.at < begin + 86_400))
    rows = await service.database.read(lambda connection: connection.execute(chosen).all())
    return {"entries": [_entry(row) for row in reversed(rows)]}


def _entry(row: Row[Any]) -> dict[str, Any]:
    """As the Tinker API tells it."""
    names = ("owner", "key_id", "target", "status", "request_id")
    return {
        "timestamp": datetime.fromtimestamp(row.at, UTC).isoformat(),
        "event": row.action,
        "event_details": {name: getattr(row, name) for name in names},
    }

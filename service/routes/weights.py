"""What lists runs and checkpoints, and changes their lifetime."""

import json
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from sqlalchemy import Row, delete, func, select, update

from plait.service import bodies
from plait.service.database.tables import checkpoints, runs
from plait.service.errors import NotFoundError, ServiceError
from plait.service.routes.context import READS, AccessScope, Asking, Offset, Serving

router = APIRouter(prefix="/api/v1", tags=["weights"])

TYPES = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}


def iso(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat()


def told(row: Row[Any]) -> dict[str, Any]:
    """A checkpoint, as the Tinker API tells it."""
    return {
        "checkpoint_id": f"{row.kind}/{row.name}",
        "checkpoint_type": TYPES[row.kind],
        "time": iso(row.created_at),
        "tinker_path": row.path,
        "size_bytes": row.size_bytes,
        "public": bool(row.public),
        "user_metadata": json.loads(row.metadata_json) or None,
        "expires_at": iso(row.expires_at),
    }


@router.get("/get_server_capabilities")
async def capabilities(caller: Asking, service: Serving) -> dict[str, Any]:
    return {
        "supported_models": [
            {
                "model_name": name,
                "max_context_length": await service.contexts.of(name),
                "trainable": True,
                "sampleable": True,
            }
            for name in service.settings.models
        ]
    }


@router.get("/training_runs")
async def training_runs(
    caller: Asking,
    service: Serving,
    limit: int = 20,
    offset: Offset = 0,
    access_scope: AccessScope = "owned",
) -> dict[str, Any]:
    limit, offset = min(max(limit, 1), 1000), max(offset, 0)
    mine = runs.c.owner == caller.owner
    rows, total = await service.database.read(
        lambda connection: (
            connection.execute(
                select(runs)
                .where(mine)
                .order_by(runs.c.created_at.desc(), runs.c.id)
                .limit(limit)
                .offset(offset)
            ).all(),
            connection.execute(select(func.count()).select_from(runs).where(mine)).scalar_one(),
        )
    )
    return {
        "training_runs": [await _run(service, row) for row in rows],
        "cursor": {"offset": offset, "limit": limit, "total_count": total},
    }


@router.get("/training_runs/{run_id}")
async def training_run(
    run_id: str, caller: Asking, service: Serving, access_scope: AccessScope = "owned"
) -> dict[str, Any]:
    return await _run(service, await service.run(caller, run_id))


async def _run(service: Serving, row: Row[Any]) -> dict[str, Any]:
    saved = await _saved(service, checkpoints.c.run_id == row.id)
    last = {kind: told(one) for kind in TYPES for one in saved if one.kind == kind}
    info = json.loads(row.info_json or "{}")
    scope = service.scope_now(row.id)
    return {
        "training_run_id": row.id,
        "base_model": row.base_model,
        "model_owner": row.owner,
        "is_lora": bool(info.get("is_lora", True)),
        "lora_rank": info.get("lora_rank"),
        "last_request_time": iso(scope.used_at if scope and scope.used_at else row.used_at),
        "last_checkpoint": last.get("weights"),
        "last_sampler_checkpoint": last.get("sampler_weights"),
        "user_metadata": {k: str(v) for k, v in json.loads(row.metadata_json).items()} or None,
    }


async def _saved(service: Serving, condition: Any) -> list[Row[Any]]:
    """Checkpoints that have not expired, the oldest first."""
    c, now = checkpoints.c, service.clock()
    alive = c.expires_at.is_(None) | (c.expires_at > now)
    return await service.database.read(
        lambda connection: list(
            connection.execute(
                select(checkpoints).where(condition & alive).order_by(c.created_at, c.path)
            ).all()
        )
    )


@router.get("/training_runs/{run_id}/checkpoints")
async def of_run(run_id: str, caller: Asking, service: Serving) -> dict[str, Any]:
    run = await service.run(caller, run_id)
    rows = await _saved(service, checkpoints.c.run_id == run.id)
    return {"checkpoints": [told(row) for row in rows]}


@router.get("/checkpoints")
async def of_owner(
    caller: Asking, service: Serving, limit: int = 100, offset: Offset = 0
) -> dict[str, Any]:
    limit, offset = min(max(limit, 1), 1000), max(offset, 0)
    rows = await _saved(service, checkpoints.c.owner == caller.owner)
    rows.reverse()
    return {
        "checkpoints": [told(row) for row in rows[offset : offset + limit]],
        "cursor": {"offset": offset, "limit": limit, "total_count": len(rows)},
    }


@router.post("/weights_info", openapi_extra=READS)
async def weights_info(
    body: bodies.WeightsInfo, caller: Asking, service: Serving
) -> dict[str, Any]:
    saved = await service.checkpoint(caller, body.tinker_path)
    spec = service.manifest(saved.path)["spec"]
    lora = spec.get("lora")
    targets = (lora or {}).get("targets", ())
    every = "all-linear" in targets
    return {
        "base_model": await service.base_model_of(saved.run_id),
        "is_lora": lora is not None,
        "lora_rank": lora and lora["rank"],
        "train_unembed": "output" in targets,
        "train_mlp": every or "gate_proj" in targets,
        "train_attn": every or "q_proj" in targets,
    }


@router.delete("/training_runs/{run_id}/checkpoints/{kind}/{name}", status_code=204)
async def remove(run_id: str, kind: str, name: str, caller: Asking, service: Serving) -> Response:
    saved = await _mine(service, caller, run_id, kind, name)
    await service.ask_engine({"do": "delete", "scope": "", "path": saved.path})
    await service.database.write(
        lambda connection: connection.execute(
            delete(checkpoints).where(checkpoints.c.path == saved.path)
        )
    )
    return Response(status_code=204)


@router.post("/training_runs/{run_id}/checkpoints/{kind}/{name}/publish", status_code=204)
async def publish(run_id: str, kind: str, name: str, caller: Asking, service: Serving) -> Response:
    return await _set_public(service, await _mine(service, caller, run_id, kind, name), True)


@router.delete("/training_runs/{run_id}/checkpoints/{kind}/{name}/publish", status_code=204)
async def unpublish(
    run_id: str, kind: str, name: str, caller: Asking, service: Serving
) -> Response:
    return await _set_public(service, await _mine(service, caller, run_id, kind, name), False)


async def _set_public(service: Serving, saved: Row[Any], public: bool) -> Response:
    await service.database.write(
        lambda connection: connection.execute(
            update(checkpoints).where(checkpoints.c.path == saved.path).values(public=public)
        )
    )
    return Response(status_code=204)


@router.put("/training_runs/{run_id}/checkpoints/{kind}/{name}/ttl", status_code=204)
async def set_ttl(
    run_id: str, kind: str, name: str, body: bodies.SetTtl, caller: Asking, service: Serving
) -> Response:
    saved = await _mine(service, caller, run_id, kind, name)
    said = await service.ask_engine(
        {"do": "set_ttl", "scope": "", "path": saved.path, "ttl_seconds": body.ttl_seconds}
    )
    expires = said["result"]["expires_at"]
    await service.database.write(
        lambda connection: connection.execute(
            update(checkpoints).where(checkpoints.c.path == saved.path).values(expires_at=expires)
        )
    )
    return Response(status_code=204)


async def _mine(service: Serving, caller: Asking, run_id: str, kind: str, name: str) -> Row[Any]:
    if kind not in TYPES:
        raise NotFoundError("checkpoint", f"{kind}/{name}")
    return await service.checkpoint(caller, f"tinker://{run_id}/{kind}/{name}", own=True)


@router.get("/training_runs/{run_id}/checkpoints/{kind}/{name}/archive")
async def archive(
    run_id: str, kind: str, name: str, request: Request, caller: Asking, service: Serving
) -> Response:
    """A checkpoint's files as one tar; or its address, for who accepts JSON alone."""
    saved = await service.checkpoint(caller, f"tinker://{run_id}/{kind}/{name}")
    if request.headers.get("accept") == "application/json":
        base = str(request.base_url).rstrip("/")
        return JSONResponse(service.downloads.archive_address(saved.path, base))
    return await service.downloads.archive(saved.path)


@router.get("/training_runs/{run_id}/checkpoints/external_weights/{name}/external_weights_urls")
async def external_urls(
    run_id: str, name: str, request: Request, caller: Asking, service: Serving
) -> dict[str, Any]:
    """Addresses of the files, which need no key and end with the hour."""
    saved = await service.checkpoint(caller, f"tinker://{run_id}/external_weights/{name}")
    return service.downloads.addresses(saved.path, str(request.base_url).rstrip("/"))


@router.get("/files/{run_id}/{kind}/{name}/{file}")
async def file(
    run_id: str, kind: str, name: str, file: str, until: int, signature: str, service: Serving
) -> Response:
    """A file by an address that was given out, which needs no key."""
    return await service.downloads.file(run_id, kind, name, file, until, signature)


REFUSED = {
    "POST /auth/token": "tokens are not exchanged: send a key",
    "GET /auth/apikey/me": "tinker auth is not offered: see plait keys",
    "DELETE /auth/apikey/me": "tinker auth is not offered: see plait keys",
    "POST /copy_weights": "copy_weights is not offered: load the checkpoint and save it again",
    "POST /sessions/search": "search_sessions is not offered: use list_sessions",
    "PUT /sessions/{_}/project": "assign_session_project is not offered: there are no projects",
    "GET /sessions/{_}/trace_export": "export_session_trace is not offered",
    "GET /billing/usage/events": "get_billing_usage is not offered: nothing is billed",
    "GET /billing/usage/checkpoints/current":
        "get_current_checkpoint_storage_usage is not offered: list_user_checkpoints has sizes",
}  # fmt: skip
"""Of the Tinker API, and what to do instead. It is a 422: after a 5xx, clients ask for minutes."""


def _refuse(route: str, says: str) -> None:
    method, path = route.split()
    extra = {**READS, "x-refused": True}

    @router.api_route(path, methods=[method], openapi_extra=extra, name=f"refused {route}")
    async def refused(caller: Asking) -> None:
        raise ServiceError(f"{says}; docs/tinker.md tells what is", 422)


for _route, _says in REFUSED.items():
    _refuse(_route, _says)

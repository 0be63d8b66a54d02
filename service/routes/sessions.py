"""Settings of clients, sessions and their signs of life."""

import json
from typing import Any

from fastapi import APIRouter
from sqlalchemy import select

from plait.service import bodies
from plait.service.database.tables import runs, samplers
from plait.service.errors import ServiceError
from plait.service.routes.context import HEARTBEAT, READS, AccessScope, Asking, Offset, Serving

router = APIRouter(prefix="/api/v1", tags=["sessions"])

OLDEST, NEWEST = (0, 25), (0, 38)
"""Versions of the Tinker client whose protocol this is."""


def check_version(version: str) -> None:
    """
    Raises:
        ServiceError: the client is older or newer than what is spoken here.
    """
    if not version or version.startswith("plait-"):
        return
    try:
        major, minor = (int(part) for part in version.split(".")[:2])
    except ValueError:
        raise ServiceError(f"sdk_version is like 0.38.0; it is {version!r}") from None
    if not OLDEST <= (major, minor) <= NEWEST:
        spoken = " to ".join(".".join(map(str, one)) for one in (OLDEST, NEWEST))
        raise ServiceError(
            f"this server speaks the protocol of the tinker client {spoken}; this client is "
            f"{version}: pip install 'tinker=={NEWEST[0]}.{NEWEST[1]}.*'"
        )


@router.post("/client/config", openapi_extra=READS)
async def client_config(body: bodies.ClientConfig, caller: Asking) -> dict[str, Any]:
    """What this server can do; a client asks before anything else."""
    check_version(body.sdk_version)
    return {
        "pjwt_auth_enabled": False,
        "parallel_fwdbwd_chunks": True,
        "proto_compress_fwdbwd": True,
        "sample_use_retrieve_futures": True,
        "custom_loss_server_side": True,
        "sample_join_sampling_session": True,
    }


@router.post("/client/dynamic_config", openapi_extra=READS)
async def dynamic_config(body: bodies.ClientConfig, caller: Asking) -> dict[str, Any]:
    return {
        "refresh_interval_sec": 300,
        "sample_cancel_enabled": True,
        "sample_cancel_max_batch_size": 64,
    }


@router.post("/create_session")
async def create_session(
    body: bodies.CreateSession, caller: Asking, service: Serving
) -> dict[str, Any]:
    check_version(body.sdk_version)
    if body.project_id is not None:
        raise ServiceError(
            "there are no projects here: leave project_id, and TINKER_PROJECT_ID, out", 422
        )
    about = body.model_dump(exclude={"type"})
    name = await service.sessions.create(caller.owner, about, service.clock())
    return {"type": "create_session", "session_id": name}


@router.post("/session_heartbeat", openapi_extra=HEARTBEAT)
async def heartbeat(body: bodies.Heartbeat, caller: Asking, service: Serving) -> dict[str, Any]:
    await service.sessions.require(caller.owner, body.session_id, service.clock())
    return {"type": "session_heartbeat"}


@router.post("/sessions/{session_id}/finish")
async def finish(
    session_id: str, body: bodies.Finish, caller: Asking, service: Serving
) -> dict[str, Any]:
    await service.sessions.finish(caller.owner, session_id, body.model_dump(), service.clock())
    return {}


@router.get("/sessions")
async def every(
    caller: Asking,
    service: Serving,
    limit: int = 20,
    offset: Offset = 0,
    access_scope: AccessScope = "owned",
) -> dict[str, Any]:
    rows = await service.sessions.page(caller.owner, _bound(limit), max(offset, 0))
    return {"sessions": [row.id for row in rows]}


@router.get("/sessions/{session_id}")
async def one(
    session_id: str, caller: Asking, service: Serving, access_scope: AccessScope = "owned"
) -> dict[str, Any]:
    row = await service.sessions.get(caller.owner, session_id)
    about = json.loads(row.about_json)
    names = await service.database.read(
        lambda connection: [
            connection.execute(
                select(table.c.id).where(table.c.session_id == session_id).order_by(table.c.id)
            )
            .scalars()
            .all()
            for table in (runs, samplers)
        ]
    )
    metadata = about.get("user_metadata") or {}
    return {
        "training_run_ids": list(names[0]),
        "sampler_ids": list(names[1]),
        "user_metadata": {key: str(value) for key, value in metadata.items()},
        "display_name": about.get("display_name"),
        "tags": about.get("tags") or [],
    }


@router.post("/telemetry", openapi_extra=READS)
async def telemetry(body: dict[str, Any], caller: Asking) -> dict[str, str]:
    """Accepted, and dropped."""
    return {"status": "accepted"}


def _bound(limit: int) -> int:
    return min(max(limit, 1), 1000)

"""Uploads: sent once, in one go or in several, and named by their SHA-256 afterwards."""

from typing import Any

from fastapi import APIRouter, Request
from sqlalchemy import delete, select

from plait.service.database.tables import media
from plait.service.errors import NotFoundError, ServiceError
from plait.service.operations import insert_new
from plait.service.routes.context import Asking, Serving
from plait.service.scopes import owner_folder

router = APIRouter(prefix="/api/v1/media", tags=["media"])

_BYTES = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.get("/{sha256}")
async def received(sha256: str, caller: Asking, service: Serving) -> dict[str, Any]:
    """How much of it has come; a sender that was interrupted goes on from there."""
    size, whole = service.uploads.received(owner_folder(caller.owner), sha256)
    if not size:
        raise NotFoundError("upload", sha256)
    return {"sha256": sha256, "received": size, "complete": whole}


@router.post("", openapi_extra=_BYTES)
async def send(
    request: Request, sha256: str, size: int, caller: Asking, service: Serving, offset: int = 0
) -> dict[str, Any]:
    """Bytes from `offset` on of a file of `size` bytes; it may be used when all have come."""
    owner = owner_folder(caller.owner)
    there = await service.uploads.receive(owner, sha256, offset, request.stream())
    if there < size:
        return {"sha256": sha256, "received": there, "complete": False}
    part = await service.uploads.finish(owner, sha256)
    try:
        said = await service.ask_engine(
            {"do": "check_media", "scope": "media", "owner_key": owner, "name": part.name}
        )
    except ServiceError as error:
        if error.category == "user":  # it will not become a picture by itself
            service.uploads.remove(owner, part)
        raise
    service.uploads.keep(part)
    now = service.clock()
    values = {
        "owner": caller.owner, "sha256": sha256, "size_bytes": there,
        "medium": said["result"]["medium"], "created_at": now, "used_at": now,
    }  # fmt: skip
    await service.database.write(
        lambda connection: connection.execute(
            insert_new(connection, media).values(**values).on_conflict_do_nothing()
        )
    )
    return {"sha256": sha256, "received": there, "complete": True, **said["result"]}


@router.get("")
async def every(caller: Asking, service: Serving) -> dict[str, Any]:
    """An owner's uploads, the newest first."""
    rows = await service.database.read(
        lambda connection: connection.execute(
            select(media).where(media.c.owner == caller.owner).order_by(media.c.created_at.desc())
        ).all()
    )
    return {
        "media": [
            {"sha256": row.sha256, "size_bytes": row.size_bytes, "medium": row.medium}
            for row in rows
        ]
    }


@router.delete("/{sha256}", status_code=204)
async def remove(sha256: str, caller: Asking, service: Serving) -> None:
    """Take an upload away, one that came in part too."""
    owner = owner_folder(caller.owner)
    service.uploads.remove(owner, service.uploads.any(owner, sha256))
    await service.database.write(
        lambda connection: connection.execute(
            delete(media).where((media.c.owner == caller.owner) & (media.c.sha256 == sha256))
        )
    )

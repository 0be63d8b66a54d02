"""Promises: what came of them, waited for."""

import asyncio
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from plait.service import bodies
from plait.service.errors import NotFoundError, ServiceError
from plait.service.operations import Operation
from plait.service.routes.context import READS, Asking, Serving

router = APIRouter(prefix="/api/v1", tags=["futures"])

INLINE_BYTES = 1_000_000
"""A larger result is announced by its size first, where the client asks for that."""

PROTOBUF = "application/x-protobuf"


@router.post("/retrieve_future", openapi_extra=READS)
async def retrieve_future(
    body: bodies.RetrieveFuture, caller: Asking, service: Serving
) -> Response:
    """The result of a promise; 408 after half a minute, with why it waits."""
    operation = await _operation(service, caller, body.request_id)
    operation = await service.until_done(operation, service.settings.hold_seconds)
    if operation.state == "queued":
        state, reason = service.queue_state(operation)
        content = {"type": "try_again", "request_id": operation.id, "queue_state": state,
                   "queue_state_reason": reason}  # fmt: skip
        return JSONResponse(content, 408)
    if operation.state == "gone":
        raise ServiceError(f"the result of {operation.id} is not kept any more", 410)
    return await _result(service, operation, body.allow_metadata_only)


async def _operation(service: Serving, caller: Asking, name: str) -> Operation:
    operation = service.runner.live.get(name) or await service.log.by_id(name)
    if operation is None or operation.owner != caller.owner:
        raise NotFoundError("request", name)
    return operation


async def _result(service: Serving, operation: Operation, sizes_first: bool) -> Response:
    if operation.state == "failed":
        service.note_delivered(operation)
        return JSONResponse({"error": operation.error, "category": operation.category})
    size = operation.result.length if operation.result is not None else 0
    if sizes_first and size > INLINE_BYTES:
        return JSONResponse({"status": "complete_metadata", "response_payload_size": size})
    content = await service.log.result(operation)
    service.note_delivered(operation)
    kind = PROTOBUF if operation.result_kind == "proto" else "application/json"
    return Response(content, media_type=kind)


@router.post("/retrieve_futures", openapi_extra=READS)
async def retrieve_futures(
    body: bodies.RetrieveFutures, caller: Asking, service: Serving
) -> dict[str, Any]:
    """Which of a sampler's requests are done since `prev_cursor`; waits until one is."""
    sampler = await service.sampler(caller, body.target.sampling_session_id)
    clone = body.target.cloned_sampler_id
    if clone > sampler.joined:
        raise ServiceError(f"{sampler.id} has no client {clone}: join_sampling_session", 422)
    finished = await service.completions.of(sampler.id, clone)
    finished.forget(body.retrieved_request_ids)
    # A clock that was set back between two servers must not hide what is done.
    cursor = body.prev_cursor if body.prev_cursor <= finished.cursor else 0
    seconds = service.settings.hold_seconds if body.timeout is None else body.timeout
    try:
        async with asyncio.timeout(min(seconds, service.settings.hold_seconds) or None):
            while seconds and not finished.after(cursor):
                await finished.more()
    except TimeoutError:
        pass
    return {
        "completions": [one for _, one in finished.after(cursor)],
        "cursor": finished.cursor,
    }


@router.post("/cancel_future")
async def cancel_future(body: bodies.CancelFuture, caller: Asking, service: Serving) -> Response:
    """Take a sample back; a training step that others rely on goes on."""
    operation = await _operation(service, caller, body.request_id)
    if operation.kind == "sample" and operation.state == "queued":
        await service.cancel(operation)
    return Response(status_code=204)

"""What Plait's own client asks besides: rendering, a tokenizer, tokens as they come."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict

from plait.service import bodies
from plait.service.engine.frames import Header
from plait.service.errors import ServiceError
from plait.service.routes.context import READS, Asking, Serving
from plait.service.routes.sampling import check, seed_of
from plait.service.scopes import owner_folder

router = APIRouter(prefix="/api/v1", tags=["plait"])


class Rendered(BaseModel):
    """A sample, to be rendered by a model's tokenizer and encoders."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str
    for_generation: bool
    messages: list["Turn"] = []
    parts: list["Piece"] = []


class Turn(BaseModel):
    """One message."""

    model_config = ConfigDict(extra="forbid")

    role: str
    parts: list["Piece"]
    weight: float = 1.0


class Piece(BaseModel):
    """A text, or a medium: its bytes in base64, or an upload's SHA-256."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text", "image", "audio", "video"]
    text: str | None = None
    data: str | None = None
    sha256: str | None = None
    options: dict[str, Any] = {}


@router.post("/render", openapi_extra=READS)
async def render(body: Rendered, caller: Asking, service: Serving) -> dict[str, Any]:
    """Tokens and media as the model reads them; with targets and weights where it is learned."""
    _check(body)
    given = body.model_dump(exclude_none=True)
    said, _ = await service.talks.ask(
        caller, body.model, {"do": "render"}, json.dumps(given).encode()
    )
    result: dict[str, Any] = said["result"]
    return result


def _check(body: Rendered) -> None:
    for piece in [*body.parts, *(piece for turn in body.messages for piece in turn.parts)]:
        given = [name for name in ("text", "data", "sha256") if getattr(piece, name) is not None]
        if len(given) != 1 or (given == ["text"]) != (piece.type == "text"):
            raise ServiceError(
                "a part has a text, or is a medium with data (base64) or the sha256 of an upload",
                422,
            )


@router.get("/tokenizer")
async def tokenizer(model: str, caller: Asking, service: Serving) -> Response:
    """The files of a model's tokenizer, as a tar that transformers reads when it is unpacked."""
    _, tar = await service.talks.ask(caller, model, {"do": "tokenizer"})
    return Response(tar, media_type="application/x-tar")


@router.post("/stream", openapi_extra=READS)
async def stream(
    body: bodies.Sample, request: Request, caller: Asking, service: Serving
) -> StreamingResponse:
    """As asample, but tokens come as lines of JSON while they are drawn, and are kept nowhere."""
    check(body)
    sampler, seq = body.sampling_session_id, body.seq_id
    await service.owned(caller, sampler, "sampling session")
    await service.talks.engine_up()
    header = {
        "do": "sample", "seed": seed_of(sampler, seq), "stream": True,
        "operation": f"stream:{sampler}:{seq}",
        "owner_key": owner_folder(caller.owner),
    }  # fmt: skip
    await service.runner.rate.enter(caller.owner)
    lines = _counted(service, caller.owner, _lines(service, sampler, header, await request.body()))
    return StreamingResponse(lines, media_type="application/x-ndjson")


async def _counted(
    service: Serving, owner: str, lines: AsyncGenerator[str, None]
) -> AsyncIterator[str]:
    try:
        service.talks.enter(owner)
    except ServiceError as error:
        yield _error_line(error)
        return
    try:
        async with contextlib.aclosing(lines):
            async for line in lines:
                yield line
    finally:
        service.talks.leave(owner)


def _error_line(error: ServiceError) -> str:
    return json.dumps({"error": error.message, "category": error.category}) + "\n"


async def _lines(
    service: Serving, sampler: str, header: Header, body: bytes
) -> AsyncGenerator[str, None]:
    arrived: asyncio.Queue[Header | None] = asyncio.Queue()
    task = asyncio.create_task(service.runner.with_scope(sampler, header, body, arrived.put_nowait))
    task.add_done_callback(lambda _: arrived.put_nowait(None))
    try:
        while (event := await arrived.get()) is not None:
            yield json.dumps({key: event[key] for key in ("sequence", "token", "logprob")}) + "\n"
        await task
    except ServiceError as error:
        yield _error_line(error)
    finally:
        if not task.done():  # the client has left
            cancelled = {"do": "cancel", "scope": "", "sampler": sampler,
                         "operation": header["operation"]}  # fmt: skip
            service.host.send(cancelled).add_done_callback(lambda done: done.exception())
            task.cancel()

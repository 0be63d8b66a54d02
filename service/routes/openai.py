"""OpenAI's API: models, chats and completions, of base models, runs and snapshots."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from fastapi.responses import StreamingResponse

from plait.service.conversations import (
    Asked,
    ChatAsked,
    TextAsked,
    chat_choice,
    messages_of,
    text_choice,
    usage,
)
from plait.service.errors import ServiceError
from plait.service.routes.context import READS, Asking, Serving
from plait.service.talking import Talk

router = APIRouter(prefix="/v1", tags=["openai"])


@router.get("/models")
async def models(caller: Asking, service: Serving) -> dict[str, Any]:
    """Base models, and the caller's runs and snapshots."""
    names = await service.talks.names(caller)
    data = [{"id": name, "object": "model", "created": int(at), "owned_by": owner}
            for name, at, owner in names]  # fmt: skip
    return {"object": "list", "data": data}


@router.get("/models/{name:path}")
async def model(name: str, caller: Asking, service: Serving) -> dict[str, Any]:
    for one, at, owner in await service.talks.names(caller):
        if one == name:
            return {"id": name, "object": "model", "created": int(at), "owned_by": owner}
    raise ServiceError(f"there is no model {name!r}; GET /v1/models lists them", 404)


@router.post("/chat/completions", openapi_extra=READS, response_model=None)
async def chat(
    body: ChatAsked, caller: Asking, service: Serving
) -> dict[str, Any] | StreamingResponse:
    messages = await messages_of(body.messages, service.fetcher)
    talk = await service.talks.begin(caller, body.model, messages, body)
    if body.stream:
        return StreamingResponse(_chat_events(body, talk), media_type="text/event-stream")
    answer = await talk.answer()
    choices = [chat_choice(n, one, body.logprobs) for n, one in enumerate(answer["choices"])]
    return {**_head(body, "chat.completion", "chatcmpl", talk), "choices": choices,
            "usage": usage(answer)}  # fmt: skip


@router.post("/completions", openapi_extra=READS, response_model=None)
async def complete(
    body: TextAsked, caller: Asking, service: Serving
) -> dict[str, Any] | StreamingResponse:
    talk = await service.talks.begin(caller, body.model, body.prompt, body)
    if body.stream:
        return StreamingResponse(_text_events(body, talk), media_type="text/event-stream")
    answer = await talk.answer()
    logprobs = body.logprobs is not None
    choices = [text_choice(n, one, logprobs) for n, one in enumerate(answer["choices"])]
    return {**_head(body, "text_completion", "cmpl", talk), "choices": choices,
            "usage": usage(answer)}  # fmt: skip


def _head(body: Asked, kind: str, prefix: str, talk: Talk) -> dict[str, Any]:
    name = f"{prefix}-{uuid.uuid4().hex}"
    return {"id": name, "object": kind, "created": int(talk.begun_at), "model": body.model}


async def _chat_events(body: ChatAsked, talk: Talk) -> AsyncIterator[str]:
    head = _head(body, "chat.completion.chunk", "chatcmpl", talk)

    def event(index: int, delta: dict[str, Any], finish: str | None = None) -> str:
        choice = {"index": index, "delta": delta, "finish_reason": finish, "logprobs": None}
        return _line({**head, "choices": [choice]})

    for index in range(body.n):
        yield event(index, {"role": "assistant", "content": ""})
    async for line in _streamed(body, talk, head, lambda i, text: event(i, {"content": text}),
                                lambda i, finish: event(i, {}, finish)):  # fmt: skip
        yield line


async def _text_events(body: TextAsked, talk: Talk) -> AsyncIterator[str]:
    head = _head(body, "text_completion", "cmpl", talk)

    def event(index: int, text: str, finish: str | None = None) -> str:
        choice = {"index": index, "text": text, "finish_reason": finish, "logprobs": None}
        return _line({**head, "choices": [choice]})

    async for line in _streamed(body, talk, head, event, lambda i, finish: event(i, "", finish)):
        yield line


async def _streamed(
    body: Asked, talk: Talk, head: dict[str, Any], more: Any, ended: Any
) -> AsyncIterator[str]:
    """Texts as they come, how each ended, and the end; a client that leaves cancels the rest."""
    told = [""] * body.n
    try:
        async for index, text in talk.texts():
            told[index] += text
            yield more(index, text)
        answer = await talk.answer()
    except ServiceError as error:
        yield _line({"error": openai_error(error)})
        return
    except asyncio.CancelledError:
        talk.cancel()
        raise
    for index, choice in enumerate(answer["choices"]):
        if rest := choice["text"][len(told[index]) :]:
            yield more(index, rest)
        yield ended(index, choice["finish"])
    if body.stream_options and body.stream_options.get("include_usage"):
        yield _line({**head, "choices": [], "usage": usage(answer)})
    yield "data: [DONE]\n\n"


def _line(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def openai_error(error: ServiceError) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kind = "server_error" if error.category == "server" else "invalid_request_error"
    return {"message": error.message, "type": kind, "param": None, "code": None}

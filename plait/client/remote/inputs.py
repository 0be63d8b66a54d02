"""Inputs on their way to a server: texts as they are, media as files, large ones sent once."""

import asyncio
import base64
from collections.abc import Sequence
from typing import Any

from plait.client.remote.media import file_of, options_of
from plait.client.remote.transport import UPLOAD_BYTES, Transport
from plait.modalities import MediaPart, Part, Text
from plait.service.wire import tinker_pb2 as pb
from plait.service.wire.chunks import text_to_json, text_to_proto
from plait.service.wire.packing import packed
from plait.stream import Message, Sample
from plait.types import Chunk, EncodedTextChunk, ModelInput


async def proto_chunks(transport: Transport, given: ModelInput) -> list[pb.Chunk]:
    """For a forward_backward."""
    return [await _proto(transport, chunk) for chunk in given.chunks]


async def _proto(transport: Transport, chunk: Chunk) -> pb.Chunk:
    if isinstance(chunk, EncodedTextChunk):
        return text_to_proto(chunk)
    part, options = chunk.part, options_of(chunk.part)
    data = await asyncio.to_thread(file_of, part)
    if len(data) > UPLOAD_BYTES:
        data, options = (await transport.upload(data)).encode(), {**options, "uploaded": True}
    tensor = packed(part.medium, data, options, expected=chunk.expected_tokens)
    return pb.Chunk(dmel=pb.DmelChunk(dmel=tensor))


async def json_chunks(transport: Transport, given: ModelInput) -> list[dict[str, Any]]:
    """For a sample."""
    return [
        text_to_json(chunk)
        if isinstance(chunk, EncodedTextChunk)
        else await _json(transport, chunk.part, chunk.expected_tokens)
        for chunk in given.chunks
    ]


async def _json(transport: Transport, part: MediaPart, expected: int | None) -> dict[str, Any]:
    said: dict[str, Any] = {"type": part.medium}
    if options := options_of(part):
        said["options"] = options
    if expected is not None:
        said["expected_tokens"] = expected
    data = await asyncio.to_thread(file_of, part)
    if len(data) > UPLOAD_BYTES:
        return {**said, "sha256": await transport.upload(data)}
    return {**said, "data": base64.b64encode(data).decode()}


async def sample_to_json(transport: Transport, sample: Sample) -> dict[str, Any]:
    """For rendering."""
    return {
        "messages": [await _message(transport, one) for one in sample.messages],
        "parts": await _parts(transport, sample.parts),
    }


async def _message(transport: Transport, message: Message) -> dict[str, Any]:
    parts = await _parts(transport, message.parts)
    return {"role": message.role, "weight": message.weight, "parts": parts}


async def _parts(transport: Transport, parts: Sequence[Part]) -> list[dict[str, Any]]:
    return [
        {"type": "text", "text": part.text}
        if isinstance(part, Text)
        else await _json(transport, part, None)
        for part in parts
    ]

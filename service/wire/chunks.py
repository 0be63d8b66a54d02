"""Chunks of a model's input, from protobuf and from JSON.

A dmel chunk, which the Tinker API has for sounds in its own code, carries a tensor of which clients
read the header alone. Plait's media travel in it: a row of bytes for each position that the chunk
says to take, and in those bytes a mark, what it is, and the file. `plait.tinker_compat` writes it.
"""

import base64
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from plait.errors import DataError, PlaitError
from plait.modalities import Audio, FrameSampling, Image, Video
from plait.service.wire import tinker_pb2 as pb
from plait.service.wire.packing import LENGTHS, MARK
from plait.types import AudioChunk, Chunk, EncodedTextChunk, ImageChunk, VideoChunk

MEDIA = ("image", "audio", "video")
_LARGEST = 1e6
"""Of a number among a medium's options: seconds, or frames."""


Uploaded = Callable[[str], bytes]
"""The bytes of an upload by its SHA-256; raises DataError where there is none."""


def nothing_uploaded(sha256: str) -> bytes:
    raise DataError(f"there is no upload {sha256}; POST /api/v1/media brings one")


def chunk_of(message: pb.Chunk, uploaded: Uploaded = nothing_uploaded) -> Chunk:
    """
    Raises:
        DataError: it is of no known kind, or not what it says.
    """
    kind = message.WhichOneof("chunk")
    if kind == "encoded_text":
        data = message.encoded_text.tokens
        if len(data) % 4:
            raise DataError(f"tokens are int32: {len(data)} bytes are no whole number of them")
        return EncodedTextChunk(np.frombuffer(data, "<i4").tolist())
    if kind == "image":
        image = message.image
        if image.HasField("override_dimensions"):
            raise DataError("an image's override_dimensions are not supported: resize the picture")
        expected = image.expected_tokens if image.HasField("expected_tokens") else None
        return ImageChunk(image.data, image.format or None, expected)  # type: ignore[arg-type]
    if kind == "dmel":
        return media_chunk(message.dmel.dmel, uploaded)
    raise DataError("a chunk is encoded_text, image or dmel; this one is none of them")


def chunk_from_json(value: Any, uploaded: Uploaded = nothing_uploaded) -> Chunk:
    """
    Raises:
        DataError: it is of no known kind, or has another form.
    """
    if not isinstance(value, dict):
        raise DataError(f"a chunk is an object with a type; it is {value!r}"[:200])
    kind = value.get("type", "encoded_text" if "tokens" in value else None)
    if kind == "encoded_text":
        return EncodedTextChunk(_tokens(value.get("tokens")))
    if kind == "dmel":
        return media_chunk(decoded(value.get("dmel")), uploaded)
    if kind in MEDIA:
        data = uploaded(str(value["sha256"])) if "sha256" in value else decoded(value.get("data"))
        expected = _expected(value.get("expected_tokens"))
        if kind == "image":
            return ImageChunk(data, value.get("format"), expected)
        return _sound_or_film(kind, data, expected, value.get("options") or {})
    raise DataError(
        f"a chunk's type is encoded_text, image, audio, video or dmel; it is {kind!r}: the Tinker "
        "API's image_asset_pointer is not supported, send the picture or its upload's sha256"
    )


def _tokens(given: Any) -> tuple[int, ...]:
    listed = isinstance(given, list) and all(type(token) is int for token in given)
    if not listed or (given and not 0 <= min(given) <= max(given) < 2**31):
        raise DataError("the tokens of an encoded_text chunk are a list of whole numbers from 0 on")
    return tuple(given)


def _expected(given: Any) -> int | None:
    if given is not None and not (type(given) is int and 0 <= given < 2**31):
        raise DataError(f"expected_tokens is a whole number of 0 or more; it is {given!r}"[:200])
    return given


def decoded(given: Any) -> bytes:
    """Bytes that travel as base64.

    Raises:
        DataError: they are none.
    """
    if not isinstance(given, str):
        raise DataError("a chunk's bytes are a text in base64")
    try:
        return base64.b64decode(given, validate=True)
    except ValueError as error:
        raise DataError(f"a chunk's bytes must be base64: {error}") from error


def media_part(kind: str, data: bytes, options: Mapping[str, Any]) -> Image | Audio | Video:
    """A picture, a sound or a film, with what its part takes besides.

    Raises:
        DataError: it takes no such option.
    """
    try:
        chosen = dict(options)
        _check_options(kind, chosen)
        if kind == "image":
            return Image(data, **chosen)
        if kind == "audio":
            return Audio(data, **chosen)
        if isinstance(chosen.get("sampling"), dict):
            chosen["sampling"] = FrameSampling(**chosen["sampling"])
        return Video(data, **chosen)
    except (TypeError, ValueError) as error:
        if isinstance(error, PlaitError):
            raise
        raise DataError(f"options of {kind} cannot be used: {error}"[:300]) from error


def _check_options(kind: str, options: Mapping[str, Any]) -> None:
    """That numbers are of ordinary size, and that there are only numbers, words and a sampling."""
    for name, value in options.items():
        if name == "sampling" and isinstance(value, dict):
            _check_options(kind, value)
        elif name == "sampling" and value is None:
            continue
        elif name == "sampling" or not (value is None or isinstance(value, int | float | str)):
            raise DataError(f"the option {name[:80]!r} of {kind} has another form")
        elif isinstance(value, int | float) and not abs(value) <= _LARGEST:
            raise DataError(f"the option {name[:80]!r} of {kind} is up to {_LARGEST:.0f}")


def _sound_or_film(
    kind: str, data: bytes, expected: int | None, options: Mapping[str, Any]
) -> Chunk:
    part = media_part(kind, data, options)
    if isinstance(part, Audio):
        return AudioChunk(part, expected)
    assert isinstance(part, Video)
    return VideoChunk(part, expected)


def text_to_json(chunk: EncodedTextChunk) -> dict[str, Any]:
    """What `chunk_from_json` reads."""
    return {"type": "encoded_text", "tokens": [int(token) for token in chunk.tokens]}


def text_to_proto(chunk: EncodedTextChunk) -> pb.Chunk:
    """What `chunk_of` reads."""
    tokens = np.asarray(chunk.tokens, "<i4").tobytes()
    return pb.Chunk(encoded_text=pb.EncodedTextChunk(tokens=tokens))


def media_chunk(tensor: bytes, uploaded: Uploaded) -> Chunk:
    """The medium in a dmel chunk.

    Raises:
        DataError: it holds something else.
    """
    at = tensor.find(MARK, 0, 64)
    start = at + len(MARK) + LENGTHS.size
    if at < 0 or len(tensor) < start:
        raise DataError(
            "a dmel chunk must be one that plait.tinker_compat made of a sound, a film or a "
            "picture; codes of another service's sounds mean nothing to these models"
        )
    said, length = LENGTHS.unpack(tensor[at + len(MARK) : start])
    data = tensor[start + said : start + said + length]
    try:
        head = json.loads(tensor[start : start + said])
        kind, options, expected = head["kind"], dict(head["options"]), head.get("expected")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"a dmel chunk's description cannot be read: {error}"[:300]) from error
    expected = _expected(expected)
    if len(data) != length or kind not in MEDIA:
        raise DataError("a dmel chunk ends before its file does, or holds no known medium")
    if options.pop("uploaded", False):
        data = uploaded(data.decode("ascii", "replace"))
    if kind == "image":
        return ImageChunk(media_part(kind, data, options), None, expected)  # type: ignore[arg-type]
    return _sound_or_film(kind, data, expected, options)

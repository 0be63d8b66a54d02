"""Between chunks, which users see, and documents, which the engine computes."""

from collections.abc import Iterable, Mapping
from typing import Any

from plait.errors import ConfigError, DataError
from plait.modalities import Audio, Image, Limits, Part, Video
from plait.stream import Document, Message, Sample
from plait.stream.samples import as_part
from plait.trainer.engine.inputs import Media, Piece, pieces_of
from plait.types import (
    FORMATS,
    AudioChunk,
    Chunk,
    Datum,
    EncodedTextChunk,
    ImageChunk,
    MediaChunk,
    ModelInput,
    VideoChunk,
)


def question(content: Iterable[Part | Message | str]) -> Sample:
    """What a prompt says: one user's texts and media, or messages.

    Raises:
        ConfigError: it is made of both.
        DataError: something of it is neither.
    """
    given = list(content)
    messages = tuple(one for one in given if isinstance(one, Message))
    parts = tuple(as_part(one) for one in given if not isinstance(one, Message))
    if messages and parts:
        raise ConfigError("a prompt is made of messages or of one user's parts, not of both")
    return Sample(messages=messages or (Message("user", parts),))


def piece_of(chunk: Chunk) -> Piece:
    if isinstance(chunk, EncodedTextChunk):
        return chunk.tokens
    return Media(chunk.part, chunk.origin)


def input_from(document: Document) -> ModelInput:
    chunks: list[Chunk] = []
    for piece, length in pieces_of(document):
        if not isinstance(piece, Media):
            chunks.append(EncodedTextChunk(tuple(piece)))
        else:
            chunks.append(_chunk(piece, length))
    return ModelInput(tuple(chunks))


def _chunk(media: Media, length: int) -> Chunk:
    part = media.part
    if isinstance(part, Image):
        return ImageChunk(part, expected_tokens=length, origin=media.origin)
    if isinstance(part, Audio):
        return AudioChunk(part, expected_tokens=length, origin=media.origin)
    if isinstance(part, Video):
        return VideoChunk(part, expected_tokens=length, origin=media.origin)
    raise ConfigError(f"a {part.medium} has no chunk: write it as a picture, a sound or a film")


def check_expected(model_input: ModelInput, document: Document, limits: Limits) -> None:
    """Compare what chunks say of their media with the media.

    Raises:
        DataError: the number of tokens, or the format, is another.
    """
    chunks = [chunk for chunk in model_input.chunks if isinstance(chunk, MediaChunk)]
    lengths = [length for piece, length in pieces_of(document) if isinstance(piece, Media)]
    for chunk, length in zip(chunks, lengths, strict=True):
        if chunk.expected_tokens not in (None, length):
            raise DataError(
                f"expected_tokens must be what the model takes for the {chunk.part.medium}: "
                f"{length}; the chunk says {chunk.expected_tokens}",
                chunk.origin,
            )
        if isinstance(chunk, ImageChunk) and chunk.format is not None:
            _check_format(chunk, limits)


def _check_format(chunk: ImageChunk, limits: Limits) -> None:
    found = chunk.part.header(limits).format
    if chunk.format is not None and found not in FORMATS[chunk.format]:
        raise DataError(
            f"a chunk's format must be that of its picture, which is {found}; the chunk says "
            f"{chunk.format!r}: correct it, or leave it out",
            chunk.origin,
        )


def check_data(data: Any) -> list[Datum]:
    """The data of a call, which are several.

    Raises:
        DataError: they are none, or something else, or one of them has no targets.
    """
    if not isinstance(data, Iterable) or isinstance(data, Mapping | str):
        raise DataError(f"data are a list of Datum; they were given as {type(data).__name__}")
    given = list(data)
    if not given:
        raise DataError("forward and forward_backward need at least one datum; they got none")
    for number, datum in enumerate(given):
        if not isinstance(datum, Datum):
            raise DataError(
                f"datum {number}: data are a list of Datum, and this is a {type(datum).__name__}; "
                "TrainingClient.datum makes one of a sample"
            )
        if "target_tokens" not in datum.loss_fn_inputs:
            raise DataError(
                f"datum {number}: it needs target_tokens: the token after each position"
            )
    return given


def check_plain(sample: Sample) -> None:
    """Refuse what a datum would lose of a sample.

    Raises:
        DataError: it is an augmented view.
    """
    if sample.view:
        raise DataError(
            f"a datum holds pictures as they are; this sample asks for view {sample.view}: "
            "augment the picture and make a sample of the result",
            sample.origin,
        )

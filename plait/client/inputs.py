"""Between chunks, which users see, and documents, which the engine computes."""

from collections.abc import Sequence

from plait.errors import ConfigError, DataError
from plait.modalities import Image, MediaPart, Part, Text
from plait.stream import Document, Message
from plait.trainer.engine.inputs import pieces_of
from plait.types import Chunk, EncodedTextChunk, ImageChunk, ModelInput


def part_of(content: Part | Message | str) -> Part:
    if isinstance(content, str):
        return Text(content)
    if isinstance(content, Message):
        raise ConfigError("a message is not a part")
    return content


def piece_of(chunk: Chunk) -> Sequence[int] | MediaPart:
    return chunk.tokens if isinstance(chunk, EncodedTextChunk) else chunk.image


def input_from(document: Document) -> ModelInput:
    chunks: list[Chunk] = []
    for piece, length in pieces_of(document):
        if isinstance(piece, Image):
            chunks.append(ImageChunk(piece, expected_tokens=length))
        elif isinstance(piece, MediaPart):
            raise ConfigError(f"a {piece.medium} has no chunk yet")
        else:
            chunks.append(EncodedTextChunk(tuple(piece)))
    return ModelInput(tuple(chunks))


def check_expected(model_input: ModelInput, document: Document) -> None:
    images = [chunk for chunk in model_input.chunks if isinstance(chunk, ImageChunk)]
    for chunk, item in zip(images, document.items, strict=True):
        if chunk.expected_tokens not in (None, item.plan.length):
            raise DataError(
                f"expected_tokens must be what the model takes for the picture: "
                f"{item.plan.length}; the chunk says {chunk.expected_tokens}"
            )

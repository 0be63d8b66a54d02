"""Between chunks, which users see, and documents, which the engine computes."""

from plait.errors import ConfigError, DataError
from plait.modalities import Image, Limits, Part, Text
from plait.stream import Document, Message, Sample
from plait.trainer.engine.inputs import Media, Piece, pieces_of
from plait.types import FORMATS, Chunk, EncodedTextChunk, ImageChunk, ModelInput


def part_of(content: Part | Message | str) -> Part:
    if isinstance(content, str):
        return Text(content)
    if isinstance(content, Message):
        raise ConfigError("a message is not a part")
    return content


def piece_of(chunk: Chunk) -> Piece:
    if isinstance(chunk, EncodedTextChunk):
        return chunk.tokens
    return Media(chunk.image, chunk.origin)


def input_from(document: Document) -> ModelInput:
    chunks: list[Chunk] = []
    for piece, length in pieces_of(document):
        if not isinstance(piece, Media):
            chunks.append(EncodedTextChunk(tuple(piece)))
        elif isinstance(piece.part, Image):
            chunks.append(ImageChunk(piece.part, expected_tokens=length, origin=piece.origin))
        else:
            raise ConfigError(f"a {piece.part.medium} has no chunk yet")
    return ModelInput(tuple(chunks))


def check_expected(model_input: ModelInput, document: Document, limits: Limits) -> None:
    """Compare what chunks say of their pictures with the pictures.

    Raises:
        DataError: the number of tokens, or the format, is another.
    """
    images = [chunk for chunk in model_input.chunks if isinstance(chunk, ImageChunk)]
    for chunk, item in zip(images, document.items, strict=True):
        if chunk.expected_tokens not in (None, item.plan.length):
            raise DataError(
                f"expected_tokens must be what the model takes for the picture: "
                f"{item.plan.length}; the chunk says {chunk.expected_tokens}",
                chunk.origin,
            )
        if chunk.format is not None:
            _check_format(chunk, limits)


def _check_format(chunk: ImageChunk, limits: Limits) -> None:
    found = chunk.image.header(limits).format
    if chunk.format is not None and found not in FORMATS[chunk.format]:
        raise DataError(
            f"a chunk's format must be that of its picture, which is {found}; the chunk says "
            f"{chunk.format!r}: correct it, or leave it out",
            chunk.origin,
        )


def check_plain(sample: Sample) -> None:
    """Refuse what a datum would lose of a sample.

    Raises:
        DataError: it is an augmented view, or belongs to a group.
    """
    if sample.view:
        raise DataError(
            f"a datum holds pictures as they are; this sample asks for view {sample.view}: "
            "augment the picture and make a sample of the result",
            sample.origin,
        )
    if sample.group is not None:
        raise DataError(
            f"no loss of the primitives reads groups; this sample belongs to group {sample.group}: "
            "leave group out",
            sample.origin,
        )

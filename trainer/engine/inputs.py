"""Documents from explicit tokens and media, and back: the form in which loops send their data."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from plait.errors import DataError, Origin
from plait.modalities import MediaPart
from plait.stream import Document, Item, Layout, Span, Tokenize, write_media


@dataclass(frozen=True, slots=True)
class Media:
    """A media part, and where it came from."""

    part: MediaPart
    origin: Origin = field(default_factory=Origin)


Piece = Sequence[int] | Media


def document_from(
    pieces: Sequence[Piece],
    layout: Layout,
    encode: Tokenize,
    targets: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    *,
    vocabulary: int,
) -> Document:
    """A document whose tokens are given; media take the positions that their headers plan.

    It comes from where the first of its media that says so does.

    Args:
        targets, weights: One value per position; without targets nothing is learned.
        encode: From text to token ids, for what a layout writes inside a film.
        vocabulary: Token ids are below it.

    Raises:
        DataError: a length or a token id is wrong, a media position carries weight, or nothing is
            there.
    """
    origins = [piece.origin for piece in pieces if isinstance(piece, Media)]
    origin = next((one for one in origins if str(one)), Origin())
    ids: list[int] = []
    spans: list[Span] = []
    items: list[Item] = []
    for piece in pieces:
        if not isinstance(piece, Media):
            _check_known("a token id", piece, vocabulary, origin)
            ids += [int(token) for token in piece]
            continue
        media = write_media(piece.part, layout, encode, piece.origin).bare()
        spans += media.spans_from(len(ids), len(items))
        items += media.items_from(len(items))
        ids += media.token_ids
    length = len(ids)
    token_ids = np.array(ids, dtype=np.int64)
    wanted = _sized("target_tokens", targets, length, 0, origin)
    _check_known("a target", wanted, vocabulary, origin)
    document = Document(
        token_ids=token_ids,
        targets=np.array(wanted, dtype=np.int64),
        weights=np.array(_sized("weights", weights, length, 0.0, origin), dtype=np.float32),
        positions=layout.positions(token_ids, spans, [item.plan for item in items]),
        spans=tuple(spans),
        items=tuple(items),
        origin=origin,
    )
    _check(document)
    return document


def _sized(
    name: str, values: Sequence[float] | None, length: int, default: float, origin: Origin
) -> Sequence[float]:
    if values is None:
        return [default] * length
    if len(values) != length:
        raise DataError(
            f"{name} needs one value per position: the input has {length} and it has "
            f"{len(values)}; a picture takes as many as TrainingClient.datum says",
            origin,
        )
    return values


def _check_known(name: str, tokens: Sequence[float], vocabulary: int, origin: Origin) -> None:
    for token in tokens:
        if not 0 <= token < vocabulary:
            raise DataError(
                f"{name} must be from 0 to {vocabulary - 1}, which this model knows; it is "
                f"{token}: use the model's own tokenizer",
                origin,
            )


def _check(document: Document) -> None:
    if not document.length:
        raise DataError("an input needs at least one position; this one is empty", document.origin)
    for span in document.spans:
        # The position before a text is the media's last: it may predict the text's first token.
        if (document.weights[max(0, span.start - 1) : span.stop - 1] != 0).any():
            raise DataError(
                "a position whose next one is media cannot be learned; give it weight 0",
                document.origin,
            )


def pieces_of(document: Document) -> Iterator[tuple[list[int] | Media, int]]:
    """The token runs and media of a document, in order, each with its number of positions.

    A film is one piece, with the times between its frames and its sound.
    """
    at = 0
    for item, start, stop in _extents(document):
        if start > at:
            run = document.token_ids[at:start].tolist()
            yield run, len(run)
        yield Media(item.part, item.origin), stop - start
        at = stop
    if at < document.length:
        run = document.token_ids[at:].tolist()
        yield run, len(run)


def _extents(document: Document) -> Iterator[tuple[Item, int, int]]:
    """Each part of a document with its first position and one past its last, in order."""
    extents: dict[int, tuple[int, int]] = {}
    for span in document.spans:
        track_of = document.items[span.item].track_of
        number = span.item if track_of is None else track_of
        start, stop = extents.get(number, (span.start, span.stop))
        extents[number] = min(start, span.start), max(stop, span.stop)
    for number, (start, stop) in sorted(extents.items(), key=lambda extent: extent[1]):
        yield document.items[number], start, stop

"""Documents from explicit tokens and media, and back: the form in which loops send their data."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plait.errors import DataError, Origin
from plait.modalities import MediaPart
from plait.stream import Document, Item, Layout, Span, Tokenize, write_media
from plait.trainer.losses import check_inputs
from plait.trainer.model import LEARN, Objective


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
    inputs: Mapping[str, NDArray[Any]] | None = None,
    objective: Objective = LEARN,
    *,
    vocabulary: int,
    group: int | None = None,
) -> Document:
    """A document whose tokens are given; media take the positions that their headers plan.

    It comes from where the first of its media that says so does.

    Args:
        inputs: The loss's, by name, target_tokens among them; with none nothing is learned.
        encode: From text to token ids, for what a layout writes inside a film.
        vocabulary: Token ids are below it.

    Raises:
        DataError: a length or a token id is wrong, a media position carries weight, or nothing is
            there.
        UnknownNameError: the loss reads no such input.
    """
    origins = [piece.origin for piece in pieces if isinstance(piece, Media)]
    origin = next((one for one in origins if str(one)), Origin())
    ids: list[int] = []
    spans: list[Span] = []
    items: list[Item] = []
    for piece in pieces:
        if not isinstance(piece, Media):
            _check_known("a token id", np.asarray(piece, dtype=np.int64), vocabulary, origin)
            ids += [int(token) for token in piece]
            continue
        media = write_media(piece.part, layout, encode, piece.origin).bare()
        spans += media.spans_from(len(ids), len(items))
        items += media.items_from(len(items))
        ids += media.token_ids
    if not ids:
        raise DataError("an input needs at least one position; this one is empty", origin)
    token_ids = np.array(ids, dtype=np.int64)
    targets, weights, more = _loss_inputs(inputs, objective, len(ids), spans, origin)
    _check_known("a target", targets, vocabulary, origin)
    return Document(
        token_ids=token_ids,
        targets=targets,
        weights=weights,
        positions=layout.positions(token_ids, spans, [item.plan for item in items]),
        spans=tuple(spans),
        items=tuple(items),
        origin=origin,
        loss_inputs=more,
        group=group,
    )


def _loss_inputs(
    inputs: Mapping[str, NDArray[Any]] | None,
    objective: Objective,
    length: int,
    spans: Sequence[Span],
    origin: Origin,
) -> tuple[NDArray[np.int64], NDArray[np.float32], dict[str, NDArray[Any]]]:
    """Targets and weights, (T,) or (T, K), and the other inputs."""
    if inputs is None:
        return np.zeros(length, dtype=np.int64), np.zeros(length, dtype=np.float32), {}
    loss, config = objective
    check_inputs(loss, inputs, length, origin, config)
    predictable = _predictable(spans, length)
    claims = [inputs[n] for n in ("weights", "advantages", "sequence_ratio_mask") if n in inputs]
    for claim in claims or [np.ones(length)]:
        if (claim[~predictable] != 0).any():
            raise DataError(
                "a position whose next one is media cannot be learned; give it weight 0", origin
            )
    weights = inputs.get("weights")
    if weights is None:
        weights = loss.learned(inputs, config) & predictable
        targets = inputs["target_tokens"]
        if "weights" in loss.per_target and targets.ndim == 2:
            weights = np.broadcast_to(weights[:, None], targets.shape)
    more = {name: v for name, v in inputs.items() if name not in ("target_tokens", "weights")}
    return inputs["target_tokens"], weights.astype(np.float32), more


def _predictable(spans: Sequence[Span], length: int) -> NDArray[np.bool_]:
    """(T,) whether the next position is a token. A media item's last one may predict a text's
    first.
    """
    mask = np.ones(length, dtype=bool)
    for span in spans:
        mask[max(0, span.start - 1) : span.stop - 1] = False
    return mask


def _check_known(name: str, tokens: NDArray[Any], vocabulary: int, origin: Origin) -> None:
    unknown = tokens[(tokens < 0) | (tokens >= vocabulary)]
    if unknown.size:
        raise DataError(
            f"{name} must be from 0 to {vocabulary - 1}, which this model knows; it is "
            f"{unknown.flat[0]}: use the model's own tokenizer",
            origin,
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

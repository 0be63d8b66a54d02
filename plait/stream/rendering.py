"""The one way from a sample to stream positions."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from plait.errors import Origin, RenderError
from plait.modalities import MediaPart
from plait.stream.layout import Layout
from plait.stream.samples import Sample
from plait.stream.template import written_pieces
from plait.stream.types import Document, Item, Span


class Tokenize(Protocol):
    """From text to token ids."""

    def __call__(self, text: str) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class WrittenMedia:
    """One part written into positions: its items, their spans and every token, from 0."""

    token_ids: list[int]
    spans: list[Span]
    items: list[Item]

    def spans_from(self, start: int, number: int) -> list[Span]:
        """The spans in a row where position `start` and item `number` come next."""
        return [
            replace(
                span,
                start=span.start + start,
                item=span.item + number,
                group=None if span.group is None else span.group + number,
            )
            for span in self.spans
        ]

    def items_from(self, number: int) -> list[Item]:
        """The items in a row where item `number` comes next."""
        return [
            replace(item, track_of=None if item.track_of is None else item.track_of + number)
            for item in self.items
        ]

    def bare(self) -> "WrittenMedia":
        """Without the texts before the first feature and after the last one."""
        start, stop = self.spans[0].start, max(span.stop for span in self.spans)
        spans = [replace(span, start=span.start - start) for span in self.spans]
        return WrittenMedia(self.token_ids[start:stop], spans, self.items)


@dataclass(slots=True)
class _Row:
    """A document under construction."""

    token_ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)

    def add_text(self, ids: Sequence[int], weight: float) -> None:
        self.token_ids += ids
        self.weights += [weight] * len(ids)

    def add_media(self, media: WrittenMedia) -> None:
        """Write a part's placeholders, and the texts around and between them."""
        self.spans += media.spans_from(len(self.token_ids), len(self.items))
        self.items += media.items_from(len(self.items))
        self.add_text(media.token_ids, 0.0)


def write_media(
    part: MediaPart, layout: Layout, encode: Tokenize, origin: Origin, view: int = 0
) -> WrittenMedia:
    """The positions of one part: a picture, a sound, or a film with its timestamps and sound.

    Raises:
        DataError: the part cannot be read.
        RenderError: the layout does not place every feature.
    """
    planned = layout.plan(part, origin)
    token_ids: list[int] = []
    spans: list[Span] = []
    placed = [0] * len(planned)
    for piece in layout.pieces([plan for _, plan in planned]):
        if isinstance(piece, str):
            token_ids += encode(piece)
            continue
        plan = planned[piece.item][1]
        group = piece.item if plan.bidirectional else None
        start, offset = len(token_ids), placed[piece.item]
        spans.append(Span(start, piece.length, plan.encoder, piece.item, offset, group))
        token_ids += [layout.placeholder_id] * piece.length
        placed[piece.item] += piece.length
    for (_, plan), count in zip(planned, placed, strict=True):
        if count != plan.length:
            raise RenderError(
                f"a layout must place every feature of an item: {plan.length} were planned, "
                f"{count} placed; mend the layout's pieces()",
                origin,
            )
    items = [
        Item(held, plan, view, origin, track_of=0 if number else None)
        for number, (held, plan) in enumerate(planned)
    ]
    return WrittenMedia(token_ids, spans, items)


def render(
    sample: Sample, tokenizer: Any, layout: Layout, for_generation: bool = False
) -> Document:
    """The only way from a sample to stream positions.

    Text is cut at media and at the borders of what is learned, and each piece is tokenised alone,
    so that a generation prompt followed by its answer equals the training row token for token.

    Args:
        tokenizer: A transformers tokenizer; its `chat_template` writes the messages.
        for_generation: End with the prompt for the next assistant turn; nothing is learned.

    Raises:
        RenderError: the template cannot be labelled, nothing is learned, or a text contains the
            layout's placeholder.
    """

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        if layout.placeholder_id in ids:
            raise RenderError(
                "text must not contain the media placeholder: the tokenizer reads "
                f"{tokenizer.decode([layout.placeholder_id])!r} in it; remove it from the text",
                sample.origin,
            )
        return ids

    row = _Row()
    for piece in written_pieces(sample, tokenizer, for_generation):
        if piece.part is not None:
            row.add_media(write_media(piece.part, layout, encode, sample.origin, sample.view))
        else:
            ids = encode(piece.text)
            row.add_text(ids, piece.weight)
            if piece.ends_turn:
                _unlearn_after_end_token(row, len(ids), tokenizer)
    return _finish(row, sample, layout, for_generation)


def _unlearn_after_end_token(row: _Row, length: int, tokenizer: Any) -> None:
    """Blank text that a template writes after the end-of-turn token is not the model's to say."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    tail = row.token_ids[len(row.token_ids) - length :]
    ends = [i for i, token in enumerate(tail) if token in special]
    if ends:
        after = length - 1 - ends[-1]
        # Words there are the answer's own, after a mark inside it; the template ends no turn.
        if after and not tokenizer.decode(tail[-after:]).strip():
            row.weights[-after:] = [0.0] * after


def _finish(row: _Row, sample: Sample, layout: Layout, for_generation: bool) -> Document:
    token_ids = np.array(row.token_ids, dtype=np.int64)
    weights = np.array(row.weights, dtype=np.float32)
    if not for_generation and not weights[1:].any():
        raise RenderError(
            "a training sample needs a labelled token after its first position; this one has "
            "none: add an assistant turn with text and a weight above 0",
            sample.origin,
        )
    if not for_generation and row.spans and row.spans[-1].stop == len(token_ids):
        raise RenderError(
            "a training sample must not end inside a media item; end its last turn with text",
            sample.origin,
        )
    plans = [item.plan for item in row.items]
    positions = layout.positions(token_ids, row.spans, plans)
    if for_generation:
        inputs, targets, learned = token_ids, np.zeros_like(token_ids), np.zeros_like(weights)
    else:
        inputs, targets, learned = token_ids[:-1], token_ids[1:], weights[1:]
        positions = positions[..., :-1]
    return Document(
        token_ids=inputs,
        targets=np.where(targets == layout.placeholder_id, 0, targets),
        weights=learned,
        positions=positions,
        spans=tuple(row.spans),
        items=tuple(row.items),
        sample_id=sample.id,
        origin=sample.origin,
        group=sample.group,
    )

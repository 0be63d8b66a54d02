"""The token stream: the types every room shares, and the one way from a sample to positions.

Shape letters: T positions of a row or of a document, K soft targets of a position, N positions
of one media item, C channels.

    Sample ──render──> Document ──pack──> TokenStream

A `Document` is planned from headers alone: it knows how many positions each picture takes, not
its pixels. `pack` joins documents, and the loaded inputs of their items, into one row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from plait.errors import DataError, ModelError, Origin, RenderError
from plait.modalities import MediaPart, Part

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    `weight` scales the loss of an assistant turn; 0 shows the turn without learning it. Turns of
    other roles never carry loss.
    """

    role: str
    parts: tuple[Part, ...]
    weight: float = 1.0
    tool_calls: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """What one row says: messages, or bare parts whose text is all learned.

    `view` picks one of the seeded augmentations of its pictures; 0 is the picture as it is.
    `label` is an optional class name, used only for evaluation and splits.
    """

    messages: tuple[Message, ...] = ()
    parts: tuple[Part, ...] = ()
    id: str = ""
    origin: Origin = field(default_factory=Origin)
    view: int = 0
    group: int | None = None
    label: str = ""

    def media(self) -> tuple[MediaPart, ...]:
        """The pictures, sounds and films in the order in which they are read."""
        held = self.parts + tuple(part for message in self.messages for part in message.parts)
        return tuple(part for part in held if isinstance(part, MediaPart))


@dataclass(frozen=True, slots=True)
class ItemPlan:
    """What an encoder promises for one item, from header facts alone.

    `grid` is (time, height, width) in positions; `bidirectional` says that the positions of the
    item see one another in both directions.
    """

    encoder: str
    length: int
    grid: tuple[int, int, int]
    bidirectional: bool = False


@dataclass(frozen=True, slots=True)
class Item:
    """One media item of a document: the part, what was promised for it, and its view."""

    part: MediaPart
    plan: ItemPlan
    view: int = 0
    origin: Origin = field(default_factory=Origin)


@dataclass(frozen=True, slots=True)
class Span:
    """`length` positions from `start` that `encoder` fills from item `item`, features `offset`...

    One item may take many spans (film frames between timestamps). The ITEM is atomic: it is never
    split over rows and never truncated inside. `group` marks positions that see one another in
    both directions; None is causal.
    """

    start: int
    length: int
    encoder: str
    item: int
    offset: int = 0
    group: int | None = None

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass(slots=True)
class ItemInputs:
    """A loaded item: the encoder's CPU-processed inputs, or its cached frozen features (N, C)."""

    inputs: dict[str, Tensor] | None = None
    features: "Encoded | None" = None


@dataclass(slots=True)
class Encoded:
    """What an encoder returns for one item.

    `embeddings` (N, C); `layers` carries features (N, C) for deeper layers of the language model
    where a family has them; `grid` is (time, height, width); `seconds` the time of each row of
    the grid, for media that have time.
    """

    embeddings: Tensor
    layers: tuple[Tensor, ...] = ()
    grid: tuple[int, int, int] = (1, 1, 1)
    seconds: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """A rendered sample: T positions, what each should predict, and what fills the media.

    `targets[i]` is the token after position i; `weights[i]` is 0 where nothing is learned.
    `positions` is (T,) or (3, T). Documents of one `group` stay in one micro-batch.
    """

    token_ids: IntArray
    targets: IntArray
    weights: FloatArray
    positions: IntArray
    spans: tuple[Span, ...] = ()
    items: tuple[Item, ...] = ()
    sample_id: str = ""
    origin: Origin = field(default_factory=Origin)
    run: str = ""
    loss: str = "cross_entropy"
    loss_inputs: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    group: int | None = None

    @property
    def length(self) -> int:
        return len(self.token_ids)

    def visible(self) -> IntArray:
        """(2, T): the first and one past the last position that each position may attend."""
        last = np.arange(1, self.length + 1)
        groups: dict[int, list[Span]] = {}
        for span in self.spans:
            if span.group is not None:
                groups.setdefault(span.group, []).append(span)
        for spans in groups.values():
            start, stop = min(s.start for s in spans), max(s.stop for s in spans)
            last[start:stop] = np.maximum(last[start:stop], stop)
        return np.stack([np.zeros_like(last), last])


@dataclass(slots=True)
class MediaBatch:
    """The items of one encoder in a stream, and the stream positions (P,) their features fill.

    `sources[p]` is the row, in the concatenation of all items' features, that position p takes.
    """

    items: list[ItemInputs]
    plans: list[ItemPlan]
    origins: list[Origin]
    index: Tensor
    sources: Tensor

    def check(self, encoded: Sequence[Encoded]) -> None:
        """Refuse features whose number is not the number of placeholders, naming the row."""
        if len(encoded) != len(self.plans):
            name = self.plans[0].encoder
            raise ModelError(
                f"encoder {name!r} must return features for each item: it was given "
                f"{len(self.plans)} items and returned {len(encoded)}"
            )
        for plan, origin, item in zip(self.plans, self.origins, encoded, strict=True):
            if len(item.embeddings) != plan.length:
                raise DataError(
                    f"placeholders must equal features: {plan.length} positions were planned for "
                    f"encoder {plan.encoder!r} but it returned {len(item.embeddings)}; its plan() "
                    "and forward() disagree",
                    origin,
                )


@dataclass(slots=True)
class TokenStream:
    """One packed row of T positions and everything that is said per document.

    `targets` and `weights` are (T,) or (T, K); `positions` (T,) or (3, T); `visible` (2, T).
    `bounds` holds the documents' (start, stop). Lists `run`, `sample_id`, `loss` and `group` have
    one entry per document.
    """

    token_ids: Tensor
    targets: Tensor
    weights: Tensor
    positions: Tensor
    visible: Tensor
    media: dict[str, MediaBatch]
    bounds: list[tuple[int, int]]
    run: list[str]
    sample_id: list[str]
    loss: list[str]
    group: list[int | None]
    origins: list[Origin]
    loss_inputs: dict[str, Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return self.token_ids.shape[0]

    @property
    def is_media(self) -> Tensor:
        """(T,) bool: the positions that encoders fill."""
        mask = torch.zeros(self.length, dtype=torch.bool)
        for batch in self.media.values():
            mask[batch.index] = True
        return mask


@runtime_checkable
class Layout(Protocol):
    """How one model family writes media into its row: placeholders, wrappers, positions."""

    placeholder_id: int
    """The token id that stands at media positions; never looked up in the embedding table."""

    banned_ids: frozenset[int]
    """Token ids that must never be generated."""

    def plan(self, part: MediaPart, origin: Origin) -> ItemPlan:
        """What the part will take, read from its header alone."""

    def pieces(self, plan: ItemPlan) -> Sequence[str | int]:
        """Texts and numbers of media positions, in order: `["<img>", 9, "</img>"]`."""

    def positions(self, token_ids: IntArray, spans: Sequence[Span], plans: Sequence[ItemPlan]
                  ) -> IntArray:  # fmt: skip
        """Rotary positions (T,) or (3, T) of one document."""

    def decode_position(self, positions: IntArray) -> int:
        """The position of the token generated after a document with these positions."""


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

    def add_item(self, item: Item, layout: Layout, encode: "_Tokenize") -> None:
        number, offset = len(self.items), 0
        group = number if item.plan.bidirectional else None
        for piece in layout.pieces(item.plan):
            if isinstance(piece, str):
                self.add_text(encode(piece), 0.0)
                continue
            start = len(self.token_ids)
            self.spans.append(Span(start, piece, item.plan.encoder, number, offset, group))
            self.add_text([layout.placeholder_id] * piece, 0.0)
            offset += piece
        if offset != item.plan.length:
            raise RenderError(
                f"a layout must place every feature of an item: {item.plan.length} were planned, "
                f"{offset} placed; mend the layout's pieces()",
                item.origin,
            )
        self.items.append(item)


class _Tokenize(Protocol):
    def __call__(self, text: str) -> list[int]: ...


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
    from plait.template import written_pieces  # the template engine is only loaded when needed

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
            plan = layout.plan(piece.part, sample.origin)
            row.add_item(Item(piece.part, plan, sample.view, sample.origin), layout, encode)
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
        targets=np.where(learned != 0, targets, 0),
        weights=learned,
        positions=positions,
        spans=tuple(row.spans),
        items=tuple(row.items),
        sample_id=sample.id,
        origin=sample.origin,
        group=sample.group,
    )


def check_placeholders(document: Document, placeholder_id: int) -> None:
    """Guarantee 1, before anything is encoded: placeholders, spans and promises agree.

    Raises:
        DataError: naming dataset, row and file.
    """
    covered = np.zeros(document.length, dtype=np.int64)
    filled = [0] * len(document.items)
    for span in document.spans:
        covered[span.start : span.stop] += 1
        filled[span.item] += span.length
    at_placeholder = document.token_ids == placeholder_id
    if not np.array_equal(covered == 1, at_placeholder) or covered.max(initial=0) > 1:
        raise DataError(
            f"placeholders must equal features: {int(at_placeholder.sum())} placeholder tokens "
            f"stand in the row but its media spans cover {int(covered.sum())} positions",
            document.origin,
        )
    for number, (item, length) in enumerate(zip(document.items, filled, strict=True)):
        if item.plan.length != length:
            raise DataError(
                f"placeholders must equal features: item {number} promises {item.plan.length} "
                f"features but has {length} positions",
                document.origin,
            )


def pack(documents: Sequence[Document], inputs: Sequence[Sequence[ItemInputs]]) -> TokenStream:
    """Join documents into one row; `inputs[d][i]` is the loaded item i of document d."""
    if not documents:
        raise ModelError("a stream needs at least one document; pack() was given none")
    if len(inputs) != len(documents):
        raise ModelError(
            f"pack() needs the inputs of every document: it was given {len(documents)} documents "
            f"and the inputs of {len(inputs)}"
        )
    starts = np.cumsum([0] + [document.length for document in documents])
    visible = [d.visible() + start for d, start in zip(documents, starts, strict=False)]
    ranks = {document.positions.ndim for document in documents}
    if len(ranks) > 1:
        raise ModelError("documents of one stream need positions of one rank: (T,) or (3, T)")
    names = {tuple(sorted(document.loss_inputs)) for document in documents}
    if len(names) > 1:
        raise ModelError(
            "documents of one stream need the same loss inputs; these have "
            + " and ".join(", ".join(some) or "none" for some in sorted(names))
        )
    return TokenStream(
        token_ids=_joined([d.token_ids for d in documents]),
        targets=_joined([d.targets for d in documents]),
        weights=_joined([d.weights for d in documents]),
        positions=torch.from_numpy(np.concatenate([d.positions for d in documents], axis=-1)),
        visible=torch.from_numpy(np.concatenate(visible, axis=1)),
        media=_gather_media(documents, inputs, starts),
        bounds=[(int(a), int(b)) for a, b in pairwise(starts)],
        run=[d.run for d in documents],
        sample_id=[d.sample_id for d in documents],
        loss=[d.loss for d in documents],
        group=[d.group for d in documents],
        origins=[d.origin for d in documents],
        loss_inputs={
            name: _joined([d.loss_inputs[name] for d in documents])
            for name in documents[0].loss_inputs
        },
    )


def _joined(arrays: Sequence[NDArray[Any]]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays))


def _gather_media(
    documents: Sequence[Document], inputs: Sequence[Sequence[ItemInputs]], starts: IntArray
) -> dict[str, MediaBatch]:
    batches: dict[str, MediaBatch] = {}
    index: dict[str, list[IntArray]] = {}
    sources: dict[str, list[IntArray]] = {}
    rows: dict[str, int] = {}
    for document, loaded, start in zip(documents, inputs, starts, strict=False):
        first_row: list[int] = []
        for item, item_inputs in zip(document.items, loaded, strict=True):
            name = item.plan.encoder
            batch = batches.setdefault(name, MediaBatch([], [], [], torch.empty(0), torch.empty(0)))
            batch.items.append(item_inputs)
            batch.plans.append(item.plan)
            batch.origins.append(item.origin)
            first_row.append(rows.get(name, 0))
            rows[name] = first_row[-1] + item.plan.length
        for span in document.spans:
            offset = first_row[span.item] + span.offset
            index.setdefault(span.encoder, []).append(
                np.arange(start + span.start, start + span.stop)
            )
            sources.setdefault(span.encoder, []).append(np.arange(offset, offset + span.length))
    for name, batch in batches.items():
        batch.index, batch.sources = _joined(index[name]), _joined(sources[name])
    return batches

"""Documents, and the loaded inputs of their items, joined into one row."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from plait.errors import DataError, ModelError
from plait.stream.types import Document, IntArray, ItemInputs, MediaBatch, Span, TokenStream


def check_placeholders(document: Document, placeholder_id: int) -> None:
    """Guarantee 1, before anything is encoded: placeholders, spans and promises agree.

    Raises:
        DataError: naming dataset, row and file.
    """
    covered = np.zeros(document.length, dtype=np.int64)
    for span in document.spans:
        covered[span.start : span.stop] += 1
    at_placeholder = document.token_ids == placeholder_id
    if not np.array_equal(covered == 1, at_placeholder) or covered.max(initial=0) > 1:
        raise DataError(
            f"placeholders must equal features: {int(at_placeholder.sum())} placeholder tokens "
            f"stand in the row but its media spans cover {int(covered.sum())} positions",
            document.origin,
        )
    by_item: dict[int, list[Span]] = {number: [] for number in range(len(document.items))}
    for span in document.spans:
        if span.item not in by_item:
            raise DataError(
                f"placeholders must equal features: a span names item {span.item} of "
                f"{len(document.items)}; mend the layout",
                document.origin,
            )
        by_item[span.item].append(span)
    for number, spans in by_item.items():
        _check_item(document, number, spans)


def _check_item(document: Document, number: int, spans: Sequence[Span]) -> None:
    """The spans of an item take each of its features once, all from its own encoder."""
    plan, filled = document.items[number].plan, 0
    for span in sorted(spans, key=lambda span: span.offset):
        if span.encoder != plan.encoder:
            raise DataError(
                f"placeholders must equal features: item {number} is for encoder "
                f"{plan.encoder!r} but a span of it for {span.encoder!r}; mend the layout",
                document.origin,
            )
        if span.offset != filled:
            fault = "twice" if span.offset < filled else "by no position"
            raise DataError(
                f"placeholders must equal features: feature {min(span.offset, filled)} of item "
                f"{number} is taken {fault}; mend the layout's offsets",
                document.origin,
            )
        filled += span.length
    if plan.length != filled:
        raise DataError(
            f"placeholders must equal features: item {number} promises {plan.length} features but "
            f"has {filled} positions; mend the layout",
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

"""Documents, and the loaded inputs of their items, joined into one row."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from plait.errors import DataError, ModelError
from plait.stream.types import Document, IntArray, ItemInputs, MediaBatch, TokenStream


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

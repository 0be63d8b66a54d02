"""Which documents of a call are computed in which micro-batch."""

import heapq
from collections.abc import Sequence

from plait.datasets.packing import Unit, best_fit, make_units
from plait.errors import DataError
from plait.stream import Document


def plan(
    documents: Sequence[Document], capacity: int, max_documents: int | None = None, ranks: int = 1
) -> list[list[int]]:
    """Micro-batches as lists of indices; documents of one group stay together, in order.

    What fits into one micro-batch of each rank is spread over the ranks evenly; with one rank it
    stays in the order given.

    Args:
        capacity: Positions of a micro-batch at most.
        max_documents: Documents of a micro-batch at most; None is no limit.
        ranks: Micro-batches that are computed at the same time.

    Raises:
        DataError: a document is longer than a micro-batch.
    """
    for document in documents:
        if document.length > capacity:
            raise DataError(
                f"a datum must fit into a micro-batch of {capacity} positions; this one has "
                f"{document.length}: shorten it or raise the capacity",
                document.origin,
            )
    lengths = [document.length for document in documents]
    fits = sum(lengths) <= capacity and (max_documents is None or len(lengths) <= max_documents)
    if fits and ranks == 1:
        return [list(range(len(lengths)))] if lengths else []
    units = make_units(
        list(range(len(lengths))), lengths, [document.group for document in documents]
    )
    packs = [list(p) for p in best_fit(units, capacity=capacity, max_documents=max_documents)]
    if len(packs) <= ranks and ranks > 1:
        spread = _spread(units, ranks)
        if all(_fits(pack, lengths, capacity, max_documents) for pack in spread):
            return spread
    return packs


def _spread(units: Sequence[Unit[int]], ranks: int) -> list[list[int]]:
    """Units given out from the longest on, each to the rank that has the fewest positions."""
    heap: list[tuple[int, int, list[int]]] = [(0, rank, []) for rank in range(ranks)]
    for unit in sorted(units, key=lambda unit: -unit.length):
        positions, rank, keys = heap[0]
        heapq.heapreplace(heap, (positions + unit.length, rank, [*keys, *unit.keys]))
    return [keys for _, _, keys in sorted(heap, key=lambda entry: entry[1]) if keys]


def _fits(
    pack: Sequence[int], lengths: Sequence[int], capacity: int, max_documents: int | None
) -> bool:
    short = sum(lengths[i] for i in pack) <= capacity
    return short and (max_documents is None or len(pack) <= max_documents)

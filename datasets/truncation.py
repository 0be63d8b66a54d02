"""Rows that are too long, shortened: text alone, after the last media item, at the end."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from plait.datasets.columns import MeasuredRow
from plait.datasets.settings import PackLimits
from plait.stream import Document


def cut_to_fit(rows: Sequence[MeasuredRow], limits: PackLimits) -> tuple[list[int], str]:
    """How many positions to cut off the end of each row of a unit so that a pack holds it.

    All rows are cut to one length, the longest possible; shorter ones stay as they are. A media
    item is never split, and something learned must be left.

    Returns:
        The cuts and no reason; or no cuts, and why the unit cannot be shortened.
    """
    given = limits.given()
    for name, taken in [
        ("documents", len(rows)),
        ("patches", sum(row.counts.patches for row in rows)),
        ("frames", sum(row.counts.frames for row in rows)),
    ]:
        if taken > given.get(name, taken):
            return [], f"{taken} {name}, of which a pack holds {given[name]}; only text is cut"
    lengths = [row.length for row in rows]

    def fits(level: int) -> bool:
        cut = [min(length, level) for length in lengths]
        squares = sum(length * length for length in cut)
        return sum(cut) <= limits.capacity and squares <= given.get("squares", squares)

    level = _largest(fits, max(lengths))
    for row in rows:
        short = min(row.length, level)
        if short < row.counts.media_end:
            return [], (
                f"{row.length} positions, to be cut to {short}, and its media go on to position "
                f"{row.counts.media_end}; a media item is never split"
            )
        if short < row.counts.learned:
            return [], (
                f"{row.length} positions, to be cut to {short}, which would leave nothing that is "
                "learned"
            )
    return [length - min(length, level) for length in lengths], ""


def _largest(fits: Callable[[int], bool], high: int) -> int:
    """The largest level that fits, of which all smaller ones do."""
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def truncated(document: Document, length: int) -> Document:
    """The document's first `length` positions; every span must lie within them."""
    if document.length == length:
        return document
    return replace(
        document,
        token_ids=document.token_ids[:length],
        targets=document.targets[:length],
        weights=document.weights[:length],
        positions=document.positions[..., :length],
        loss_inputs={
            name: values[:length] if len(values) == document.length else values
            for name, values in document.loss_inputs.items()
        },
    )

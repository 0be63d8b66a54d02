"""Splits of a blend: a picture that is held out of one dataset is not trained on in another.

Each dataset is split by itself, as if it were alone, so that its test rows do not depend on what
it is blended with; only then do rows of the others join what they nearly repeat.
"""

from collections.abc import Sequence
from dataclasses import replace

from plait.datasets.blend import Joined
from plait.datasets.likeness import Progress, group_rows
from plait.datasets.splits import SplitOptions, Splits, readable, split
from plait.errors import DataError, Origin
from plait.modalities import Limits
from plait.stream import Sample


def split_apart(
    datasets: Sequence[Sequence[Sample]],
    options: Sequence[SplitOptions],
    *,
    limits: Limits = Limits(),  # noqa: B008  (frozen)
    progress: Progress | None = None,
) -> list[Splits]:
    """The split of each dataset, in its own row numbers.

    Pictures are compared across datasets where all of these ask for the same
    `near_duplicate_bits`; with different ones each dataset is only compared with itself.

    Raises:
        DataError: a dataset would have no row left to train on.
    """
    bits = {one.near_duplicate_bits for one in options}
    held_out = any(one.test or one.validation for one in options)
    (common,) = bits if len(bits) == 1 else (None,)
    if len(datasets) == 1 or common is None or not held_out:
        pairs = zip(datasets, options, strict=True)
        return [split(rows, one, limits=limits, progress=progress) for rows, one in pairs]
    joined = Joined(datasets)
    groups, broken = group_rows(readable(joined), common, limits, progress)
    found = []
    for number, (rows, one) in enumerate(zip(datasets, options, strict=True)):
        own = groups[joined.starts[number] : joined.starts[number + 1]]
        found.append(split(rows, one, limits=limits, near=_within(own)))
    if broken:
        note = f"{broken} pictures cannot be decoded and were compared with none"
        found[0] = replace(found[0], notes=(*found[0].notes, note))
    return _together(found, groups, joined.starts)


def _within(groups: Sequence[int]) -> list[int]:
    """Groups of all datasets as those of one: named by the smallest row in it."""
    first: dict[int, int] = {}
    return [first.setdefault(group, row) for row, group in enumerate(groups)]


def _together(
    splits: Sequence[Splits], groups: Sequence[int], starts: Sequence[int]
) -> list[Splits]:
    """Training rows moved to where a row of their group is held out; test comes first."""
    pairs = list(zip(splits, starts, strict=False))
    test = {groups[start + row] for one, start in pairs for row in one.test}
    validation = {groups[start + row] for one, start in pairs for row in one.validation} - test
    found: list[Splits] = []
    for one, start in pairs:
        tested = {row for row in one.train if groups[start + row] in test}
        validated = {row for row in one.train if groups[start + row] in validation}
        moved = tested | validated
        if moved and len(moved) == len(one.train):
            raise DataError(
                "a split must leave rows to train on; all of this dataset show what is held out of "
                "another one: split both by: answer, or leave it out",
                Origin(file=f"dataset {len(found) + 1} of the blend"),
            )
        notes = one.notes
        if moved:
            notes = (
                *notes,
                f"{len(moved)} rows are held out because they show what is held out of another "
                "dataset of the blend",
            )
        found.append(
            replace(
                one,
                train=[row for row in one.train if row not in moved],
                validation=sorted({*one.validation, *validated}),
                test=sorted({*one.test, *tested}),
                moved=one.moved + len(moved),
                notes=notes,
            )
        )
    return found

"""Which rows train, which choose when to stop, and which are touched once at the end.

The split is a function of the rows alone: no seed, the same on every machine. A row's place is
the SHA-256 of its id (for a folder of pictures, its relative path), so that adding rows moves few
others. Rows that show nearly the same picture stay on one side, and so do the documents of one
group and, where asked, rows with the same answer or label.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from plait.datasets.likeness import Progress, group_rows, joined
from plait.errors import ConfigError, DataError, UnknownNameError
from plait.modalities import Limits, Text
from plait.stream import Sample


@dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """How many rows are held out: numbers of rows, or shares of them (0.1).

    With shares, what is hashed decides alone, whatever else a dataset holds: the datasets of a
    blend, split by answer and equal shares, hold out the same answers.

    Raises:
        ConfigError: a field is out of its range.
    """

    test: int | float = 0
    """Rows for the final measurement; near-duplicates of them are added."""

    validation: int | float = 0
    """Rows of the rest for choosing when to stop; near-duplicates of them are added."""

    by: Literal["id", "answer", "label"] = "id"
    """What is hashed, and stays on one side where it is equal: "answer" is what the assistant
    says, upper case, spaces and punctuation apart, so that no answer of test was trained on."""

    near_duplicate_bits: int | None = 12
    """How many of 256 bits of the picture hash may differ between near-duplicates. On the 785
    Tux Paint stamps 12 makes 8 groups, each the same drawing with a detail or a colour changed; 16
    joins the first different things (a hammer and a wrench). None hashes no picture."""

    def __post_init__(self) -> None:
        for name in ("test", "validation"):
            asked = getattr(self, name)
            if not asked >= 0 or (isinstance(asked, float) and asked >= 1):
                raise ConfigError(
                    f"split.{name} must be a number of rows from 0, or a share below 1; it is "
                    f"{asked}"
                )
        if self.test and self.validation and self.shares != isinstance(self.test, float):
            raise ConfigError(
                "split.test and split.validation must both be numbers of rows or both be shares; "
                f"they are {self.test} and {self.validation}"
            )
        if self.shares and self.test + self.validation > 0.5:
            raise ConfigError(
                "split.test and split.validation must leave half of the rows to train on; they "
                f"are {self.test} and {self.validation}"
            )
        if self.by not in KEYS:
            raise UnknownNameError("split.by", self.by, KEYS)
        bits = self.near_duplicate_bits
        if bits is not None and not 0 <= bits <= 256:
            raise ConfigError(f"split.near_duplicate_bits must be 0 to 256; it is {bits}")

    @property
    def shares(self) -> bool:
        """Whether shares are held out, not numbers of rows."""
        return isinstance(self.validation if self.validation else self.test, float)


@dataclass(frozen=True, slots=True)
class Splits:
    """Row numbers, ascending; each row is in exactly one list.

    `moved` counts the rows that joined test or validation only with their group: near-duplicates,
    and rows with the same answer or label where the split goes by these. `notes` are sentences
    for the user.
    """

    train: list[int]
    validation: list[int]
    test: list[int]
    moved: int = 0
    notes: tuple[str, ...] = ()


def split(
    samples: Sequence[Sample],
    options: SplitOptions,
    *,
    limits: Limits = Limits(),  # noqa: B008  (frozen)
    progress: Progress | None = None,
    near: Sequence[int] | None = None,
) -> Splits:
    """Split by the hash of ids (or of answers or labels), groups whole.

    Test is the `test` rows with the smallest SHA-256 of what `options.by` names and every row of
    their groups; validation the same among the rest. Shares are of the range of the hash. Where
    two numbers would be more than half of the rows, both shrink in proportion. A row that cannot
    be read trains, so that the loader's policy on broken rows meets it; a picture that cannot be
    read is like no other.

    Args:
        progress: Called with (done, all); each picture is hashed, then compared.
        near: Groups of near-duplicates, as `group_rows` gives them, where they are known.

    Raises:
        DataError: no row would be left to train on.
    """
    read = readable(samples)
    groups, notes = list(range(len(read)) if near is None else near), []
    if (
        near is None
        and options.near_duplicate_bits is not None
        and options.test + options.validation
    ):
        groups, broken = group_rows(read, options.near_duplicate_bits, limits, progress)
        if broken:
            notes.append(f"{broken} pictures cannot be decoded and were compared with none")
    keys = [None if sample is None else KEYS[options.by](sample) for sample in read]
    if options.by != "id":
        groups = _joined_by(keys, groups)
    groups = _joined_by([_pair_of(sample) for sample in read], groups)
    if unread := read.count(None):
        notes.append(f"{unread} rows cannot be read and were left in train")
    hashes = _hashes(keys)
    first, second, note = _chooser(hashes, len(read), options)
    for_test = _whole_groups(chosen := first(list(hashes)), groups)
    more = second([row for row in hashes if row not in for_test])
    for_validation = _whole_groups(more, groups)
    held = for_test | for_validation
    train = [row for row in range(len(read)) if row not in held]
    if read and not train:
        raise DataError(
            "a split must leave rows to train on; the held-out rows and what is grouped with them "
            f"took all {len(read)}; lower split.near_duplicate_bits, test or validation, or set "
            "split.by: id"
        )
    moved = len(held) - len(chosen) - len(more)
    return Splits(train, sorted(for_validation), sorted(for_test), moved, (*note, *notes))


def readable(samples: Sequence[Sample]) -> list[Sample | None]:
    """The samples; None where one cannot be read."""
    found: list[Sample | None] = []
    for row in range(len(samples)):
        try:
            found.append(samples[row])
        except DataError:
            found.append(None)
    return found


_Choose = Callable[[list[int]], list[int]]
"""From rows in the order of their hashes, those that are held out."""


def _chooser(
    hashes: dict[int, bytes], rows: int, options: SplitOptions
) -> tuple[_Choose, _Choose, tuple[str, ...]]:
    """How test and then validation are chosen, and what to tell the user about it."""
    if options.shares:
        first, second = _below(options.test), _below(options.test + options.validation)
        return (
            lambda order: [row for row in order if hashes[row] < first],
            lambda order: [row for row in order if hashes[row] < second],
            (),
        )
    test, validation, note = _counts(rows, int(options.test), int(options.validation))
    return lambda order: order[:test], lambda order: order[:validation], note


def _below(share: float) -> bytes:
    """The hash below which that share of all hashes lies; 15 digits of it count."""
    return int(share * 2**64).to_bytes(8, "big")


def _counts(rows: int, test: int, validation: int) -> tuple[int, int, tuple[str, ...]]:
    """Rows for test and validation, and what to tell the user about them."""
    asked, half = test + validation, rows // 2
    if asked <= half:
        return test, validation, ()
    left = (test * half // asked, validation * half // asked)
    note = (
        f"test {test} and validation {validation} are more than half of {rows} rows; they were "
        f"scaled down to {left[0]} and {left[1]}"
    )
    return *left, (note,)


def _hashes(keys: Sequence[str | None]) -> dict[int, bytes]:
    """The SHA-256 of the key of each readable row, ascending; equal keys in the order of rows."""
    hashes = {
        row: hashlib.sha256(key.encode()).digest()
        for row, key in enumerate(keys)
        if key is not None
    }
    return dict(sorted(hashes.items(), key=lambda item: (item[1], item[0])))


def _joined_by(keys: Sequence[str | None], groups: Sequence[int]) -> list[int]:
    """The groups, those that share a key made one; a group is named by its smallest row."""
    first: dict[str, int] = {}
    near = [(group, [row]) for row, group in enumerate(groups)]
    near += [(first.setdefault(key, row), [row]) for row, key in enumerate(keys) if key is not None]
    return joined(len(groups), near)


def _pair_of(sample: Sample | None) -> str | None:
    """What the documents of one row have in common: both answers of a preference pair."""
    return None if sample is None or sample.group is None else str(sample.group)


def _whole_groups(rows: Sequence[int], groups: Sequence[int]) -> set[int]:
    """The rows and every other row of their groups."""
    wanted = {groups[row] for row in rows}
    return {row for row, group in enumerate(groups) if group in wanted}


def _answer(sample: Sample) -> str:
    """What is learned of a sample: letters and digits alone, if it has any."""
    said = [m.parts for m in sample.messages if m.role == "assistant"] or [sample.parts]
    text = " ".join(part.text for parts in said for part in parts if isinstance(part, Text))
    words = "".join(sign if sign.isalnum() else " " for sign in text.casefold()).split()
    return " ".join(words) or text or sample.id


KEYS: dict[str, Callable[[Sample], str]] = {
    "id": lambda sample: sample.id,
    "answer": _answer,
    "label": lambda sample: sample.label or sample.id,
}
"""What `split.by` may name, as a function of the row; a row that lacks it is split by its id."""

"""A picture that is held out of one dataset of a blend is not trained on in another."""

import numpy as np
import pytest

from plait.datasets.apart import split_apart
from plait.datasets.splits import SplitOptions, split
from plait.errors import DataError
from plait.modalities import Image, Text
from plait.stream import Message, Sample


def picture(number: int) -> np.ndarray:
    blocks = np.random.default_rng(number).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return blocks.repeat(8, axis=0).repeat(8, axis=1)


def rows(name: str, numbers: range, shade: int = 0) -> list[Sample]:
    """Pictures by number; a shade makes another file of nearly the same picture."""
    return [
        Sample(
            messages=(
                Message("user", (Image((picture(n) // 2 + shade).astype(np.uint8)),)),
                Message("assistant", (Text(f"{name} {n}"),)),
            ),
            id=f"{name}/{n}",
        )
        for n in numbers
    ]


HOLDS, NONE = SplitOptions(test=6, validation=4), SplitOptions()


def test_what_is_held_out_of_one_dataset_is_held_out_of_all() -> None:
    first, second = rows("a", range(30)), rows("b", range(10, 40), shade=3)
    alone = split(first, HOLDS)
    one, other = split_apart([first, second], [HOLDS, NONE])
    assert (one.train, one.validation, one.test) == (alone.train, alone.validation, alone.test)
    for held, name in ((other.test, "test"), (other.validation, "validation")):
        wanted = [n - 10 for n in getattr(alone, name) if n >= 10]
        assert held == wanted and wanted, "the same pictures, under other names"
    assert other.moved == len(other.test) + len(other.validation)
    assert sorted(other.train + other.test + other.validation) == list(range(30))
    assert "held out of another" in other.notes[-1] and not one.notes


def test_datasets_that_share_nothing_are_split_as_if_they_were_alone() -> None:
    first, second = rows("a", range(20)), rows("b", range(50, 75))
    assert split_apart([first, second], [HOLDS, HOLDS]) == [
        split(first, HOLDS),
        split(second, HOLDS),
    ]


def test_other_bits_compare_each_dataset_with_itself_alone() -> None:
    first, second = rows("a", range(20)), rows("b", range(20))
    loose = SplitOptions(test=6, validation=4, near_duplicate_bits=None)
    assert split_apart([first, second], [HOLDS, loose])[1] == split(second, loose)


def test_a_dataset_that_only_repeats_what_is_held_out_is_refused() -> None:
    first = rows("a", range(30))
    repeated = [first[row] for row in split(first, HOLDS).test]
    with pytest.raises(DataError, match="dataset 2 of the blend"):
        split_apart([first, repeated], [HOLDS, NONE])

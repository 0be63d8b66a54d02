"""Whether a row read from its shard is the row that was written."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from plait.datasets.headers import own_facts
from plait.errors import DataError
from plait.modalities import Image, Limits, MediaPart, Part, Text, Video
from plait.stream import Sample


def check_copy(original: Sample, copy: Sample, limits: Limits) -> None:
    """
    Raises:
        DataError: the copy says something else than the row did.
    """
    same = (
        (original.id, original.label) == (copy.id, copy.label)
        and _frame(original) == _frame(copy)
        and all(
            _same(one, other, limits) for one, other in zip_longest(original.media(), copy.media())
        )
    )
    if not same:
        raise DataError(
            "a row must read the same from its shard; this one does not: it says what the rows of "
            "a shard cannot (a sampling without max_frames, say); mend it, or leave it out",
            original.origin,
        )


def _frame(sample: Sample) -> list[Any]:
    """All that a sample says, its media as their place alone."""

    def bare(parts: Sequence[Part]) -> list[Any]:
        return [part if isinstance(part, Text) else part.medium for part in parts]

    turns = [(m.role, bare(m.parts), m.weight, list(m.tool_calls)) for m in sample.messages]
    return [bare(sample.parts), turns]


def _same(one: Any, other: Any, limits: Limits) -> bool:
    """Whether two parts are read alike and hold the same; what was in memory is compared there."""
    if one is None or other is None or not one.in_memory:
        return bool(one and other and own_facts(one) == own_facts(other)) and bool(
            one.digest() == other.digest()
        )
    if isinstance(one, Video):
        pairs = zip_longest(_pictures(one), _pictures(other))
        return all(_same(a, b, limits) for a, b in pairs) and own_facts(one) == own_facts(other)
    first, second = one.load(limits), other.load(limits)
    if isinstance(one, Image):
        return np.array_equal(first, second)
    return first.rate == second.rate and np.array_equal(first.samples, second.samples)


def _pictures(film: Any) -> list[MediaPart]:
    return [one if isinstance(one, Image) else Image(one) for one in film.source]

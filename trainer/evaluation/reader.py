"""Held-out samples as packed streams, in a fixed order, with their media loaded."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TypeVar

from plait.datasets.executor import Executor
from plait.stream import Document, Item, ItemInputs, Sample, TokenStream, pack

STREAM_POSITIONS = 1024
"""Positions of an evaluation stream; small enough for a laptop's memory."""

Value = TypeVar("Value")
Loaded = tuple[Document, list[ItemInputs]]


@dataclass(slots=True)
class Reader:
    """Renders samples and loads their items; threads decode a few groups ahead, no more.

    `render` takes a sample and whether it is a prompt.
    """

    render: Callable[[Sample, bool], Document]
    load: Callable[[Item], ItemInputs]
    workers: int = 2

    def prompts(self, samples: Sequence[Sample], size: int) -> Iterator[list[Loaded]]:
        """Prompts with their inputs, `size` at a time, in order; the first that fails raises."""
        yield from self._loaded(batched([self.render(sample, True) for sample in samples], size))

    def streams(self, samples: Sequence[Sample]) -> Iterator[tuple[list[int], TokenStream]]:
        """(indices into samples, packed stream) covering every sample once."""
        documents = [self.render(sample, False) for sample in samples]
        groups = list(groups_within([document.length for document in documents], STREAM_POSITIONS))
        loaded = self._loaded([[documents[i] for i in held] for held in groups])
        for held, group in zip(groups, loaded, strict=True):
            yield held, pack(*zip(*group, strict=True))

    def _loaded(self, groups: Sequence[Sequence[Document]]) -> Iterator[list[Loaded]]:
        executor = Executor(self.workers, ahead=2)
        with closing(executor.map(self._load, groups)) as done:
            for group in done:
                yield [one.result() for one in group]

    def _load(self, document: Document) -> Loaded:
        return document, [self.load(item) for item in document.items]


def batched(values: Sequence[Value], size: int) -> list[Sequence[Value]]:
    """Values in their order, `size` at a time; the last batch may be smaller."""
    return [values[start : start + size] for start in range(0, len(values), size)]


def groups_within(lengths: Sequence[int], capacity: int) -> Iterator[list[int]]:
    """Runs of neighbours whose lengths sum to `capacity` at most; a longer one stands alone."""
    held: list[int] = []
    for number, length in enumerate(lengths):
        if held and sum(lengths[i] for i in held) + length > capacity:
            yield held
            held = []
        held.append(number)
    if held:
        yield held

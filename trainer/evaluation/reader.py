"""Held-out samples as packed streams, in a fixed order, with their media loaded."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from plait.datasets.executor import Executor
from plait.stream import Document, Item, ItemInputs, Sample, TokenStream, pack

STREAM_POSITIONS = 1024
"""Positions of an evaluation stream; small enough for a laptop's memory."""

Loaded = tuple[Document, list[ItemInputs]]


@dataclass(slots=True)
class Reader:
    """Renders samples and loads their items; threads decode ahead.

    `render` takes a sample and whether it is a prompt.
    """

    render: Callable[[Sample, bool], Document]
    load: Callable[[Item], ItemInputs]
    workers: int = 2

    def documents(self, samples: Sequence[Sample], for_generation: bool = False) -> list[Loaded]:
        """Rendered samples with their inputs, in order; the first that fails raises."""
        documents = [self.render(sample, for_generation) for sample in samples]
        executor = Executor(self.workers, ahead=4)
        done = executor.map(self._loaded, batched_lists(documents, 16))
        return [one.result() for batch in done for one in batch]

    def _loaded(self, document: Document) -> Loaded:
        return document, [self.load(item) for item in document.items]

    def streams(self, samples: Sequence[Sample]) -> Iterator[tuple[list[int], TokenStream]]:
        """(indices into samples, packed stream) covering every sample once."""
        loaded = self.documents(samples)
        for held in groups_within([document.length for document, _ in loaded], STREAM_POSITIONS):
            yield held, pack([loaded[i][0] for i in held], [loaded[i][1] for i in held])


def batched_lists(values: Sequence[Document], size: int) -> Iterator[list[Document]]:
    for start in range(0, len(values), size):
        yield list(values[start : start + size])


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

"""All measures of one set of held-out samples, as they stand in metrics.json."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from plait.modalities import Text
from plait.stream import Layout, Sample
from plait.trainer.evaluation.captions import captions
from plait.trainer.evaluation.classes import class_accuracy
from plait.trainer.evaluation.nll import DERANGEMENT_SEEDS, deranged, nll, per_token
from plait.trainer.evaluation.reader import Reader
from plait.trainer.model import PlaitModel


@dataclass(slots=True)
class Measured:
    """What was measured; None where it cannot be, with the reason in `notes`.

    `nll_shuffled` is the mean over fixed derangements in which every picture is of another class.
    """

    nll_matched: float
    nll_shuffled: float | None
    class_accuracy: float | None
    count: int
    tokens: int
    notes: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Suite:
    """Measures a model; `classes` are those that training rows know, in a fixed order."""

    model: PlaitModel
    reader: Reader
    tokenizer: Any
    layout: Layout
    classes: Sequence[str]

    def measure(self, samples: Sequence[Sample]) -> Measured:
        matched = nll(self.model, self.reader, samples)
        measured = Measured(
            nll_matched=per_token(matched),
            nll_shuffled=None,
            class_accuracy=None,
            count=len(samples),
            tokens=round(sum(weight for _, weight in matched)),
        )
        self._shuffled(samples, measured)
        self._classes(samples, measured)
        return measured

    def _shuffled(self, samples: Sequence[Sample], measured: Measured) -> None:
        found = []
        for seed in DERANGEMENT_SEEDS:
            exchanged = deranged(samples, seed)
            if exchanged is None:
                measured.notes.append(
                    "nll_shuffled needs a way to give every sample the media of another class; "
                    "one class holds more than half of the samples, or not all of them have the "
                    "same number of media"
                )
                return
            found.append(per_token(nll(self.model, self.reader, exchanged)))
        measured.nll_shuffled = sum(found) / len(found)

    def _classes(self, samples: Sequence[Sample], measured: Measured) -> None:
        if len(self.classes) < 2 or not all(sample.label for sample in samples):
            measured.notes.append(
                "class_accuracy needs labels of at least two classes; this dataset has none"
            )
            return
        if not all(_answer(sample).startswith(f"{sample.label}:") for sample in samples):
            measured.notes.append(
                "class_accuracy needs answers that begin with `<class>:`; set the captions' "
                'template to "{class}: {text}"'
            )
            return
        measured.class_accuracy = class_accuracy(
            self.model, self.reader, self.tokenizer, self.layout, samples, self.classes
        )

    def captions(self, samples: Sequence[Sample]) -> list[str]:
        return captions(self.model, self.reader, self.tokenizer, self.layout, samples)


def _answer(sample: Sample) -> str:
    """The text of the last turn."""
    return "".join(part.text for part in sample.messages[-1].parts if isinstance(part, Text))

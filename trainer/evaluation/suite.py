"""All measures of one set of held-out samples, as they stand in metrics.json."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from plait.stream import Layout, Sample
from plait.trainer.config import EvaluationConfig
from plait.trainer.evaluation.captions import captions
from plait.trainer.evaluation.classes import class_accuracy
from plait.trainer.evaluation.exchanges import (
    DERANGEMENT_SEEDS,
    answer_of,
    deranged,
    with_single_frames,
    without,
)
from plait.trainer.evaluation.nll import Gap, Sums, gap, nll, per_token
from plait.trainer.evaluation.reader import Reader
from plait.trainer.evaluation.words import word_error_rate
from plait.trainer.model import PlaitModel


@dataclass(slots=True)
class Measured:
    """What was measured; None where it cannot be, with the reason in `notes`.

    `nll_shuffled` is the mean over fixed derangements in which media are another class's; rows
    without media stay as they are in it. `shuffled_gap` is over the exchanged rows alone, and
    `without` over the rows that hold the medium.
    """

    nll_matched: float
    nll_shuffled: float | None
    class_accuracy: float | None
    count: int
    tokens: int
    shuffled_gap: Gap | None = None
    without: dict[str, Gap] = field(default_factory=dict)
    single_frame: Gap | None = None
    word_error_rate: float | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Suite:
    """Measures a model; `classes` are those that training rows know, in a fixed order."""

    model: PlaitModel
    reader: Reader
    tokenizer: Any
    layout: Layout
    classes: Sequence[str]
    options: EvaluationConfig = field(default_factory=EvaluationConfig)

    def measure(self, samples: Sequence[Sample]) -> Measured:
        matched = self._nll(samples)
        measured = Measured(
            nll_matched=per_token(matched),
            nll_shuffled=None,
            class_accuracy=None,
            count=len(samples),
            tokens=round(sum(weight for _, weight in matched)),
        )
        self._shuffled(samples, matched, measured)
        self._classes(samples, measured)
        if self.options.without:
            for medium in _media(samples):
                found = self._changed(samples, matched, partial(without, medium=medium))
                if found is not None:
                    measured.without[medium] = found
        if self.options.single_frame:
            measured.single_frame = self._changed(samples, matched, with_single_frames)
        if self.options.word_error_rate:
            answers = self.captions(samples)
            measured.word_error_rate = word_error_rate([answer_of(s) for s in samples], answers)
        return measured

    def _nll(self, samples: Sequence[Sample]) -> list[tuple[float, float]]:
        return nll(self.model, self.reader, samples)

    def _shuffled(self, samples: Sequence[Sample], matched: Sums, measured: Measured) -> None:
        exchanges = [deranged(samples, seed) for seed in DERANGEMENT_SEEDS]
        places = [place for place in exchanges[0] if all(place in made for made in exchanges)]
        if not places:
            measured.notes.append(
                "nll_shuffled needs a way to give samples the media of another class; there are "
                "no media, or one answer holds more than half of the samples of each kind"
            )
            return
        changed = [self._nll([made[place] for place in places]) for made in exchanges]
        measured.shuffled_gap = gap([matched[place] for place in places], changed)
        exchanged = set(places)
        kept = [pair for place, pair in enumerate(matched) if place not in exchanged]
        found = [per_token([*kept, *sums]) for sums in changed]
        measured.nll_shuffled = sum(found) / len(found)
        with_media = sum(bool(sample.media()) for sample in samples)
        if len(places) < with_media:
            measured.notes.append(
                f"{with_media - len(places)} of {with_media} samples with media keep their own in "
                "nll_shuffled: one answer holds more than half of their kind"
            )

    def _changed(
        self, samples: Sequence[Sample], matched: Sums, change: Callable[[Sample], Sample | None]
    ) -> Gap | None:
        """The gap over the samples that `change` changes; None where it changes none."""
        made = {place: change(sample) for place, sample in enumerate(samples)}
        changed = {place: sample for place, sample in made.items() if sample is not None}
        if not changed:
            return None
        return gap([matched[place] for place in changed], [self._nll(list(changed.values()))])

    def _classes(self, samples: Sequence[Sample], measured: Measured) -> None:
        if len(self.classes) < 2 or not all(sample.label for sample in samples):
            measured.notes.append(
                "class_accuracy needs labels of at least two classes; this dataset has none"
            )
            return
        if not all(answer_of(sample).startswith(f"{sample.label}:") for sample in samples):
            measured.notes.append(
                "class_accuracy needs answers that begin with `<class>:`; set the captions' "
                'template to "{class}: {text}"'
            )
            return
        measured.class_accuracy = class_accuracy(
            self.model, self.reader, self.tokenizer, self.layout, samples, self.classes
        )

    def captions(self, samples: Sequence[Sample]) -> list[str]:
        """The model's greedy answers."""
        return captions(
            self.model,
            self.reader,
            self.tokenizer,
            self.layout,
            samples,
            max_tokens=self.options.max_tokens,
        )


def _media(samples: Sequence[Sample]) -> list[str]:
    """The media that samples hold, text first."""
    return ["text", *sorted({part.medium for sample in samples for part in sample.media()})]

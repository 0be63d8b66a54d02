"""Samples with one another's media, without some of their media, or with less of them.

What a model learned from a medium shows in how much worse it predicts the same answers then.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from plait.modalities import FrameSampling, MediaPart, Part, Text, Video
from plait.stream import Message, Sample

DERANGEMENT_SEEDS = (1, 2, 3)
"""Each seed gives one fixed exchange of media between samples of other classes."""

_ATTEMPTS = 1000

Change = Callable[[Message, Part], Iterable[Part]]
"""What stands in the place of a part of a message."""


def deranged(samples: Sequence[Sample], seed: int) -> dict[int, Sample]:
    """Samples, by their place, with the media of another of the same kinds and another class.

    Media are exchanged among samples that hold the same kinds in the same order (a picture and a
    sound, say). The class is the sample's label; without one its answer, so that two films of one
    caption count as one class. Where one class holds more than half of a kind, answers are told
    apart instead. A sample without media is never exchanged, and none of a kind of which one
    answer holds more than half.
    """
    kinds: dict[tuple[str, ...], list[int]] = {}
    for place, sample in enumerate(samples):
        kinds.setdefault(tuple(part.medium for part in sample.media()), []).append(place)
    kinds.pop((), None)
    rng = random.Random(seed)
    found: dict[int, Sample] = {}
    for places in kinds.values():
        held = [samples[place] for place in places]
        order = _derangement([class_of(sample) for sample in held], rng)
        if order is None:  # another answer is the next best to another class
            order = _derangement([answer_of(sample) for sample in held], rng)
        for place, other in zip(places, order or (), strict=False):
            found[place] = with_media(samples[place], samples[places[other]].media())
    return dict(sorted(found.items()))


def class_of(sample: Sample) -> str:
    """The sample's label; without one its answer; without either its id."""
    return sample.label or answer_of(sample) or sample.id


def answer_of(sample: Sample) -> str:
    """The text of the last turn, or of bare parts."""
    parts = sample.messages[-1].parts if sample.messages else sample.parts
    return "".join(part.text for part in parts if isinstance(part, Text))


def prompt_text(sample: Sample) -> str:
    """What is written before the answer, without media and without system turns."""
    turns = [message for message in sample.messages[:-1] if message.role != "system"]
    texts = [part.text for turn in turns for part in turn.parts if isinstance(part, Text)]
    return " ".join(" ".join(texts).split())


def _derangement(labels: Sequence[str], rng: random.Random) -> list[int] | None:
    """A permutation that moves every entry to a place of another label."""
    order = list(range(len(labels)))
    if not order or 2 * max(labels.count(label) for label in set(labels)) > len(labels):
        return None
    rng.shuffle(order)
    for _ in range(_ATTEMPTS):
        wrong = [i for i, j in enumerate(order) if labels[i] == labels[j]]
        if not wrong:
            return order
        for i in wrong:
            k = rng.randrange(len(order))
            # Only exchanges that leave both places right, or no worse than they are.
            if labels[i] != labels[order[k]] and labels[k] != labels[order[i]]:
                order[i], order[k] = order[k], order[i]
    return None


def with_media(sample: Sample, media: Sequence[MediaPart]) -> Sample:
    """The sample with its media replaced, in order; both must have the same number."""
    given = iter(media)
    return _changed(sample, lambda _, part: [next(given) if isinstance(part, MediaPart) else part])


def without(sample: Sample, medium: str) -> Sample | None:
    """The sample without one medium; None where it has none of it.

    "text" takes away what is written before the answer: the parts of turns that are not learned.
    """

    def keep(message: Message, part: Part) -> list[Part]:
        if isinstance(part, Text):
            return [part] if medium != "text" or message.role == "assistant" else []
        return [part] if part.medium != medium else []

    changed = _changed(sample, keep)
    return None if changed == sample else changed


def with_single_frames(sample: Sample) -> Sample | None:
    """The sample with one frame of each of its films, the middle one; None where it has none."""

    def still(_: Message, part: Part) -> list[Part]:
        if isinstance(part, Video):
            return [replace(part, sampling=FrameSampling(count=1), sound=None)]
        return [part]

    has_film = any(part.medium == "video" for part in sample.media())
    return _changed(sample, still) if has_film else None


def _changed(sample: Sample, change: Change) -> Sample:
    bare = Message("", sample.parts)
    messages = tuple(
        replace(message, parts=tuple(p for part in message.parts for p in change(message, part)))
        for message in sample.messages
    )
    parts = tuple(p for part in bare.parts for p in change(bare, part))
    return replace(sample, messages=messages, parts=parts)

"""Measures equal what a reader would compute by hand."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from plait.modalities import Audio, FrameSampling, Text, Video
from plait.stream import ItemInputs, Message, Sample, check_placeholders, pack, render
from plait.trainer.build import Built
from plait.trainer.config import EvaluationConfig
from plait.trainer.evaluation import classes as classes_module
from plait.trainer.evaluation import reader as reader_module
from plait.trainer.evaluation.captions import captions
from plait.trainer.evaluation.classes import class_accuracy, prompt_of
from plait.trainer.evaluation.exchanges import (
    DERANGEMENT_SEEDS,
    deranged,
    with_single_frames,
    without,
)
from plait.trainer.evaluation.nll import gap, nll, per_token
from plait.trainer.evaluation.reader import Reader, groups_within
from plait.trainer.evaluation.suite import Suite
from plait.trainer.evaluation.words import word_error_rate
from plait.trainer.sampling.branches import Branches

CLASSES = ["disc", "a big bar", "square"]


def make_reader(lab: Any, built: Built) -> Reader:
    def load(item: Any) -> Any:
        encoder = built.model.media_encoder(item.plan.encoder).encoder
        return ItemInputs(encoder.process(item.part.decode()))

    def read(sample: Sample, for_generation: bool) -> Any:
        document = render(sample, built.tokenizer, built.layout, for_generation)
        check_placeholders(document, built.layout.placeholder_id)
        return document

    return Reader(read, load, workers=1)


def labelled(lab: Any, count: int = 10) -> list[Sample]:
    labels = [CLASSES[number % 3] for number in range(count)]
    return [
        lab.sample(f"{label}: red", "see ", number, label=label)
        for number, label in enumerate(labels)
    ]


def naive_best(lab: Any, built: Built, sample: Sample) -> str:
    """The class whose `<class>:` is likeliest, each as a whole training row of its own."""
    scores = {}
    for name in CLASSES:
        turns = (*prompt_of(sample).messages, Message("assistant", (Text(f"{name}:"),)))
        stream = lab.stream(built, [replace(sample, messages=turns)])
        with torch.no_grad():
            logprobs = built.model.compute(stream).logprobs
        scores[name] = float(logprobs[:-1].sum())  # without the end token
    return max(scores, key=lambda name: scores[name])


@pytest.mark.parametrize("packs", [True, False])
def test_class_accuracy_equals_reading_every_class_alone(
    lab: Any, monkeypatch: pytest.MonkeyPatch, packs: bool
) -> None:
    monkeypatch.setattr(classes_module, "PROMPTS_AT_ONCE", 4)
    built = lab.build(bidirectional=True)
    with torch.no_grad():
        built.model.output_weight.mul_(8)
        built.model.media_encoder("hf_vision").projector.out.weight.mul_(30)
    built.model.backbone.packs = packs
    samples = labelled(lab)
    best = [naive_best(lab, built, sample) for sample in samples]
    # The samples are labelled with what was found for them, but for three.
    truth = [replace(s, label=b) for s, b in zip(samples, best, strict=True)]
    wrong = {name: CLASSES[number - 1] for number, name in enumerate(CLASSES)}
    for number in (0, 4, 9):
        truth[number] = replace(truth[number], label=wrong[best[number]])
    reader = make_reader(lab, built)

    def accuracy(rows: list[Sample]) -> float:
        return class_accuracy(built.model, reader, built.tokenizer, built.layout, rows, CLASSES)

    assert accuracy(truth) == pytest.approx(0.7)
    assert [accuracy([row]) for row in truth] == [float(n not in (0, 4, 9)) for n in range(10)]
    assert len(set(best)) > 1


def test_only_classes_that_can_win_are_read_to_their_end(lab: Any) -> None:
    built = lab.build()
    with torch.no_grad():
        built.model.output_weight.mul_(8)
    names = [[7], [9, 30, 31], [40, 12], [9, 33], [55, 7, 8, 20]]
    documents, inputs = lab.documents(built, lab.samples, for_generation=True)
    loaded = list(zip(documents, inputs, strict=True))
    with torch.no_grad():
        scores = classes_module._scores(built.model, built.layout, loaded, names)
    whole, ceiling = torch.empty_like(scores), torch.empty_like(scores)
    for row, (document, item_inputs) in enumerate(loaded):
        for column, name in enumerate(names):
            alone = Branches(built.model, built.layout, [document], [item_inputs], [1], 8)
            hidden = torch.cat([alone.last_hidden(), alone.push([name], [0])])[:-1]
            steps = built.model.logits(hidden).log_softmax(-1)[range(len(name)), name].detach()
            whole[row, column], ceiling[row, column] = steps.sum(), steps[0]
    read = scores.isfinite()
    torch.testing.assert_close(scores[read], whole[read], rtol=1e-4, atol=1e-4)
    assert torch.equal(scores.argmax(1), whole.argmax(1))
    assert not read.all()
    assert (whole.argmax(1) != ceiling.argmax(1)).any()  # the likeliest beginning is no proof


def test_nll_counts_every_learned_token(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "STREAM_POSITIONS", 60)
    built = lab.build()
    built.model.train()
    samples = lab.samples
    user, answer = samples[2].messages
    samples[2] = replace(samples[2], messages=(user, replace(answer, weight=0.5)))
    sums = nll(built.model, make_reader(lab, built), samples)
    for sample, (loss, weight) in zip(samples, sums, strict=True):
        text = sample.messages[-1].parts[0].text
        tokens = built.tokenizer(text + "<end>", add_special_tokens=False).input_ids
        assert weight == len(tokens) * sample.messages[-1].weight
        documents, inputs = lab.documents(built, [sample])
        with torch.no_grad():
            hidden, _ = built.model.hidden(pack(documents, inputs))
            logits = built.model.logits(hidden[-len(tokens) :]).log_softmax(-1)
        expected = -logits[torch.arange(len(tokens)), torch.tensor(tokens)].sum()
        assert loss == pytest.approx(float(expected) * sample.messages[-1].weight, rel=1e-5)
    total = sum(loss for loss, _ in sums) / sum(weight for _, weight in sums)
    assert per_token(sums) == pytest.approx(total)


@pytest.mark.parametrize("seed", DERANGEMENT_SEEDS)
def test_a_derangement_gives_every_sample_a_picture_of_another_class(lab: Any, seed: int) -> None:
    samples = labelled(lab, 12)
    exchanged = deranged(samples, seed)
    assert list(exchanged) == list(range(12))
    made = list(exchanged.values())
    label_of = {id(sample.media()[0]): sample.label for sample in samples}
    for before, after in zip(samples, made, strict=True):
        assert replace(after, messages=before.messages) == before  # only the picture is another's
        assert label_of[id(after.media()[0])] != before.label
        assert after.messages[-1] == before.messages[-1]
    given = Counter(id(sample.media()[0]) for sample in made)
    assert given == Counter(label_of.keys())
    assert deranged(samples, seed) == exchanged != deranged(samples, seed + 10)


def test_tight_derangements_are_found_and_impossible_ones_are_none(lab: Any) -> None:
    halves = [lab.sample("a", n, label="disc" if n < 5 else "bar") for n in range(10)]
    for seed in range(20):
        made = deranged(halves, seed)
        others = {id(s.media()[0]) for s in halves[5:]}
        assert {id(made[n].media()[0]) for n in range(5)} == others
    assert deranged(halves[:9], 1) == deranged(halves[:1], 1) == deranged([], 1) == {}


def test_samples_without_labels_are_told_apart_by_their_answers(lab: Any) -> None:
    unlabelled = [lab.sample(answer, n) for n, answer in enumerate("abca")]
    for seed in range(9):
        made = deranged(unlabelled, seed)
        owner = {id(s.media()[0]): s.messages[-1] for s in unlabelled}
        assert len(made) == 4
        assert all(owner[id(s.media()[0])] != s.messages[-1] for s in made.values())
    assert deranged([lab.sample("a", n) for n in range(3)], 1) == {}


def test_answers_are_told_apart_where_one_class_is_most_of_the_samples(lab: Any) -> None:
    samples = [lab.sample(f"{n}", n, label="people" if n < 8 else "cars") for n in range(10)]
    owner = {id(s.media()[0]): n for n, s in enumerate(samples)}
    made = deranged(samples, 1)
    assert list(made) == list(range(10))
    assert all(owner[id(sample.media()[0])] != n for n, sample in made.items())


def test_media_are_exchanged_among_samples_of_the_same_kinds(lab: Any) -> None:
    samples = [lab.sample(f"{n}", n) for n in range(4)]
    samples += [lab.sample(f"{n}", n, "and", n + 20) for n in range(4, 7)]
    samples += [lab.sample("none"), lab.sample("three", 1, 2, 3)]
    made = deranged(samples, 1)
    assert list(made) == list(range(7))
    assert all(len(made[n].media()) == len(samples[n].media()) for n in made)


def test_samples_whose_media_cannot_be_exchanged_are_said_so(lab: Any) -> None:
    built = lab.build()
    suite = Suite(built.model, make_reader(lab, built), built.tokenizer, built.layout, ["a"])
    measured = suite.measure([*lab.samples, lab.sample("a", 5, 6, 7)])
    assert measured.shuffled_gap is not None and measured.shuffled_gap.count == 2
    assert measured.notes[0].startswith("2 of 4 samples with media keep their own")
    for samples in (lab.samples[1:3], lab.samples[2:3] * 2):
        measured = suite.measure(samples)
        assert measured.nll_shuffled is None and measured.shuffled_gap is None
        assert measured.notes[0].startswith("nll_shuffled needs")
        assert measured.class_accuracy is None
        assert measured.notes[-1].startswith("class_accuracy needs labels")
        assert measured.nll_matched > 0 and measured.count == len(samples)


def test_the_suite_measures_both_and_derangements_by_their_mean(lab: Any) -> None:
    built = lab.build()
    with torch.no_grad():
        built.model.media_encoder("hf_vision").projector.out.weight.mul_(30)
    reader, samples = make_reader(lab, built), labelled(lab, 6)
    suite = Suite(built.model, reader, built.tokenizer, built.layout, CLASSES)
    measured = suite.measure(samples)
    assert not measured.notes and measured.class_accuracy is not None
    found = [deranged(samples, seed) for seed in DERANGEMENT_SEEDS]
    means = [per_token(nll(built.model, reader, list(made.values()))) for made in found]
    assert measured.nll_shuffled == pytest.approx(sum(means) / 3, rel=1e-6)
    assert measured.nll_shuffled != pytest.approx(measured.nll_matched, rel=1e-6)


def test_captions_are_the_greedy_answers_to_the_prompts(lab: Any) -> None:
    built = lab.build()
    parts = built.model, make_reader(lab, built), built.tokenizer, built.layout
    made = captions(*parts, lab.samples, max_tokens=24)
    assert len(made) == len(lab.samples) and all("<end>" not in text for text in made)
    assert captions(*parts, [], max_tokens=24) == []
    told = [replace(s, messages=s.messages[:1]) for s in lab.samples]
    assert made == captions(*parts, told, max_tokens=24)
    shorter = captions(*parts, told, max_tokens=2)
    assert all(long.startswith(short) for short, long in zip(shorter, made, strict=True))


def test_streams_hold_every_sample_once_within_their_size() -> None:
    lengths = [5, 5, 3, 20, 1, 9, 9]
    groups = list(groups_within(lengths, 10))
    assert [n for group in groups for n in group] == list(range(7))
    assert all(len(g) == 1 or sum(lengths[n] for n in g) <= 10 for g in groups)
    assert groups[0] == [0, 1]


def test_samples_are_loaded_a_few_groups_ahead_at_most(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "STREAM_POSITIONS", 40)
    built = lab.build()
    reader = make_reader(lab, built)
    loaded: list[Any] = []
    load = reader.load
    reader.load = lambda item: (loaded.append(item), load(item))[1]
    samples = labelled(lab, 30)
    groups = reader.streams(samples)
    first, _ = next(groups)
    assert len(loaded) <= 4 * (len(first) + 1) < len(samples)
    held = first + [number for some, _ in groups for number in some]
    assert held == list(range(30))
    assert len(loaded) == 30


def test_classes_that_no_answer_begins_with_are_not_measured(lab: Any) -> None:
    built = lab.build()
    suite = Suite(built.model, make_reader(lab, built), built.tokenizer, built.layout, CLASSES)
    samples = [lab.sample("a red disc", 1, label=CLASSES[n % 3]) for n in range(6)]
    measured = suite.measure(samples)
    assert measured.class_accuracy is None
    assert any("answers that begin with `<class>:`" in note for note in measured.notes)


def test_a_gap_is_the_mean_difference_with_its_paired_interval() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(1, 9, (400,), generator=generator).tolist()
    matched = [(3.0 * w, float(w)) for w in weights]
    noise = torch.randn(2, 400, generator=generator).tolist()
    changed = [
        [(loss + 0.5 * w + n, w) for (loss, w), n in zip(matched, row, strict=True)]
        for row in noise
    ]
    found = gap(matched, changed)
    expected = sum(
        (a + b) / 2 - m for (a, _), (b, _), (m, _) in zip(*changed, matched, strict=True)
    ) / sum(weights)
    assert found.difference == pytest.approx(expected) and found.count == 400
    # The spread of the mean: noise of two averaged rows, over the mean weight of a sample.
    error = (0.5**0.5 / 400**0.5) / (sum(weights) / 400)
    assert found.low == pytest.approx(expected - 1.96 * error, abs=0.4 * error)
    assert found.high == pytest.approx(expected + 1.96 * error, abs=0.4 * error)
    assert gap(matched, [matched]).low == 0.0 == gap(matched, [matched]).high


def test_each_medium_can_be_taken_away(lab: Any) -> None:
    sound = Audio("a.wav")
    film = Video("b.mp4", sound="after")
    user = Message("user", (Text("hear "), sound, Text(" see "), lab.picture(1), film))
    sample = Sample((user, Message("assistant", (Text("a red disc"),))))
    for medium in ("audio", "image", "video"):
        changed = without(sample, medium)
        assert changed is not None
        kept = [part.medium for part in changed.media()]
        assert medium not in kept and len(kept) == 2
        assert changed.messages[0].parts[0] == Text("hear ")
    spoken = without(sample, "text")
    assert spoken is not None and spoken.media() == sample.media()
    assert len(spoken.messages[0].parts) == 3 and spoken.messages[1] == sample.messages[1]
    assert without(lab.samples[2], "image") is None
    still = with_single_frames(sample)
    assert still is not None and with_single_frames(lab.samples[0]) is None
    shown = still.media()[2]
    assert isinstance(shown, Video) and shown.source == film.source
    assert shown.sampling == FrameSampling(count=1) and shown.sound is None


def test_what_is_taken_away_is_measured_over_the_samples_that_have_it(lab: Any) -> None:
    built = lab.build()
    with torch.no_grad():
        built.model.media_encoder("hf_vision").projector.out.weight.mul_(30)
    reader, samples = make_reader(lab, built), lab.samples
    options = EvaluationConfig(without=True, word_error_rate=True, max_tokens=4)
    suite = Suite(built.model, reader, built.tokenizer, built.layout, [], options)
    measured = suite.measure(samples)
    assert {name: found.count for name, found in measured.without.items()} == {
        "text": 4,
        "image": 3,
    }
    matched = nll(built.model, reader, samples)
    blind = [without(sample, "image") for sample in samples]
    seen = [sample for sample in blind if sample is not None]
    kept = [pair for pair, sample in zip(matched, blind, strict=True) if sample is not None]
    difference = per_token(nll(built.model, reader, seen)) - per_token(kept)
    assert measured.without["image"].difference == pytest.approx(difference, rel=1e-5)
    assert measured.single_frame is None
    assert measured.word_error_rate is not None and measured.word_error_rate > 0.5


def test_words_are_compared_as_they_are_spoken() -> None:
    told = ["Please enter your PIN, followed by the pound key.", "Goodbye!"]
    assert word_error_rate(told, [text.upper().replace(",", "") for text in told]) == 0
    assert word_error_rate(told, ["please enter your pin", "good bye"]) == pytest.approx(7 / 10)
    assert word_error_rate(["don't"], ["dont"]) == 1

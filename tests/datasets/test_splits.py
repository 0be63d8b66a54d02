"""Splits: by the hash of ids, near-duplicates together, the same every time."""

import hashlib
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest

from plait.datasets.likeness import group_rows, joined, near_rows, picture_hash
from plait.datasets.records import open_records
from plait.datasets.splits import SplitOptions, Splits, split
from plait.errors import ConfigError, DataError
from plait.modalities import Image, Limits, Text
from plait.stream import Message, Sample


def random_picture(seed: int) -> np.ndarray:
    """Coarse coloured squares: no two seeds are near."""
    squares = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return squares.repeat(6, axis=0).repeat(6, axis=1)


def sample(name: str, *pixels: np.ndarray) -> Sample:
    return Sample(messages=(Message("user", tuple(Image(p) for p in pixels)),), id=name)


def by_hash(samples: Sequence[Sample]) -> list[int]:
    ids = [sample.id for sample in samples]
    return sorted(range(len(ids)), key=lambda row: hashlib.sha256(ids[row].encode()).hexdigest())


def check_partition(splits: Splits, rows: int) -> None:
    assert sorted(splits.train + splits.validation + splits.test) == list(range(rows))


def test_unlike_pictures_are_split_by_the_hash_of_their_ids() -> None:
    samples = [sample(f"class/{n}.png", random_picture(n)) for n in range(60)]
    splits = split(samples, SplitOptions(test=16, validation=6))
    order = by_hash(samples)
    assert splits.test == sorted(order[:16])
    assert splits.validation == sorted(order[16:22])
    assert splits.train == sorted(order[22:])
    assert (splits.moved, splits.notes) == (0, ())
    backwards = split(samples[::-1], SplitOptions(test=16, validation=6))
    assert {samples[::-1][row].id for row in backwards.test} == {samples[r].id for r in splits.test}


@pytest.mark.parametrize("seed", range(5))
def test_near_duplicates_are_never_on_two_sides(seed: int) -> None:
    chance = np.random.default_rng(seed)
    owners = chance.integers(0, 20, 50)  # many rows show one of 20 pictures
    samples = []
    for row, owner in enumerate(owners):
        pixels = random_picture(int(owner)).astype(int) + chance.integers(-2, 3, (48, 48, 3))
        samples.append(sample(f"{seed}/{row}", pixels.clip(0, 255).astype(np.uint8)))
    options = SplitOptions(test=5, validation=4)
    splits = split(samples, options)
    check_partition(splits, 50)
    sides = [splits.train, splits.validation, splits.test]
    for owner in range(20):
        assert sum(any(owners[row] == owner for row in side) for side in sides) <= 1
    order = by_hash(samples)
    assert set(order[:5]) <= set(splits.test)
    rest = [row for row in order if row not in splits.test]
    assert set(rest[:4]) <= set(splits.validation)
    assert splits.moved == len(splits.test) + len(splits.validation) - 9
    assert split(samples, options) == splits
    loose = split(samples, SplitOptions(test=5, validation=4, near_duplicate_bits=None))
    assert loose.moved == 0
    assert loose.test == sorted(order[:5])


def test_any_picture_of_a_row_joins_it() -> None:
    one, two, three = (random_picture(n) for n in range(3))
    samples = [sample("a", one, two), sample("b", two, three), sample("c", three)]
    samples += [sample(f"other{n}", random_picture(10 + n)) for n in range(7)]
    samples.append(Sample(messages=(Message("user", ()),), id="no picture"))
    first = by_hash(samples)[0]
    splits = split(samples, SplitOptions(test=1))
    assert splits.test == ([0, 1, 2] if first in (0, 1, 2) else [first])
    assert split(samples[:4] + samples[:1], SplitOptions(test=2)).moved >= 1


def drawn(draw: str) -> np.ndarray:
    page = PIL.Image.new("RGB", (120, 120), "white")
    pen = PIL.ImageDraw.Draw(page)
    if draw in ("bar", "letter F"):
        pen.rectangle((0, 0, 30, 119), "black")
    if draw == "letter F":
        pen.rectangle((0, 0, 100, 25), "black")
        pen.rectangle((0, 50, 80, 70), "black")
    if draw.endswith("flag"):
        pen.polygon([(30, 10), (110, 20), (105, 70), (20, 60)], draw.split()[0])
        pen.line((35, 0, 5, 119), "sienna", 4)
    if draw == "black":
        pen.rectangle((0, 0, 119, 119), "black")
    if draw in ("ball", "moon"):
        pen.ellipse((5, 5, 115, 115), "orange" if draw == "ball" else "white", "black", 2)
    return np.asarray(page)


def near(one: np.ndarray, other: np.ndarray) -> bool:
    edges, brightness = (
        np.stack(s) for s in zip(picture_hash(one), picture_hash(other), strict=True)
    )
    bits = SplitOptions().near_duplicate_bits
    assert bits is not None
    (_, close), _ = near_rows(edges, brightness, bits)
    return close.tolist() == [1]


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("empty", "empty", True),
        ("empty", "black", False),
        ("empty", "bar", False),
        ("bar", "letter F", False),
        ("ball", "moon", False),
        ("red flag", "firebrick flag", True),
        ("red flag", "ball", False),
    ],
)
def test_what_is_near(one: str, other: str, expected: bool) -> None:
    assert near(drawn(one), drawn(other)) is expected


def test_small_changes_are_near_and_mirrors_are_not() -> None:
    pixels = random_picture(1)
    picture = PIL.Image.fromarray(pixels)
    assert near(pixels, np.asarray(picture.resize((300, 200), PIL.Image.Resampling.BICUBIC)))
    assert not near(pixels, pixels[:, ::-1])


def test_near_pairs_and_groups_agree_with_the_definition() -> None:
    chance = np.random.default_rng(0)
    edges = chance.integers(0, 2**64, (6, 4), dtype=np.uint64).repeat(6, axis=0)
    edges[:, 0] ^= chance.integers(0, 256, 36, dtype=np.uint64)
    light = chance.integers(0, 120, (36, 16)).astype(np.int16)
    bits = np.unpackbits(edges.view(np.uint8), axis=1).astype(int)
    expected = [
        (i, j)
        for i in range(36)
        for j in range(i + 1, 36)
        if (bits[i] != bits[j]).sum() <= 4 and np.abs(light[i] - light[j]).max() <= 96
    ]
    rows = list(near_rows(edges, light, 4))
    assert [(row, other) for row, close in rows for other in close.tolist()] == expected
    assert expected
    assert joined(6, [(4, [3]), (3, [1]), (5, [0]), (2, [])]) == [0, 1, 2, 1, 1, 0]
    leaders = joined(36, rows)
    for one, other in expected:
        assert leaders[one] == leaders[other] <= one


def test_one_placeholder_in_many_rows_is_read_once_and_held_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two million pairs are near, and so are 500 other pictures of few pixels each."""
    PIL.Image.new("RGB", (8, 8), "grey").save(tmp_path / "missing.png")
    read: list[str] = []
    decode = Image.decode

    def counted(image: Image, *limits: Limits) -> np.ndarray:
        read.append(image.file)
        return decode(image, *limits)

    monkeypatch.setattr(Image, "decode", counted)
    placeholder = Image(tmp_path / "missing.png")
    parts = [placeholder] * 2000 + [Image(np.full((2, 2, 3), n % 5, np.uint8)) for n in range(500)]
    samples = [Sample(parts=(part,), id=str(n)) for n, part in enumerate(parts)]
    tracemalloc.start()
    groups, broken = group_rows(samples, 12, Limits())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert groups == [0] * 2000 + [2000] * 500 and not broken
    assert read.count(placeholder.file) == 1
    assert peak < 20e6, "the pairs are not held"


@pytest.mark.parametrize(
    ("rows", "test", "validation", "left"),
    [(10, 160, 60, (3, 1)), (10, 3, 2, (3, 2)), (10, 3, 3, (2, 2)), (0, 5, 5, (0, 0))],
)
def test_more_than_half_is_scaled_down_and_said(
    rows: int, test: int, validation: int, left: tuple[int, int]
) -> None:
    samples = [sample(f"{n}", random_picture(n)) for n in range(rows)]
    splits = split(samples, SplitOptions(test=test, validation=validation))
    assert (len(splits.test), len(splits.validation)) == left
    check_partition(splits, rows)
    scaled = left != (test, validation)
    assert len(splits.notes) == scaled
    if scaled:
        assert f"to {left[0]} and {left[1]}" in splits.notes[0]


def test_a_split_that_leaves_no_training_rows_is_refused() -> None:
    same = [sample(f"{n}", random_picture(0)) for n in range(8)]
    with pytest.raises(DataError, match=r"leave rows to train on.*all 8"):
        split(same, SplitOptions(test=2))


class Broken(Sequence[Sample]):
    """Samples of which every fourth row cannot be read."""

    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    @overload
    def __getitem__(self, row: int) -> Sample: ...
    @overload
    def __getitem__(self, row: slice) -> list[Sample]: ...
    def __getitem__(self, row: int | slice) -> Sample | list[Sample]:
        if isinstance(row, int) and row % 4 == 0:
            raise DataError("broken")
        return self.samples[row]


def test_rows_and_pictures_that_cannot_be_read_stay_for_the_loader() -> None:
    samples = [sample(f"{n}", random_picture(n)) for n in range(19)]
    samples.append(Sample(messages=(Message("user", (Image("missing.png"),)),), id="missing"))
    splits = split(Broken(samples), SplitOptions(test=5, validation=2))
    check_partition(splits, 20)
    assert set(range(0, 20, 4)) <= set(splits.train)
    assert (len(splits.test), len(splits.validation)) == (5, 2)
    assert splits.notes == (
        "1 pictures cannot be decoded and were compared with none",
        "5 rows cannot be read and were left in train",
    )


def test_progress_counts_every_picture_of_a_real_folder(tmp_path: Path) -> None:
    for n in range(6):
        PIL.Image.fromarray(random_picture(n)).save(tmp_path / f"{n}.png")
        (tmp_path / f"{n}.txt").write_text("x")
    seen: list[tuple[int, int]] = []
    records = open_records(tmp_path)
    split(records, SplitOptions(test=2), progress=lambda done, count: seen.append((done, count)))
    assert seen == [(n, 12) for n in range(1, 13)], "each is hashed, then compared"


def said(name: str, answer: str, label: str = "") -> Sample:
    turns = (Message("user", (Text("what?"),)), Message("assistant", (Text(answer),)))
    return Sample(messages=turns, id=name, label=label)


def test_the_documents_of_a_group_stay_on_one_side() -> None:
    pairs = [
        Sample(messages=(Message("assistant", (Text(side),)),), id=f"{row}-{side}", group=row)
        for row in range(40)
        for side in ("chosen", "rejected")
    ]
    splits = split(pairs, SplitOptions(test=10, validation=6))
    check_partition(splits, 80)
    for held in (splits.train, splits.validation, splits.test):
        assert {row ^ 1 for row in held} == set(held)
    assert len(splits.test) >= 10


def test_equal_answers_stay_on_one_side_where_asked() -> None:
    answers = [f"Answer {n % 20}" + ("." if n >= 20 else "") for n in range(60)]
    samples = [
        said(f"{n}", answer.upper() if n >= 40 else answer) for n, answer in enumerate(answers)
    ]
    splits = split(samples, SplitOptions(by="answer", test=7, validation=7))
    check_partition(splits, 60)
    sides = [splits.train, splits.validation, splits.test]
    assert [len(side) for side in sides] == [42, 9, 9], "each answer has three rows"
    for n in range(20):
        assert sum(any(row % 20 == n for row in side) for side in sides) == 1
    hashes = {hashlib.sha256(f"answer {n}".encode()).hexdigest(): n for n in range(20)}
    chosen = [hashes[key] for key in sorted(hashes)[:3]]
    assert sorted({row % 20 for row in splits.test}) == sorted(chosen)
    assert splits.moved == 4
    by_id = split(samples, SplitOptions(test=7, validation=7))
    assert by_id.test == sorted(by_hash(samples)[:7])


def test_equal_labels_stay_on_one_side_and_rows_without_one_are_split_by_id() -> None:
    samples = [said(f"{n}", f"{n}", label=f"class {n % 4}" if n < 20 else "") for n in range(40)]
    splits = split(samples, SplitOptions(by="label", test=8, validation=5))
    check_partition(splits, 40)
    sides = [splits.train, splits.validation, splits.test]
    for label in range(4):
        assert sum(any(r < 20 and r % 4 == label for r in side) for side in sides) == 1
    assert len({row for side in sides[:2] for row in side if row >= 20}) > 0


def test_an_answer_and_a_picture_both_join_rows() -> None:
    one, other = random_picture(1), random_picture(2)
    rows = [("a", one, "x"), ("b", one, "y"), ("c", other, "y"), ("d", other, "z")]
    samples = [
        Sample(messages=(*sample(name, pixels).messages, *said("", answer).messages), id=name)
        for name, pixels, answer in rows
    ]
    samples += [said(f"other {n}", f"other {n}") for n in range(20)]
    splits = split(samples, SplitOptions(by="answer", test=8))
    held = [row in splits.test for row in range(4)]
    assert all(held) or not any(held)


def test_shares_hold_out_the_same_answers_of_every_dataset() -> None:
    many = [said(f"a{n}", f"answer {n % 400}") for n in range(1000)]
    few = [said(f"b{n}", f"Answer {n}!") for n in range(0, 400, 7)]
    options = SplitOptions(by="answer", test=0.2, validation=0.1)
    both = [split(many, options), split(few, options)]
    numbers = [[n % 400 for n in range(1000)], list(range(0, 400, 7))]
    sides = [
        [{numbers[d][row] for row in getattr(both[d], side)} for d in range(2)]
        for side in ("train", "validation", "test")
    ]
    for one, other in sides:
        assert other <= one and other, "each answer is on the side it has elsewhere"
    assert [len(one) for one, _ in sides] == [pytest.approx(n, abs=25) for n in (280, 40, 80)]
    assert both[0].moved == 0, "equal answers have one hash"
    everything = split(many, SplitOptions(by="answer"))
    assert (everything.test, everything.validation) == ([], [])


@pytest.mark.parametrize(
    ("test", "validation", "rule"),
    [
        (1.0, 0, "a share below 1"),
        (float("nan"), 0, "a share below 1"),
        (0.2, 10, "both be shares"),
        (0.3, 0.3, "leave half"),
    ],
)
def test_shares_that_cannot_be_are_refused(test: float, validation: float, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        SplitOptions(test=test, validation=validation)


def test_an_unknown_way_to_split_offers_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'answer'"):
        SplitOptions(by="answers")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options", [{"test": -1}, {"validation": -1}, {"near_duplicate_bits": 257}]
)
def test_options_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"split\."):
        SplitOptions(**options)

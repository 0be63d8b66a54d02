"""Planning: lengths from headers, rows refused by rule, and plans that are pure functions."""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from plait.datasets.columns import Measured, MeasuredRow, RowCounts
from plait.datasets.planning import counts_of, measure, screen
from plait.datasets.policy import FailurePolicy
from plait.datasets.schedule import Schedule, summarise
from plait.datasets.settings import LoaderSettings, PackLimits
from plait.errors import DataError, FailureBudgetError, MediaError, Origin
from plait.modalities import Image, Text, Video
from plait.stream import Document, Item, ItemPlan, Sample, Span


def sample(row: int, text: str = "abc", group: int | None = None) -> Sample:
    return Sample(parts=(Text(text),), origin=Origin("d", row, f"{row}.png"), group=group)


def plan_epoch(
    lengths: Sequence[int], *, seed: int, epoch: int, groups: Sequence[int | None] | None = None,
    **settings: Any,
) -> list[tuple[int, ...]]:  # fmt: skip
    """The packs of rows of these lengths, as places among them."""
    rows = [
        MeasuredRow(
            row, Origin("d", row), RowCounts(positions={"text": int(length)}),
            groups[row] if groups else None,
        )
        for row, length in enumerate(lengths)
    ]  # fmt: skip
    schedule = Schedule(Measured.of(rows), LoaderSettings(seed=seed, **settings))
    return list(schedule.block(epoch))


def by_letters(sample: Sample) -> RowCounts:
    part = sample.parts[0]
    assert isinstance(part, Text)
    if "!" in part.text:
        raise MediaError("a picture must be whole", Origin(file="inner.png"))
    return RowCounts(positions={"text": len(part.text), "image": 9}, media_end=9, learned=10)


def skip(**settings: int | None) -> FailurePolicy:
    limits: dict[str, int | None] = {"max_consecutive": None, "max_total": None}
    return FailurePolicy("skip", too_long="drop", **(limits | settings))


def test_measure_keeps_order_and_captures_errors_by_row() -> None:
    samples = [sample(row, "x" * (row % 7 + 1) + "!" * (row % 10 == 3)) for row in range(100)]
    policy = skip()
    found = measure(samples, by_letters, policy=policy, workers=4)
    assert [r.row for r in found.rows] == [row for row in range(100) if row % 10 != 3]
    assert [r.length for r in found.rows] == [row % 7 + 10 for row in range(100) if row % 10 != 3]
    assert [r.row for r in found.refused] == list(range(3, 100, 10))
    assert policy.total == 10
    assert found.refused[0].origin == Origin("d", 3, "inner.png")
    assert found.refused[0].status == "broken"
    again = measure(samples, by_letters, policy=skip(), workers=0)
    assert list(again.rows) == list(found.rows)
    assert again.refused == found.refused


def test_measure_raises_what_the_policy_raises() -> None:
    samples = [sample(row, "!" if row > 4 else "a") for row in range(40)]
    with pytest.raises(MediaError, match=r"dataset d, row 5, file inner.png"):
        measure(samples, by_letters)
    with pytest.raises(FailureBudgetError, match="at most 3"):
        measure(samples, by_letters, policy=skip(max_total=3))
    assert not [t for t in threading.enumerate() if t.name.startswith("plait-ahead")]


def test_an_error_that_is_not_of_the_data_is_not_swallowed() -> None:
    def bug(sample: Sample) -> RowCounts:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        measure([sample(0)], bug, policy=skip())


def test_rows_that_cannot_be_parsed_are_captured() -> None:
    class Torn(list[Sample]):
        def __getitem__(self, row: int) -> Sample:  # type: ignore[override]
            if row == 1:
                raise DataError("a row must be JSON", Origin("d"))
            return super().__getitem__(row)

    found = measure(Torn([sample(0), sample(1), sample(2)]), by_letters, policy=skip())
    assert [(r.row, r.origin) for r in found.refused] == [(1, Origin("d", 1))]


def test_rows_that_no_pack_can_hold() -> None:
    samples = [sample(0), sample(1, "x" * 90), sample(2, group=1), sample(3, "y" * 80, group=1)]
    measured = measure(samples, by_letters)
    kept = screen(measured, limits=PackLimits(capacity=95), policy=skip())
    assert [r.row for r in kept.rows] == [0]
    assert [(r.row, r.status) for r in kept.refused] == [(n, "dropped") for n in (1, 2, 3)]
    assert "an item longer than the pack: 99 positions" in kept.refused[0].reason
    assert "a group of 2 items longer than the pack" in kept.refused[1].reason
    with pytest.raises(DataError, match=r"longer than the pack.*row 1"):
        screen(measured, limits=PackLimits(capacity=95), policy=FailurePolicy())
    few = screen(measured, limits=PackLimits(capacity=200, max_documents=1), policy=skip())
    assert [r.row for r in few.rows] == [0, 1]


def test_a_group_with_a_broken_row_goes_whole() -> None:
    samples = [sample(0), sample(1, group=5), sample(2, "!", group=5), sample(3, group=6)]
    kept = screen(
        measure(samples, by_letters, policy=skip()), limits=PackLimits(capacity=99), policy=skip()
    )
    assert [r.row for r in kept.rows] == [0, 3]
    assert [(r.row, r.status) for r in kept.refused] == [(1, "dropped"), (2, "broken")]
    assert kept.refused[0].reason == "row 2 of its group cannot be used"


def test_a_plan_is_a_pure_function_of_lengths_seed_and_epoch() -> None:
    lengths = [n % 31 + 1 for n in range(500)]
    plan = plan_epoch(lengths, seed=3, epoch=2, capacity=100)
    np.random.seed(99)
    assert plan_epoch(lengths, seed=3, epoch=2, capacity=100) == plan
    assert sorted(row for pack in plan for row in pack) == list(range(500))
    others = [
        plan_epoch(lengths, seed=3, epoch=3, capacity=100),
        plan_epoch(lengths, seed=4, epoch=2, capacity=100),
        plan_epoch(lengths, seed=2, epoch=3, capacity=100),
    ]
    assert all(other != plan for other in others)


def test_a_plan_is_the_same_in_every_process() -> None:
    plan = plan_epoch([5, 9, 2, 7, 3, 8, 1, 4], seed=3, epoch=2, capacity=12)
    assert plan == [(1, 4), (3,), (7, 0, 2, 6), (5,)], (
        "resuming an old run needs the order that it began with"
    )


def test_without_shuffling_rows_keep_their_order() -> None:
    plan = plan_epoch([10] * 12, seed=0, epoch=1, capacity=40, shuffle=False)
    assert plan == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11)]


def test_groups_are_shuffled_whole() -> None:
    groups = [n // 2 if n < 40 else None for n in range(60)]
    plan = plan_epoch([7] * 60, seed=1, epoch=0, capacity=50, groups=groups, max_documents=5)
    place = {row: number for number, pack in enumerate(plan) for row in pack}
    assert all(place[n] == place[n + 1] for n in range(0, 40, 2))
    assert max(len(pack) for pack in plan) <= 5


def test_counts_are_read_off_the_document() -> None:
    item = Item(Image("a.png"), ItemPlan("tower", 4, (1, 2, 2)))
    ids = np.zeros(10, dtype=np.int64)
    document = Document(ids, ids, ids.astype(np.float32), ids, (Span(1, 4, "tower", 0),), (item,))
    assert counts_of(document) == RowCounts(
        positions={"text": 6, "image": 4}, patches=4, media_end=5, learned=11
    )


def test_frames_are_those_that_are_read_whatever_is_pooled_of_them() -> None:
    film = Video([np.zeros((8, 8, 3), np.uint8)])
    item = Item(film, ItemPlan("tower", 2, (2, 1, 1), frames=8))
    ids = np.zeros(3, dtype=np.int64)
    document = Document(ids, ids, ids.astype(np.float32), ids, (Span(0, 2, "tower", 0),), (item,))
    assert counts_of(document).frames == 8 and counts_of(document).positions["video"] == 2


def test_the_summary_adds_up() -> None:
    samples = [sample(row, "x" * 11) for row in range(9)] + [sample(9, "!"), sample(10, "z" * 99)]
    measured = screen(
        measure(samples, by_letters, policy=skip()), limits=PackLimits(capacity=45), policy=skip()
    )
    packs = Schedule(measured, LoaderSettings(capacity=45)).block(0)
    summary = summarise(measured, packs, limits=PackLimits(capacity=45))
    assert summary.samples == {"d": 9}
    assert summary.positions == {"text": 99, "image": 81}
    assert (summary.packs, summary.largest_pack) == (5, 40)
    assert summary.fill == pytest.approx(180 / (5 * 45))
    assert summary.reasons() == {
        "broken": {"a picture must be whole": 1},
        "dropped": {"an item longer than the pack: 108 positions, and a pack holds 45": 1},
    }
    assert summarise(Measured.of(()), [], limits=PackLimits(capacity=45)).fill == 0.0

"""Plans under several budgets, by both packers, and their split over ranks."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plait.datasets.columns import Measured, MeasuredRow, RowCounts
from plait.datasets.planning import costs_of, screen
from plait.datasets.policy import FailurePolicy
from plait.datasets.schedule import Schedule, over_ranks
from plait.datasets.settings import LoaderSettings
from plait.errors import ConfigError, DataError, Origin

ROOT = Path(__file__).resolve().parents[2]


def measured(seed: int, count: int = 400, grouped: bool = True) -> Measured:
    r = np.random.default_rng(seed)
    rows = []
    for row in range(count):
        text, pictures, film = r.integers(1, 60), 16 * r.integers(0, 3), 8 * r.integers(0, 3)
        group = int(r.integers(0, 400)) if grouped and row % 3 == 0 else None
        rows.append(
            MeasuredRow(
                row,
                Origin("d", row),
                RowCounts(
                    positions={"text": int(text), "image": int(pictures), "video": int(film)},
                    patches=int(pictures),
                    frames=int(film) // 8,
                    media_end=int(pictures + film),
                ),
                None if group is None else ("d", group),
                str(row),
            )
        )
    return Measured.of(rows)


BUDGETS: list[dict[str, Any]] = [
    {},
    {"max_documents": 5},
    {"max_patches": 96},
    {"max_frames": 4},
    {"max_squares": 30_000},
    {"max_documents": 12, "max_patches": 96, "max_frames": 4, "max_squares": 30_000},
]


@pytest.mark.parametrize("packing", ["stream", "decreasing"])
@pytest.mark.parametrize("budgets", BUDGETS, ids=lambda budgets: "+".join(budgets) or "positions")
def test_no_budget_is_exceeded_and_every_row_is_packed_once(
    packing: Any, budgets: dict[str, Any]
) -> None:
    settings = LoaderSettings(capacity=400, seed=3, packing=packing, **budgets)
    policy = FailurePolicy("skip", too_long="drop")
    rows = screen(measured(1), limits=settings, policy=policy)
    most = np.array(list(settings.given().values()))
    for epoch in range(3):
        block = Schedule(rows, settings).block(epoch)
        assert sorted(place for pack in block for place in pack) == list(range(len(rows)))
        costs = costs_of(rows, settings)
        assert all((costs[list(pack)].sum(axis=0) <= most).all() for pack in block)
        again = Schedule(rows, settings).block(epoch)
        assert list(again) == list(block)
    assert list(Schedule(rows, settings).block(0)) != list(block)


@pytest.mark.parametrize("packing", ["stream", "decreasing"])
def test_groups_stay_in_one_pack(packing: Any) -> None:
    settings = LoaderSettings(capacity=500, packing=packing, max_frames=9)
    rows = screen(measured(2), limits=settings, policy=FailurePolicy("skip", too_long="drop"))
    group = rows.columns["group"]
    for pack in (block := Schedule(rows, settings).block(0)):
        for held in set(group[list(pack)].tolist()) - {-1}:
            assert set(np.flatnonzero(group == held)) <= set(pack)
    assert len(block) > 10


def test_what_binds_is_full() -> None:
    rows = measured(5, 3000, grouped=False)
    for budgets, name in [({"max_patches": 64}, "patches"), ({"max_squares": 60_000}, "squares")]:
        for packing in ("stream", "decreasing"):
            settings = LoaderSettings(capacity=2000, packing=packing, **budgets)  # type: ignore[arg-type]
            kept = screen(rows, limits=settings, policy=FailurePolicy("skip", too_long="drop"))
            block = Schedule(kept, settings).block(0)
            costs = costs_of(kept, settings)[:, list(settings.given()).index(name)]
            assert costs.sum() / len(block) > 0.9 * settings.given()[name]


def test_decreasing_fills_no_worse() -> None:
    rows = measured(4, 2000, grouped=False)
    packs = [
        len(Schedule(rows, LoaderSettings(capacity=128, packing=packing)).block(0))  # type: ignore[arg-type]
        for packing in ("decreasing", "stream")
    ]
    assert packs[0] <= packs[1]
    with pytest.raises(ConfigError, match="packing is"):
        LoaderSettings(capacity=1, packing="best")  # type: ignore[arg-type]


def test_a_sample_waits_for_no_more_packs_than_the_window() -> None:
    settings = LoaderSettings(capacity=120, window=20, shuffle=False)
    seen, left = 0, set(range(600))
    for pack in Schedule(measured(6, 600, grouped=False), settings).block(0):
        assert max(pack) < seen + 20, "nothing is read too far ahead"
        assert pack[0] == min(left), "the oldest never waits behind another"
        seen += len(pack)
        left -= set(pack)
    with pytest.raises(DataError, match="over a budget"):
        Schedule(measured(6, 600), LoaderSettings(capacity=60))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("grouped", [False, True])
def test_ranks_have_equally_many_packs_and_all_rows_once(ranks: int, grouped: bool) -> None:
    rows = measured(7, 500, grouped)
    block = Schedule(rows, LoaderSettings(capacity=700)).block(1)
    shares = over_ranks(block, rows, ranks)
    assert len({len(packs) for packs in shares}) == 1
    held = sorted(place for packs in shares for pack in packs for place in pack)
    assert held == list(range(500))
    assert shares == over_ranks(block, rows, ranks)
    lengths, group = rows.lengths, rows.columns["group"]
    totals = [sum(int(lengths[list(pack)].sum()) for pack in packs) for packs in shares]
    assert max(totals) - min(totals) <= 700
    for packs in shares:
        for pack in packs:
            assert lengths[list(pack)].sum() <= 700
            for one in set(group[list(pack)].tolist()) - {-1}:
                assert set(np.flatnonzero(group == one)) <= set(pack)
    if ranks == 1:
        assert shares == [list(block)]


def test_ranks_without_enough_rows_step_with_nothing() -> None:
    rows = measured(8, 3, grouped=False)
    shares = over_ranks([(0, 1), (2,)], rows, 4)
    assert sorted(len(packs) for packs in shares) == [1, 1, 1, 1]
    assert sorted(pack for packs in shares for pack in packs) == [(), (0,), (1,), (2,)]


def test_columns_give_back_the_rows_that_went_in() -> None:
    rows = [
        MeasuredRow(3, Origin("a", 3), RowCounts(positions={"text": 4}), id="x" * 40),
        MeasuredRow(7, Origin("b", None, "é.png"), RowCounts(
            positions={"text": 4, "audio": 2}, patches=1, frames=2, media_end=3, learned=4,
        ), ("b", 1), "y"),
    ]  # fmt: skip
    found = Measured.of(rows)
    assert list(found.rows) == rows
    assert found.rows[-1] == rows[1]
    assert found.lengths.tolist() == [4, 6]
    assert found.datasets == ("a", "b")


def test_the_benchmark_checks_itself() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.planning", "--json", "--rows", "20000"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    facts = json.loads(found.stdout.splitlines()[-1])
    assert facts["fill"]["one"] > 0.999
    assert facts["fill"]["decreasing"] > 0.999
    assert facts["fill"]["four"] > 0.97
    assert max(facts["memory_mb"].values()) < 200

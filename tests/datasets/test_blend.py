"""Mixtures: shares to the row, each dataset in its own epochs, the same from any place on."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from plait.datasets.blend import Draws, Joined, Pool, Share, draw, drawn_before
from plait.datasets.ledger import Ledger, count
from plait.datasets.loader import Loader, LoaderSettings, Pack
from plait.datasets.policy import FailurePolicy
from plait.errors import CheckpointError, ConfigError, DataError, MediaError, Origin
from plait.modalities import Image
from plait.stream import Document, Item, ItemInputs, ItemPlan, Sample

SIZES = {"letters": 30, "stamps": 12, "films": 7}
WEIGHTS = {"letters": 1.0, "stamps": 2.0, "films": 0.5}


def pools(**epochs: int) -> list[Pool]:
    first, found = 0, []
    for name, size in SIZES.items():
        pool = Pool(
            name=name, first=first, units=size, weight=WEIGHTS[name], epochs=epochs.get(name)
        )
        found.append(pool)
        first += size
    return found


def pairs(drawn: Draws) -> list[tuple[int, int]]:
    return list(zip(drawn.units.tolist(), drawn.epochs.tolist(), strict=True))


def test_at_every_point_the_shares_are_right_to_within_a_row() -> None:
    drawn = draw(pools(), 0, 700, seed=1)
    names = np.searchsorted([30, 42], drawn.units, side="right")
    for total in range(1, 701):
        counts = np.bincount(names[:total], minlength=3)
        assert np.abs(counts - total * np.array([1, 2, 0.5]) / 3.5).max() <= 1


def test_a_stretch_is_the_same_from_wherever_it_is_computed() -> None:
    whole = pairs(draw(pools(stamps=3), 0, 400, seed=1))
    for size in (1, 7, 49):
        parts = [draw(pools(stamps=3), at, at + size, seed=1) for at in range(0, 392, size)]
        assert [pair for part in parts for pair in pairs(part)] == whole[: 392 // size * size]
    assert pairs(draw(pools(stamps=3), 0, 400, seed=2)) != whole


def test_no_row_comes_twice_in_an_epoch_and_epochs_follow_one_another() -> None:
    drawn = pairs(draw(pools(), 0, 1000, seed=3))
    assert len(set(drawn)) == 1000
    for first, size in ((0, 30), (30, 12), (42, 7)):
        own = [(unit, epoch) for unit, epoch in drawn if first <= unit < first + size]
        assert [epoch for _, epoch in own] == [n // size for n in range(len(own))]
        orders = [[u for u, e in own if e == epoch] for epoch in range(3)]
        assert orders[0] != orders[1] != orders[2]
        assert all(sorted(order) == list(range(first, first + size)) for order in orders)


def test_an_order_is_of_seed_dataset_and_epoch_alone() -> None:
    def letters(given: list[Pool]) -> list[int]:
        return [unit for unit, epoch in pairs(draw(given, 0, 600, seed=3)) if unit < 30][:60]

    fewer = pools()[:2]
    heavier = [*pools()[:1], *(Pool(name=p.name, first=p.first, units=p.units, weight=9.0)
                               for p in pools()[1:])]  # fmt: skip
    assert letters(pools()) == letters(fewer)
    assert letters(heavier) == letters(fewer)[: len(letters(heavier))]


def test_an_exhausted_dataset_leaves_its_share_to_the_others() -> None:
    drawn = pairs(draw(pools(letters=2, stamps=1, films=10), 0, 500, seed=0))
    assert Counter(np.searchsorted([30, 42], [u for u, _ in drawn], side="right").tolist()) == {
        0: 60, 1: 12, 2: 70,
    }  # fmt: skip
    after = [unit for unit, _ in drawn[24:96]]  # the stamps have ended, the letters have not
    assert sum(unit < 30 for unit in after) == pytest.approx(48, abs=1)
    assert drawn_before(pools(letters=2, stamps=1, films=10), 10**9) == [60, 12, 70]


def test_begun_epochs_are_told_once() -> None:
    blocks = [draw(pools(films=4), at, at + 49, seed=0) for at in range(0, 490, 49)]
    begun = Counter(pair for block in blocks for pair in block.begun)
    assert set(begun.values()) == {1}
    drawn = {(0 if u < 30 else 1 if u < 42 else 2, e) for b in blocks for u, e in pairs(b)}
    assert set(begun) == drawn


def test_joined_sequences_are_numbered_through() -> None:
    joined = Joined([[Sample(id="a")], [], [Sample(id="b"), Sample(id="c")]])
    assert [sample.id for sample in joined] == ["a", "b", "c"]
    assert joined[-1].id == "c"
    assert [sample.id for sample in joined[1:]] == ["b", "c"]
    with pytest.raises(IndexError):
        joined[3]


def test_shares_are_checked() -> None:
    for wrong in ({"weight": 0.0}, {"weight": float("inf")}, {"epochs": 0}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))}.*dataset a"):
            Share(name="a", rows=range(3), **wrong)  # type: ignore[arg-type]


BROKEN = {("stamps", 3), ("letters", 17)}


def render(sample: Sample) -> Document:
    number = int(sample.id.split("/")[1])
    ids = np.arange(5 + number % 9) + 100 * number
    item = Item(sample.media()[0], ItemPlan("tower", 1, (1, 1, 1)), sample.view, sample.origin)
    return Document(ids, ids, np.ones(len(ids), np.float32), ids, items=(item,))


def load(item: Item) -> ItemInputs:
    if (item.origin.dataset, item.origin.row) in BROKEN:
        raise MediaError("a picture must be whole", Origin(file="x.png"))
    return ItemInputs({"pixels": torch.tensor([item.origin.row or 0, item.view])})


def blended(path: Path, most: dict[str, int] | None = None, **settings: Any) -> Loader:
    parts, shares, start = [], [], 0
    for name, size in SIZES.items():
        parts.append([
            Sample(id=f"{name}/{row}", parts=(Image(f"{row}.png"),), origin=Origin(name, row))
            for row in range(size)
        ])  # fmt: skip
        rows = range(start, start + size)
        shares.append(
            Share(name=name, rows=rows, weight=WEIGHTS[name], epochs=(most or {}).get(name))
        )
        start += size
    held_out = {2, 31, 44}
    wanted = {"capacity": 40, "seed": 1, "views": 2, "epochs": 6} | settings
    return Loader(
        Joined(parts), [row for row in range(start) if row not in held_out], render, load,
        LoaderSettings(**wanted), FailurePolicy("skip", max_total=None), Ledger(path),
        shares=shares,
    )  # fmt: skip


def facts(given: Pack) -> tuple[Any, ...]:
    views = [i.inputs["pixels"].tolist() for (i,) in given.inputs if i.inputs]
    return given.epoch, given.index, given.rows, views


def test_the_ledger_has_each_row_once_in_the_epochs_of_its_dataset(tmp_path: Path) -> None:
    loader = blended(tmp_path / "l")
    packs = list(loader)
    assert any(len({name_of(row) for row in pack.rows}) == 3 for pack in packs), (
        "datasets meet in one pack"
    )
    loader.ledger.close()
    summary = count(tmp_path / "l")
    assert not summary.twice
    lines = Ledger(tmp_path / "l").path.read_text().splitlines()
    stamps = [line for line in lines if '"stamps"' in line]
    drawn = 6 * 46
    whole = int(drawn * 2 / 3.5) // 11
    for epoch in range(whole):
        own = [line for line in stamps if line.startswith(f'{{"epoch": {epoch},')]
        kinds = Counter(line.split('"status": "')[1].split('"')[0] for line in own)
        assert kinds == {"used": 10, "broken": 1, "left_out": 1}
    assert loader.drawn == dict(Counter(name_of(row) for pack in packs for row in pack.rows))


def name_of(row: int) -> str:
    return "letters" if row < 30 else "stamps" if row < 42 else "films"


def test_a_blend_resumes_at_every_pack(tmp_path: Path) -> None:
    truth = blended(tmp_path / "truth", prefetch=0, workers=0, epochs=3)
    packs = [facts(pack) for pack in truth]
    truth.ledger.close()
    for stop in range(0, len(packs) + 1, 3):
        path = tmp_path / str(stop)
        first = blended(path, epochs=3)
        given = iter(first)
        assert [facts(next(given)) for _ in range(stop)] == packs[:stop]
        state = first.state_dict()
        next(given, None)
        first.close()
        first.ledger.close()
        second = blended(path, epochs=3)
        second.load_state_dict(state)
        assert second.ended == (stop == len(packs))
        assert [facts(pack) for pack in second] == packs[stop:]
        assert second.drawn == truth.drawn
        second.ledger.close()
        assert path.read_bytes() == (tmp_path / "truth").read_bytes()


def test_a_blend_of_which_all_have_ended_ends(tmp_path: Path) -> None:
    most = {"letters": 1, "stamps": 2, "films": 3}
    loader = blended(tmp_path / "l", most, epochs=None)
    rows = Counter(row for pack in loader for row in pack.rows)
    assert loader.ended
    assert {name_of(row) for row in rows} == set(SIZES)
    for row, times in rows.items():
        assert times == most[name_of(row)]
    assert len(rows) == 46 - len(BROKEN)
    with pytest.raises(CheckpointError, match="weights"):
        blended(tmp_path / "m", {**most, "films": 4}).load_state_dict(loader.state_dict())


def test_a_dataset_without_a_usable_row_is_named(tmp_path: Path) -> None:
    samples = [Sample(id="a/0", parts=(Image("a.png"),), origin=Origin("a", 0))]
    shares = [Share(name="a", rows=range(1)), Share(name="b", rows=range(1, 1))]
    with pytest.raises(DataError, match="b has none"):
        Loader(samples, [0], render, load, LoaderSettings(capacity=40), shares=shares)

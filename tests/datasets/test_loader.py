"""The loader: what it gives, what it leaves out, and what the ledger says about it."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from plait.datasets.columns import Measured, MeasuredRow, RowCounts
from plait.datasets.ledger import Ledger, count
from plait.datasets.loader import Loader, LoaderSettings, Pack
from plait.datasets.policy import FailurePolicy
from plait.errors import ConfigError, DataError, FailureBudgetError, MediaError, Origin
from plait.modalities import Image
from plait.stream import Document, Item, ItemInputs, ItemPlan, Sample, Span, pack

MEDIA = 4


@dataclass
class World:
    """Rows with one picture each, of which some break when they are loaded."""

    rows: int = 60
    broken: frozenset[int] = frozenset()
    groups: dict[int, int] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)

    def samples(self) -> list[Sample]:
        return [
            Sample(
                parts=(Image(f"{row}.png"),),
                origin=Origin("world", row),
                group=self.groups.get(row),
                id=str(row),
            )
            for row in range(self.rows)
        ]

    def render(self, sample: Sample) -> Document:
        row = int(sample.id)
        length = self.lengths.get(row, MEDIA + 3 + row % 11)
        ids = np.arange(length) + 1000 * row
        part = sample.media()[0]
        return Document(
            ids, ids + 1, np.ones(length, np.float32), np.arange(length),
            (Span(1, MEDIA, "tower", 0),),
            (Item(part, ItemPlan("tower", MEDIA, (1, 2, 2)), sample.view, sample.origin),),
            sample.id, sample.origin, group=sample.group,
        )  # fmt: skip

    def load(self, item: Item) -> ItemInputs:
        row = item.origin.row
        assert row is not None
        if row % 4 == 0:
            time.sleep(0.0005)  # the threads overtake one another
        if row in self.broken:
            raise MediaError("a picture must be whole", Origin(file=f"{row}.png"))
        return ItemInputs({"pixels": torch.full((3,), float(100 * row + item.view))})

    def loader(
        self, policy: FailurePolicy | None = None, ledger: Ledger | None = None,
        indices: range | list[int] | None = None, **settings: int | None,
    ) -> Loader:  # fmt: skip
        wanted = {"capacity": 60, "epochs": 2, "seed": 5, "views": 3} | settings
        rows = range(self.rows) if indices is None else indices
        return Loader(
            self.samples(), rows, self.render, self.load,
            LoaderSettings(**wanted), policy, ledger,  # type: ignore[arg-type]
        )  # fmt: skip


def skipping(**limits: int | None) -> FailurePolicy:
    wanted: dict[str, int | None] = {"max_consecutive": None, "max_total": None}
    return FailurePolicy("skip", too_long="drop", **(wanted | limits))


def facts(given: Pack) -> tuple[object, ...]:
    """All that training sees of a pack."""
    return (
        given.epoch, given.index, given.rows,
        [d.token_ids.tolist() for d in given.documents],
        [[item.view for item in d.items] for d in given.documents],
        [[i.inputs["pixels"].tolist() for i in loaded if i.inputs] for loaded in given.inputs],
    )  # fmt: skip


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    assert not [t for t in threading.enumerate() if t.name.startswith("plait-ahead")]


def test_every_row_once_an_epoch_within_the_capacity() -> None:
    packs = list(World().loader())
    for epoch in (0, 1):
        rows = [row for p in packs if p.epoch == epoch for row in p.rows]
        assert sorted(rows) == list(range(60))
    assert all(p.length <= 60 for p in packs)
    assert [p.rows for p in packs if p.epoch == 0] != [p.rows for p in packs if p.epoch == 1]
    stream = pack(packs[0].documents, packs[0].inputs)
    assert stream.length == packs[0].length


def test_workers_and_prefetch_never_change_what_is_loaded() -> None:
    world = World(broken=frozenset({7, 30}))
    truth = [facts(p) for p in world.loader(skipping(), workers=0, prefetch=0)]
    for workers, prefetch in [(0, 4), (1, 0), (1, 4), (3, 4), (5, 1)]:
        found = world.loader(skipping(), workers=workers, prefetch=prefetch)
        assert [facts(p) for p in found] == truth


def test_each_row_shows_all_its_views_in_turn() -> None:
    views: dict[int, list[int]] = {}
    for given in World(rows=20).loader(epochs=6, views=3):
        for row, document in zip(given.rows, given.documents, strict=True):
            views.setdefault(row, []).append(document.items[0].view)
    assert all(sorted(seen[:3]) == [0, 1, 2] for seen in views.values())
    assert all(seen[:3] == seen[3:] for seen in views.values())
    assert len({seen[0] for seen in views.values()}) == 3, "rows begin at different views"


def test_endless_by_default() -> None:
    loader = World(rows=5).loader(epochs=None)
    seen = [p.epoch for p, _ in zip(loader, range(50), strict=False)]
    loader.close()
    assert seen[-1] > 10


def test_ten_percent_broken_agrees_with_an_independent_count(tmp_path: Path) -> None:
    broken = frozenset(np.random.default_rng(0).permutation(200)[:20].tolist())
    world = World(rows=200, broken=broken)
    held_out = {*sorted(broken)[:3], 0, 20, 40, 60, 80, 100, 120}
    chosen = [row for row in range(200) if row not in held_out]
    ledger = Ledger(tmp_path / "ledger.jsonl")
    packs = list(world.loader(skipping(), ledger, chosen, epochs=3))
    ledger.close()
    used = [row for p in packs for row in p.rows]
    summary = count(ledger.path)
    expected = {
        "used": 190 - len(broken - held_out),
        "broken": len(broken - held_out),
        "left_out": 10,
    }
    assert summary.epochs == {0: expected, 1: expected, 2: expected}
    assert not summary.twice
    assert len(used) == 3 * expected["used"] and not set(used) & (broken | held_out)
    assert summary.reasons["broken"] == {"a picture must be whole": 3 * expected["broken"]}


def test_broken_rows_leave_the_rest_of_their_pack_as_it_was() -> None:
    whole = list(World().loader())
    partial = list(World(broken=frozenset({3, 4, 5})).loader(skipping()))
    assert [tuple(r for r in p.rows if r not in (3, 4, 5)) for p in whole] == [
        p.rows for p in partial
    ]


def test_a_group_is_kept_together_or_left_out_together(tmp_path: Path) -> None:
    groups = {row: row // 3 for row in range(30)}
    world = World(groups=groups, broken=frozenset({4}))
    ledger = Ledger(tmp_path / "l")
    for given in world.loader(skipping(), ledger, epochs=1):
        present = {groups[row] for row in given.rows if row in groups}
        for group in present:
            assert {3 * group, 3 * group + 1, 3 * group + 2} <= set(given.rows)
        assert not {3, 4, 5} & set(given.rows)
    ledger.close()
    summary = count(tmp_path / "l")
    assert summary.epochs == {0: {"used": 57, "broken": 1, "dropped": 2}}
    assert summary.reasons["dropped"] == {"row 4 of its group broke": 2}


def test_an_empty_pack_is_skipped_and_still_counted(tmp_path: Path) -> None:
    world = World(rows=6, broken=frozenset({0, 1, 5}))
    ledger = Ledger(tmp_path / "l")
    packs = list(world.loader(skipping(), ledger, max_documents=1, epochs=2))
    ledger.close()
    assert len(packs) == 6 and all(p.documents for p in packs)
    expected = {"used": 3, "broken": 3}
    assert count(tmp_path / "l").epochs == {0: expected, 1: expected}


def test_too_long_and_never_sampled_rows_are_in_the_ledger(tmp_path: Path) -> None:
    world = World(rows=8, lengths={2: 61})
    ledger = Ledger(tmp_path / "l")
    loader = Loader(
        world.samples(), range(8), world.render, world.load,
        LoaderSettings(capacity=60, epochs=1), skipping(), ledger,
        left_out=[(Origin("world", None, "9.png"), "no text")],
    )  # fmt: skip
    assert 2 not in {row for p in loader for row in p.rows}
    ledger.close()
    assert count(tmp_path / "l").epochs == {0: {"used": 7, "dropped": 1, "left_out": 1}}
    with pytest.raises(DataError, match=r"an item longer than the pack: 61 .*row 2"):
        world.loader()


def test_held_out_rows_that_cannot_be_read_are_broken_in_the_ledger(tmp_path: Path) -> None:
    world, ledger = World(rows=8), Ledger(tmp_path / "l")
    loader = Loader(
        world.samples(), range(5), world.render, world.load,
        LoaderSettings(capacity=60, epochs=2), skipping(), ledger,
        broken=[(Origin("world", 6, "6.png"), "cut short")],
    )  # fmt: skip
    assert len({row for p in loader for row in p.rows}) == 5
    ledger.close()
    summary = count(tmp_path / "l")
    expected = {"used": 5, "left_out": 2, "broken": 1}
    assert summary.epochs == {0: expected, 1: expected}
    assert summary.reasons["broken"] == {"cut short": 2} and not summary.twice


def test_the_first_broken_row_raises_in_its_turn() -> None:
    world = World(broken=frozenset({11}))
    loader = world.loader()
    before = []
    with pytest.raises(MediaError, match=r"dataset world, row 11, file 11.png"):
        before += list(loader)
        pytest.fail("row 11 breaks")
    plan = loader.plan(0)
    place = next(n for n, rows in enumerate(plan) if 11 in rows)
    assert loader.state_dict()["pack"] == place, "the pack it broke in was not taken"


def test_a_bug_is_not_taken_for_bad_data() -> None:
    world = World()

    def bug(item: Item) -> ItemInputs:
        raise KeyError("bug")

    loader = Loader(
        world.samples(), range(60), world.render, bug, LoaderSettings(capacity=60), skipping()
    )
    with pytest.raises(KeyError):
        list(loader)


def test_the_budget_stops_the_run_and_the_state_stays_before_the_pack() -> None:
    broken = range(0, 60, 5)
    world = World(broken=frozenset(broken))
    loader = world.loader(skipping(max_total=3))
    with pytest.raises(FailureBudgetError, match="at most 3"):
        list(loader)
    state = loader.state_dict()
    places = sorted(n for n, rows in enumerate(loader.plan(0)) for row in rows if row in broken)
    assert state["pack"] == places[3], "the pack of the fourth broken row was not taken"
    before = sum(place < places[3] for place in places)
    assert len(state["policy"]["broken"]) == before <= 3
    patient = world.loader(skipping())
    patient.load_state_dict(state)
    found = [facts(p) for p in patient]
    assert found == [facts(p) for p in world.loader(skipping())][-len(found) :]


def test_nothing_left_to_train_on_is_an_error_and_no_endless_loop() -> None:
    world = World(rows=10, broken=frozenset(range(10)))
    with pytest.raises(DataError, match="every row of a whole epoch broke"):
        next(iter(world.loader(skipping(), epochs=None)))
    for epochs in (1, 2):
        with pytest.raises(DataError, match="every row of a whole epoch broke"):
            list(world.loader(skipping(), epochs=epochs))
    finished = world.loader(skipping(), epochs=1)
    state = finished.state_dict() | {"pack": len(finished.plan(0))}
    finished.load_state_dict(state)
    assert list(finished) == [], "what was taken before is not judged again"
    with pytest.raises(FailureBudgetError, match="one after another"):
        next(iter(world.loader(skipping(max_consecutive=4), epochs=None)))
    with pytest.raises(DataError, match="needs a usable row"):
        World(rows=0).loader()


def test_a_row_that_changed_its_length_is_broken(tmp_path: Path) -> None:
    world = World(rows=10)
    ledger = Ledger(tmp_path / "l")
    loader = world.loader(skipping(), ledger, epochs=1)
    world.lengths[4] = 50
    assert 4 not in {row for p in loader for row in p.rows}
    ledger.close()
    (reason,) = count(tmp_path / "l").reasons["broken"]
    assert "a row must keep its length: 11 positions were planned and 50 rendered" in reason


def test_settings_and_rows_are_checked(tmp_path: Path) -> None:
    for settings in [{"capacity": 0}, {"seed": -1}, {"views": 0}, {"workers": -1}]:
        with pytest.raises(ConfigError, match=next(iter(settings))):
            World().loader(**settings)
    with pytest.raises(ConfigError, match="only once"):
        World().loader(indices=[1, 1])
    with pytest.raises(ConfigError, match="from 0 to 59"):
        World().loader(indices=[60])
    world = World(rows=2)
    measured = Measured.of([MeasuredRow(0, Origin("world", 0), RowCounts(positions={"text": 7}))])
    with pytest.raises(ConfigError, match="same rows"):
        Loader(
            world.samples(), range(2), world.render, world.load, LoaderSettings(capacity=60),
            measured=measured,
        )  # fmt: skip
    same = [Sample(id="0", parts=(Image("0.png"),), origin=Origin("d", 1)) for _ in range(2)]
    with pytest.raises(ConfigError, match="names of their own"):
        Loader(
            same, range(2), world.render, world.load, LoaderSettings(capacity=60),
            ledger=Ledger(tmp_path / "l"),
        )  # fmt: skip


def test_breaking_out_ends_the_threads_and_iterating_goes_on() -> None:
    world = World()
    truth = [facts(p) for p in world.loader()]
    loader = world.loader()
    found = []
    for given in loader:
        found.append(facts(given))
        if len(found) == 4:
            break
    found += [facts(p) for p in loader]
    assert found == truth

"""Exact resume: from any pack on, the same packs, ledger and budget as without the stop."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from plait.datasets.ledger import Ledger, count, empty_state
from plait.datasets.loader import Loader, LoaderSettings, Pack
from plait.datasets.policy import FailurePolicy
from plait.errors import CheckpointError, ConfigError, MediaError, Origin
from plait.modalities import Image
from plait.stream import Document, Item, ItemInputs, ItemPlan, Sample

ROWS, BROKEN, EPOCHS = 32, frozenset({2, 9, 17, 31}), 3


def render(sample: Sample) -> Document:
    row = int(sample.id)
    ids = np.arange(5 + row % 9) + 100 * row
    item = Item(sample.media()[0], ItemPlan("tower", 1, (1, 1, 1)), sample.view, sample.origin)
    return Document(ids, ids, np.ones(len(ids), np.float32), ids, items=(item,))


def load(item: Item) -> ItemInputs:
    row = item.origin.row or 0
    if row in BROKEN:
        raise MediaError("a picture must be whole", Origin(file=f"{row}.png"))
    return ItemInputs({"pixels": torch.tensor([row, item.view])})


def make(
    path: Path, prefetch: int = 4, workers: int = 2, rows: int = ROWS, first: int = 0,
    **settings: Any,
) -> Loader:  # fmt: skip
    samples = [
        Sample(id=str(first + row), parts=(Image(f"{row}.png"),), origin=Origin("d", row))
        for row in range(rows)
    ]
    wanted = {"capacity": 40, "epochs": EPOCHS, "seed": 1, "views": 2} | settings
    return Loader(
        samples, range(rows), render, load,
        LoaderSettings(workers=workers, prefetch=prefetch, **wanted),
        FailurePolicy("skip", max_total=None, max_consecutive=None), Ledger(path),
    )  # fmt: skip


def facts(given: Pack) -> tuple[Any, ...]:
    views = [i.inputs["pixels"].tolist() for (i,) in given.inputs if i.inputs]
    return given.epoch, given.index, given.rows, views


def uninterrupted(path: Path) -> tuple[list[tuple[Any, ...]], bytes]:
    loader = make(path, 0, 0)
    packs = [facts(p) for p in loader]
    loader.ledger.close()
    return packs, path.read_bytes()


@pytest.mark.parametrize(("prefetch", "workers"), [(0, 0), (4, 1), (4, 3)])
def test_resume_at_every_pack(tmp_path: Path, prefetch: int, workers: int) -> None:
    packs, lines = uninterrupted(tmp_path / "truth")
    for stop in range(len(packs) + 1):
        path = tmp_path / f"at{stop}"
        first = make(path, prefetch, workers)
        given = iter(first)
        for place in range(stop):
            assert facts(next(given)) == packs[place]
        saved = json.loads(json.dumps(first.state_dict()))
        for _ in range(2):  # steps after the checkpoint, lost in the kill
            next(given, None)
        first.close()
        first.ledger.close()
        with path.open("ab") as file:
            file.write(b'{"epoch": 2, "sta')
        second = make(path, 4 - prefetch, 3 - workers)
        second.load_state_dict(saved)
        assert second.state_dict() == saved
        assert [facts(p) for p in second] == packs[stop:]
        second.ledger.close()
        assert path.read_bytes() == lines
        assert second.policy.state_dict()["broken"], "the budget is carried over"
    assert not count(path).twice


def test_the_state_is_of_what_was_taken_and_not_of_what_is_decoded(tmp_path: Path) -> None:
    eager, lazy = make(tmp_path / "a", prefetch=4), make(tmp_path / "b", 0, 0)
    for _ in zip(eager, lazy, strict=True):
        assert eager.state_dict() == lazy.state_dict()


def test_a_framework_that_fetches_ahead_accounts_in_its_step(tmp_path: Path) -> None:
    packs, lines = uninterrupted(tmp_path / "truth")
    loader = make(tmp_path / "l")
    plain = make(tmp_path / "plain")
    stepped = iter(plain)
    ahead: list[Pack] = []
    found = []
    source = loader.packs()
    while len(ahead) < 3 and (fetched := next(source, None)) is not None:
        ahead.append(fetched)
    while ahead:
        loader.account(ahead[0])
        found.append(facts(ahead.pop(0)))
        next(stepped)
        assert loader.state_dict() == plain.state_dict()
        if (fetched := next(source, None)) is not None:
            ahead.append(fetched)
    assert found == packs
    loader.ledger.close()
    assert (tmp_path / "l").read_bytes() == lines


def test_packs_are_accounted_once_and_in_order(tmp_path: Path) -> None:
    loader = make(tmp_path / "l")
    source = loader.packs()
    first, second = next(source), next(source)
    before = loader.state_dict()
    with pytest.raises(ConfigError, match="in order"):
        loader.account(second)
    assert loader.state_dict() == before
    loader.account(first)
    loader.account(second)
    loader.close()
    with pytest.raises(ConfigError, match="once and in order"):
        loader.account(first)


def test_trailing_empty_packs_are_counted_when_the_last_is_taken(tmp_path: Path) -> None:
    loader = make(tmp_path / "l", rows=32, max_documents=1, shuffle=False, epochs=1)
    taken = list(loader.packs())
    assert taken[-1].rows == (30,), "row 31 is a pack of its own, and broken"
    for pack in taken:
        loader.account(pack)
    loader.ledger.close()
    assert count(tmp_path / "l").epochs == {0: {"used": 28, "broken": 4}}


def test_other_data_or_settings_are_refused(tmp_path: Path) -> None:
    state = make(tmp_path / "a").state_dict()
    for settings in [{"seed": 2}, {"capacity": 41}, {"views": 1}, {"max_documents": 3}]:
        with pytest.raises(CheckpointError, match="resumes only on the data"):
            make(tmp_path / "b", **settings).load_state_dict(state)
    make(tmp_path / "b", prefetch=1, workers=1, epochs=9).load_state_dict(state)
    others = make(tmp_path / "c", first=9)
    assert np.array_equal(others.measured.lengths, make(tmp_path / "d").measured.lengths)
    with pytest.raises(CheckpointError, match="their ids or lengths"):
        others.load_state_dict(state)


def test_beginning_again_in_a_used_folder_needs_an_emptied_ledger(tmp_path: Path) -> None:
    first = make(tmp_path / "l")
    next(iter(first))
    first.close()
    first.ledger.close()
    with pytest.raises(CheckpointError, match="once an epoch"):
        list(make(tmp_path / "l"))
    again = make(tmp_path / "l")
    again.ledger.restore(empty_state())
    assert len(list(again)) > 3

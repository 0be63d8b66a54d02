"""Drops by wall clock: on the disk before the pack is used, and the same again on resume."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from plait.datasets.journal import Journal
from plait.datasets.ledger import Ledger, count
from plait.datasets.loader import Loader, LoaderSettings, Pack
from plait.datasets.policy import FailurePolicy
from plait.errors import CheckpointError, DecodeTimeoutError, FailureBudgetError, Origin
from plait.modalities import Image
from plait.stream import Document, Item, ItemInputs, ItemPlan, Sample

ROWS = 24


class Clock:
    """Loads rows, of which some take too long; says which were tried."""

    def __init__(self, *slow: int) -> None:
        self.slow, self.tried = set(slow), list[int]()

    def __call__(self, item: Item) -> ItemInputs:
        row = item.origin.row or 0
        self.tried.append(row)
        if row in self.slow:
            raise DecodeTimeoutError("decoding must end within 5 s", Origin(file=f"{row}.mp4"))
        return ItemInputs({"pixels": torch.tensor([row])})


def render(sample: Sample) -> Document:
    ids = np.arange(5 + int(sample.id) % 7)
    item = Item(sample.media()[0], ItemPlan("tower", 1, (1, 1, 1)), sample.view, sample.origin)
    return Document(ids, ids, np.ones(len(ids), np.float32), ids, items=(item,))


def make(folder: Path, load: Clock, most: int | None = None, **settings: Any) -> Loader:
    samples = [
        Sample(id=str(row), parts=(Image("a.png"),), origin=Origin("d", row)) for row in range(ROWS)
    ]
    wanted = {"capacity": 20, "epochs": 2, "seed": 1} | settings
    return Loader(
        samples, range(ROWS), render, load, LoaderSettings(**wanted),
        FailurePolicy("skip", max_total=most, max_consecutive=None), Ledger(folder / "ledger"),
        journal=Journal(folder / "timeouts"),
    )  # fmt: skip


def rows(packs: list[Pack]) -> list[tuple[int, ...]]:
    return [pack.rows for pack in packs]


def test_a_timeout_is_written_down_before_its_pack_is_given(tmp_path: Path) -> None:
    loader = make(tmp_path, Clock(3, 11), epochs=1)
    missing = set(range(ROWS))
    for pack in loader.packs():
        missing -= set(pack.rows)
        # Not yet accounted: the pack is about to be used.
        for outcome in pack.outcomes:
            if outcome.status == "dropped":
                lines = [json.loads(x) for x in (tmp_path / "timeouts").read_text().splitlines()]
                assert {
                    "epoch": 0, "dataset": "d", "row": outcome.origin.row,
                    "file": outcome.origin.file, "reason": "decoding must end within 5 s",
                } in lines  # fmt: skip
        loader.account(pack)
    assert missing == {3, 11}
    loader.ledger.close()
    assert count(tmp_path / "ledger").epochs == {0: {"used": ROWS - 2, "dropped": 2}}


def test_on_resume_it_is_dropped_without_being_tried(tmp_path: Path) -> None:
    first = make(tmp_path, Clock(3, 11))
    start = first.state_dict()
    truth = rows(list(first))
    first.ledger.close()
    lines = (tmp_path / "ledger").read_bytes()
    quick = Clock()  # nothing is slow this time
    again = make(tmp_path, quick)
    again.load_state_dict(start)
    assert rows(list(again)) == truth
    again.ledger.close()
    assert (tmp_path / "ledger").read_bytes() == lines
    assert not {3, 11} & set(quick.tried)
    assert len(again.journal) == 4
    journal = (tmp_path / "timeouts").read_bytes()
    assert len(journal.splitlines()) == 4, "each row of each epoch once"


def test_a_row_may_be_in_time_in_another_epoch(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "timeouts")
    journal.add(0, Origin("d", 3), "too long")
    loader = make(tmp_path, Clock())
    in_epoch = [{row for p in packs for row in p.rows} for packs in by_epoch(list(loader))]
    assert in_epoch == [set(range(ROWS)) - {3}, set(range(ROWS))]


def by_epoch(packs: list[Pack]) -> list[list[Pack]]:
    return [[pack for pack in packs if pack.epoch == epoch] for epoch in (0, 1)]


def test_timeouts_are_part_of_the_budget(tmp_path: Path) -> None:
    with pytest.raises(FailureBudgetError, match=r"3 x decoding must end within N s"):
        list(make(tmp_path, Clock(1, 2, 3, 4), most=2))


def test_a_last_line_that_a_kill_cut_is_cut_off(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.add(0, Origin("d", 1, "é.mp4"), "too long")
    journal.add(1, Origin("d", None, "a.mp4"), "too long")
    whole = (tmp_path / "j").read_bytes()
    for size in range(len(whole.splitlines(keepends=True)[0]), len(whole)):
        (tmp_path / "torn").write_bytes(whole[:size])
        again = Journal(tmp_path / "torn")
        assert str(again.error(0, Origin("d", 1))) == "too long (dataset d, row 1, file é.mp4)"
        assert again.error(1, Origin("d", None, "a.mp4")) is None
        again.add(1, Origin("d", None, "a.mp4"), "too long")
        assert (tmp_path / "torn").read_bytes() == whole
    (tmp_path / "notes").write_text("my notes\n")
    with pytest.raises(CheckpointError, match="not a journal"):
        Journal(tmp_path / "notes")


_KILLED = """
import os, signal, sys
import plait
from plait.datasets.journal import Journal
from plait.errors import Origin
Journal(sys.argv[1]).add(0, Origin("d", 7), "too long")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_right_after_loses_nothing(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    found = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path / "j")],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert found.returncode == -signal.SIGKILL, found.stderr
    assert Journal(tmp_path / "j").error(0, Origin("d", 7)) is not None

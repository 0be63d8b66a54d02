"""Rows that no pack can hold: dropped, refused, or shortened where that splits no media item."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from plait.datasets.ledger import Ledger, count
from plait.datasets.loader import Loader, LoaderSettings
from plait.datasets.policy import FailurePolicy
from plait.errors import DataError, Origin
from plait.modalities import Image
from plait.stream import Document, Item, ItemInputs, ItemPlan, Sample, Span, check_placeholders

PICTURE = 9
ROWS: list[dict[str, Any]] = [
    {"length": 30},
    {"length": 100},  # text alone
    {"length": 100, "picture": 2},
    {"length": 100, "picture": 60},  # its picture goes on past the cut
    {"length": 100, "learned": 70},  # only what would be cut is learned
    {"length": 64, "picture": 55},
    {"length": 100, "group": 1},
    {"length": 20, "group": 1},
    {"length": 100, "picture": 40, "group": 2},
    {"length": 100, "group": 2},
]


def samples() -> list[Sample]:
    return [
        Sample(
            parts=(Image(f"{row}.png"),) if "picture" in facts else (),
            origin=Origin("d", row), id=str(row), group=facts.get("group"),
        )
        for row, facts in enumerate(ROWS)
    ]  # fmt: skip


def render(sample: Sample) -> Document:
    facts = ROWS[int(sample.id)]
    length, at = facts["length"], facts.get("picture")
    ids = np.arange(length) + 1
    weights = np.zeros(length, np.float32)
    weights[facts.get("learned", 0) :] = 1.0
    spans, items = (), ()  # type: ignore[var-annotated]
    if at is not None:
        ids[at : at + PICTURE] = -1
        spans = (Span(at, PICTURE, "tower", 0),)
        items = (Item(sample.media()[0], ItemPlan("tower", PICTURE, (1, 3, 3)), sample.view),)
    return Document(
        ids, np.where(ids < 0, 0, ids + 1), weights, np.stack([np.arange(length)] * 3), spans,
        items, sample.id, sample.origin, group=sample.group,
        loss_inputs={"old": np.arange(length), "reward": np.ones(1)},
    )  # fmt: skip


def load(item: Item) -> ItemInputs:
    return ItemInputs({"pixels": torch.zeros(1)})


def run(
    tmp_path: Path, too_long: Any, **settings: Any
) -> tuple[dict[int, Document], dict[int, tuple[str, str]]]:
    ledger = Ledger(tmp_path / "l")
    loader = Loader(
        samples(), range(len(ROWS)), render, load,
        LoaderSettings(**{"capacity": 64, "epochs": 1} | settings),
        FailurePolicy("skip", too_long=too_long), ledger,
    )  # fmt: skip
    documents = {int(d.sample_id): d for pack in loader for d in pack.documents}
    ledger.close()
    lines = [json.loads(line) for line in ledger.path.read_text().splitlines()]
    assert not count(ledger.path).twice
    return documents, {line["row"]: (line["status"], line["reason"]) for line in lines}


def test_text_is_cut_at_the_end_and_an_item_never_split(tmp_path: Path) -> None:
    documents, ledger = run(tmp_path, "truncate")
    statuses = {row: status for row, (status, _) in ledger.items()}
    assert statuses == {
        0: "used", 1: "truncated", 2: "truncated", 3: "dropped", 4: "dropped", 5: "used",
        6: "truncated", 7: "used", 8: "dropped", 9: "dropped",
    }  # fmt: skip
    assert ledger[1][1] == "36 of 100 positions were cut off its end"
    assert "its media go on to position 69; a media item is never split" in ledger[3][1]
    assert "leave nothing that is learned" in ledger[4][1]
    assert "to be cut to 32, and its media go on to position 49" in ledger[8][1]
    assert {row: d.length for row, d in documents.items()} == {
        0: 30, 1: 64, 2: 64, 5: 64, 6: 44, 7: 20,
    }  # fmt: skip


def test_what_is_left_is_as_it_was(tmp_path: Path) -> None:
    documents, _ = run(tmp_path, "truncate")
    for row, document in documents.items():
        whole, length = render(samples()[row]), document.length
        check_placeholders(document, -1)
        assert np.array_equal(document.token_ids, whole.token_ids[:length])
        assert np.array_equal(document.targets, whole.targets[:length])
        assert np.array_equal(document.weights, whole.weights[:length])
        assert np.array_equal(document.positions, whole.positions[:, :length])
        assert document.loss_inputs["old"].tolist() == list(range(length))
        assert document.loss_inputs["reward"].tolist() == [1.0]
        assert document.spans == whole.spans
        assert document.weights.any()


def test_squares_are_cut_to_and_other_budgets_are_not(tmp_path: Path) -> None:
    documents, ledger = run(tmp_path, "truncate", max_squares=1000, max_patches=8)
    assert documents[1].length == 31
    assert ledger[2] == ("dropped", "9 patches, of which a pack holds 8; only text is cut")


def test_dropping_and_refusing_are_as_before(tmp_path: Path) -> None:
    documents, ledger = run(tmp_path, "drop")
    assert sorted(documents) == [0, 5]
    assert ledger[1] == (
        "dropped", "an item longer than the pack: 100 positions, and a pack holds 64",
    )  # fmt: skip
    with pytest.raises(DataError, match=r"set too_long to drop or truncate \(dataset d, row 1\)"):
        run(tmp_path / "m", "error")
    _, ledger = run(tmp_path / "n", "drop", max_patches=8)
    assert ledger[5][1] == "an item does not fit in one pack of at most 8 patches: it has 9"

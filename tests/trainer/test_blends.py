"""Recipes with several datasets: what they may say, and what a run makes of them."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from plait.datasets.ledger import count
from plait.errors import ConfigError, UnknownNameError
from plait.trainer.config import RunConfig, config_from, plain
from plait.trainer.data import open_data
from plait.trainer.plan import plan
from plait.trainer.run import train

QUIET = Console(quiet=True)
MODEL = {"language": "m"}


def recipe(data: dict[str, Any]) -> RunConfig:
    return config_from({"name": "x", "model": MODEL, "data": data})


def test_a_run_needs_one_dataset_or_a_blend() -> None:
    entry = {"data": {"path": "a"}}
    for data, told in [
        ({}, "neither is set"),
        ({"path": "a", "blend": [entry]}, "both are set"),
        ({"blend": []}, "it is empty"),
        ({"blend": [{"data": {}}]}, "needs a path"),
        ({"blend": [entry], "dialect": "csv"}, r"data\.dialect is of a single dataset"),
        ({"blend": [entry | {"weight": 0}]}, r"weight must be a number above 0; it is 0"),
        ({"blend": [entry | {"epochs": 0}]}, r"epochs must be a whole number of at least 1"),
    ]:  # fmt: skip
        with pytest.raises(ConfigError, match=told):
            recipe(data)
    with pytest.raises(UnknownNameError, match=r"data\.blend\.0.*did you mean 'weight'"):
        recipe({"blend": [entry | {"wieght": 1}]})
    with pytest.raises(UnknownNameError, match=r"data\.blend\.0\.data.*did you mean 'captions'"):
        recipe({"blend": [{"data": {"path": "a", "caption": {}}}]})


def test_a_blend_is_what_was_written() -> None:
    split = {"test": 3}
    config = recipe({"blend": [
        {"data": {"path": "a", "name": "letters"}, "weight": 2.5, "epochs": 4},
        {"data": {"path": "b", "dialect": "csv"}, "split": split},
    ]})  # fmt: skip
    first, second = config.data.datasets
    assert (first.data.name, first.weight, first.epochs, first.split) == ("letters", 2.5, 4, None)
    assert (second.data.dialect, second.weight, second.epochs) == ("csv", 1.0, None)
    assert second.split is not None and second.split.test == 3
    assert config_from(json.loads(json.dumps(plain(config)))) == config
    assert config.data.described == "a + b"
    (alone,) = recipe({"path": "a", "media_dir": "m"}).data.datasets
    assert (alone.data.path, alone.data.media_dir, alone.weight) == ("a", "m", 1.0)


@pytest.fixture
def values(tiny_values: dict[str, Any], picture_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Discs and squares, each once, and bars; the run would go on for 40 steps."""
    captions = tiny_values["data"]["captions"] | {"template": "{text}"}
    blend = [
        {
            "data": {"path": str(picture_folder / shape), "captions": captions},
            "weight": weight, "epochs": epochs,
        }
        for shape, weight, epochs in [("disc", 1, 1), ("square", 1, 1), ("bar", 2, 2)]
    ]  # fmt: skip
    split = {"test": 2, "validation": 1, "near_duplicate_bits": None}
    train = tiny_values["train"] | {"steps": 40, "validate_every": 2, "accumulate": 100}
    return tiny_values | {
        "run_dir": str(tmp_path / "run"), "data": {"blend": blend, "split": split},
        "train": train, "evaluation": {"captions": 1},
    }  # fmt: skip


def test_each_dataset_is_split_by_itself(values: dict[str, Any]) -> None:
    values["data"]["blend"][2]["split"] = {"test": 4, "near_duplicate_bits": None}
    data = open_data(config_from(values).data)
    assert [data.dataset_of(row) for row in data.splits.test] == (
        ["disc"] * 2 + ["square"] * 2 + ["bar"] * 4
    )
    assert [data.dataset_of(row) for row in data.splits.validation] == ["disc", "square"]
    held = [data.splits.train, data.splits.validation, data.splits.test]
    assert sorted(row for rows in held for row in rows) == list(range(36))
    values["data"]["blend"][1]["data"]["name"] = "disc"
    with pytest.raises(ConfigError, match="both called 'disc'"):
        open_data(config_from(values).data)


def test_a_blend_that_ends_ends_the_run(values: dict[str, Any]) -> None:
    config = config_from(values)
    metrics = train(config, QUIET)
    assert metrics is not None
    assert metrics["data"]["rows"] == {"disc": 9, "square": 9, "bar": 18}
    assert 0 < metrics["steps"] < 40
    assert metrics["best_step"] > 0
    summary = count(config.folder / "ledger.jsonl")
    assert summary.epochs == {0: {"used": 27, "left_out": 9}, 1: {"used": 9, "left_out": 3}}
    assert not summary.twice
    header, *rows = (config.folder / "losses.csv").read_text().splitlines()
    assert header.endswith(",rows/disc,rows/square,rows/bar")
    assert rows[-1].endswith(",9.0,9.0,18.0")
    assert len(rows) == metrics["steps"]
    assert train(config, QUIET) is None, "it is finished"


def test_plan_says_what_each_dataset_brings(values: dict[str, Any]) -> None:
    found = plan(config_from(values))
    assert found.rows.samples == {"disc": 9, "square": 9, "bar": 9}
    assert found.held_out["test"] == {"disc": 2, "square": 2, "bar": 2}

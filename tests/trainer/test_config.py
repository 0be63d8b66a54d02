"""Recipes: what is read is what was written, and nothing unknown passes."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import plait
from plait.errors import ConfigError, UnknownNameError
from plait.trainer.config import RunConfig, config_from, load_config, plain
from plait.trainer.strict import spec_from

LEAST: dict[str, Any] = {"name": "x", "data": {"path": "rows"}, "model": {"language": "m"}}
CONFIGS = Path(plait.__file__).resolve().parent.parent / "configs"


def nested(path: str, value: Any) -> dict[str, Any]:
    """The least recipe with one value set, at a dotted path."""
    values: dict[str, Any] = json.loads(json.dumps(LEAST))
    inner = values
    *sections, last = path.split(".")
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[last] = value
    return values


@pytest.mark.parametrize(("path", "near"), [
    ("sead", "seed"),
    ("trian", "train"),
    ("data.pth", "path"),
    ("data.split.tset", "test"),
    ("data.captions.templat", "template"),
    ("data.broken.on_eror", "on_error"),
    ("data.limits.max_image_pixel", "max_image_pixels"),
    ("model.languag", "language"),
    ("model.lora.rnk", "rank"),
    ("model.encoders.image.weight", "weights"),
    ("views.cont", "count"),
    ("train.step", "steps"),
    ("train.learning_rat", "learning_rate"),
    ("evaluation.caption", "captions"),
])  # fmt: skip
def test_an_unknown_key_is_refused_with_the_nearest(path: str, near: str) -> None:
    section, _, key = path.rpartition(".")
    with pytest.raises(UnknownNameError) as caught:
        config_from(nested(path, 1))
    where = section or "the recipe"
    assert str(caught.value) == f"unknown key in {where} {key!r}; did you mean {near!r}?"
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(("path", "value", "told"), [
    ("seed", "many", "seed"),
    ("train.steps", "ten", r"fit: train\.steps: Expected a <class 'int'>\. Got value: ten$"),
    ("train.steps", 1.5, "steps"),
    ("train.cache_features", "perhaps", "cache_features"),
    ("train.part_learning_rates", {"projector": "fast"}, "part_learning_rates"),
    ("train", 3, "train must be a section with keys; it is 3"),
    ("train", None, "train must have a value"),
    ("model.dtype", "float8", "dtype"),
    ("model.lora.rank", None, r"model\.lora\.rank must have a value; it is empty"),
    ("model.lora.rank", "four", r"fit: model\.lora\.rank: Expected .*int.* Got value: four$"),
    ("data.captions.template", "{clas}", r"fit: captions\.template must hold \{text\}"),
    ("model.train", ["projectr"], "did you mean 'projector'"),
    ("model.train", [], "names no part"),
    ("model.lora.dropout", 1.0, r"lora\.dropout must be a number in \[0, 1\)"),
    ("model.encoders.image", {"name": "x", "grid": [2]}, "grid"),
    ("data.broken.on_error", "ignore", "on_error"),
    ("data.limits.max_image_pixels", 0, "max_image_pixels must be at least 1"),
    ("threads", -1, "threads must be a whole number of at least 0; it is -1"),
    ("train.steps", 0, r"train\.steps must be at least 1; it is 0"),
    ("train.capacity", 1, r"train\.capacity must be at least 2"),
    ("train.accumulate", 0, r"train\.accumulate must be at least 1"),
    ("train.part_learning_rates", {"projecter": 2e-3}, "did you mean 'projector'"),
    ("train.part_learning_rates", {"projector": -1.0}, "part_learning_rates.projector must be"),
    ("train.learning_rate", float("nan"), r"train\.learning_rate must be a number of at least 0"),
    ("train.learning_rate", -1e-3, r"train\.learning_rate must be a number of at least 0"),
    ("train.weight_decay", -0.1, r"train\.weight_decay must be"),
    ("train.grad_clip_norm", float("inf"), r"train\.grad_clip_norm must be"),
    ("train.final_share", 1.5, r"train\.final_share must be a number in \[0, 1\]"),
    ("train.warmup", -1, r"train\.warmup must be at least 0"),
    ("train.checkpoint_every", 0, r"train\.checkpoint_every must be at least 1"),
    ("train.patience", 0, r"train\.patience must be at least 1"),
    ("train.prefetch", -1, r"train\.prefetch must be at least 0"),
    ("seed", -1, "seed must be a whole number of at least 0; it is -1"),
])  # fmt: skip
def test_a_value_that_does_not_fit_is_refused(path: str, value: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        config_from(nested(path, value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["name", "data.path", "model.language"])
def test_what_a_recipe_needs(path: str) -> None:
    values: dict[str, Any] = json.loads(json.dumps(LEAST))
    *sections, last = path.split(".")
    inner = values
    for section in sections:
        inner = inner[section]
    del inner[last]
    with pytest.raises(ConfigError, match=last):
        config_from(values)


def test_overrides_win_and_make_sections(tiny_recipe: Path) -> None:
    config = load_config(
        tiny_recipe,
        ["train.steps=3", "model.lora.rank=2", "data.broken.on_error=skip",
         "train.part_learning_rates={projector: 0.5}", "run_dir='a=b'"],
    )  # fmt: skip
    assert (config.train.steps, config.run_dir) == (3, "a=b")
    assert config.model.lora is not None
    assert (config.model.lora.rank, config.model.lora.dropout) == (2, 0.1)
    assert config.data.broken.on_error == "skip"
    assert config.train.part_learning_rates == {"projector": 0.5}
    assert load_config(tiny_recipe, ["model.lora=null"]).model.lora is None


@pytest.mark.parametrize(("override", "told"), [
    ("train.steps", "written key=value"),
    ("train.stps=3", "did you mean 'steps'"),
    ("seed.x=3", "seed is a value, not a section"),
    ("seed=[", "YAML"),
])  # fmt: skip
def test_a_bad_override_is_refused(tiny_recipe: Path, override: str, told: str) -> None:
    recipe = yaml.safe_load(tiny_recipe.read_text()) | {"seed": 1}
    tiny_recipe.write_text(yaml.safe_dump(recipe))
    with pytest.raises(ConfigError, match=told):
        load_config(tiny_recipe, [override])


@pytest.mark.parametrize(("content", "told"), [
    (b"a: [", "must be YAML"),
    (b"- 1", "holds list"),
    (b"", "holds NoneType"),
    (b"\xff\xfe\x00", "must be YAML"),
    (b"1: 2\n", "unknown key in the recipe '1'"),
])  # fmt: skip
def test_a_file_that_is_no_recipe(tmp_path: Path, content: bytes, told: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=told):
        load_config(file)
    with pytest.raises(ConfigError, match="there is none at"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="must be YAML"):
        load_config(tmp_path)


def test_plain_values_come_back(tiny_values: dict[str, Any]) -> None:
    for values in (tiny_values, LEAST, nested("model.lora", None)):
        config = config_from(values)
        written = json.loads(json.dumps(plain(config)))
        assert config_from(written) == config
        assert plain(config_from(written)) == plain(config)
        assert spec_from(written["model"]) == config.model


def test_every_value_of_a_recipe_arrives(tiny_values: dict[str, Any]) -> None:
    """Guarantee 12: what was written stands in the run, at the same place."""
    written = plain(config_from(tiny_values))

    def compare(mine: Any, theirs: Any, where: str) -> None:
        if isinstance(mine, dict):
            for key, value in mine.items():
                compare(value, theirs[key], f"{where}.{key}")
        else:
            assert mine == theirs, where

    compare(tiny_values, written, "")


def test_the_folder_is_named_after_the_run() -> None:
    assert config_from(LEAST).folder == Path("runs/x")
    assert config_from(LEAST | {"run_dir": "else"}).folder == Path("else")


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_committed_recipe_loads(file: Path) -> None:
    config = load_config(file)
    assert isinstance(config, RunConfig)
    assert config.name == file.stem

"""Guarantee 11: what is exported computes the same in plain transformers and peft."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from plait.cli import main
from plait.errors import CheckpointError, ConfigError
from plait.trainer import checkpoint, comparing, export
from plait.trainer.build import Built
from plait.trainer.comparing import Compared, Job, compare
from plait.trainer.config import load_config
from plait.trainer.manifest import digest_of, read_sealed, sha256_of, verify
from plait.trainer.run import train
from plait.trainer.source import Source
from plait.trainer.spec import LoraSpec
from plait.trainer.store import Store

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"lora": LoraSpec(rank=4)},
    "dora": {"lora": LoraSpec(rank=4, dora=True)},
    "rslora": {"lora": LoraSpec(rank=4, rslora=True, alpha=3.0)},
    "full": {"lora": None},
}


def moved(built: Built) -> Built:
    """Everything that trains is another than it was drawn."""
    generator = torch.Generator().manual_seed(3)
    for _, _, parameter in built.model.trainable():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return built


@pytest.fixture(scope="module")
def saved(lab: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A checkpoint of a kind, saved once."""
    folders: dict[str, Path] = {}

    def of(kind: str, **changes: Any) -> Path:
        name = f"{kind}{changes}"
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("saved") / "one"
            checkpoint.save(folders[name], moved(lab.build(**KINDS[kind], **changes)))
        return folders[name]

    return of


def source(folder: Path) -> Source:
    return Source(Store(folder.parent), str(folder))


@pytest.mark.parametrize(("kind", "merge"), [
    ("lora", False), ("lora", True), ("dora", True), ("rslora", False), ("full", False),
])  # fmt: skip
def test_an_export_computes_the_same_without_plait(
    saved: Callable[..., Path], lab: Any, tmp_path: Path, kind: str, merge: bool
) -> None:
    """Compared by the command, and again here from what lies on the disk afterwards."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, out = saved(kind), tmp_path / "out"
    done = export.export(source(folder), out, merge=merge)
    whole = merge or kind == "full"
    assert done.merged == whole
    assert done.compared.largest_difference < 1e-4 * done.compared.largest_logit
    assert done.compared.trained_change > 100 * done.compared.mean_difference
    assert (out / "model.safetensors").exists() == whole
    assert (out / "adapter_model.safetensors").exists() == (not whole)

    plain: Any = AutoModelForCausalLM.from_pretrained(out if whole else lab.language)
    if not whole:
        plain = PeftModel.from_pretrained(plain, out)
    built = lab.build(**KINDS[kind])
    checkpoint.load(folder, built)
    with torch.inference_mode():
        for row, ours in zip(export._rows(built), export._logits(built), strict=True):
            theirs = plain.eval()(torch.tensor([row])).logits[0]
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("merge", [False, True])
def test_an_export_may_be_wanted_in_a_relative_folder(
    saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merge: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    export.export(source(saved("lora")), Path("out"), merge=merge)
    assert (tmp_path / "out" / "export.json").exists()


def test_an_export_carries_all_that_renders_and_reads_media(
    saved: Callable[..., Path], lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    told: list[dict[str, Any]] = []
    check = comparing._check_text
    monkeypatch.setattr(
        comparing, "_check_text", lambda job, facts, *more: (told.append(facts),
                                                             check(job, facts, *more))
    )  # fmt: skip
    folder, out = saved("lora"), tmp_path / "out"
    export.export(source(folder), out)
    assert [facts["plait"] for facts in told] == [False], "the other process knows nothing of us"
    manifest, facts = verify(folder), read_sealed(out / "export.json")
    assert facts["hashes"] == manifest["hashes"] and facts["spec"] == manifest["spec"]
    kinds = {name.split(":")[0] for name in facts["hashes"]}
    assert kinds == {"language", "template", "renderer", "encoder", "preprocessing"}
    assert facts["files"] == {
        path.name: sha256_of(path) for path in out.iterdir() if path.name != "export.json"
    }
    for name in ("encoders.safetensors", "preprocessing.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    preprocessing = json.loads((out / "preprocessing.json").read_text())
    assert preprocessing["image"]["grid"] == [2, 2]
    assert '"image_mean"' in preprocessing["image"]["processing"]
    template = AutoTokenizer.from_pretrained(out).chat_template
    assert template == (folder / "template.jinja").read_text()
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(lab.language)


def lose_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_trained", lambda plain, *_: plain)


def break_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    copy = export._copy

    def other(folder: Path, aside: Path, names: tuple[str, ...]) -> None:
        copy(folder, aside, names)
        for file in aside.glob("adapter_model.safetensors"):
            save_file({n: t * 1.01 for n, t in load_file(file).items()}, file)

    monkeypatch.setattr(export, "_copy", other)


def unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    copy = export._copy

    def other(folder: Path, aside: Path, names: tuple[str, ...]) -> None:
        copy(folder, aside, names)
        for file in aside.glob("*model.safetensors"):
            file.write_bytes(file.read_bytes()[:100])

    monkeypatch.setattr(export, "_copy", other)


def other_template(monkeypatch: pytest.MonkeyPatch) -> None:
    compare = export._compare

    def changed(aside: Path, *args: Any) -> Compared:
        (aside / "chat_template.jinja").write_text("{{ messages[0].content }}")
        return compare(aside, *args)

    monkeypatch.setattr(export, "_compare", changed)


@pytest.mark.parametrize(("damage", "merge", "told"), [
    (lose_adapter, True, "its logits differ by"),
    (break_adapter, False, "its logits differ by"),
    (unreadable, True, "must load in plain transformers"),
    (other_template, False, "must render what its checkpoint renders"),
])  # fmt: skip
def test_an_export_that_computes_something_else_does_not_appear(
    saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[pytest.MonkeyPatch], None], merge: bool, told: str,
) -> None:  # fmt: skip
    damage(monkeypatch)
    with pytest.raises(CheckpointError, match=told):
        export.export(source(saved("lora")), tmp_path / "out", merge=merge)
    assert list(tmp_path.iterdir()) == []


def test_rounding_does_not_hide_that_the_training_is_lost(
    saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 a small change of the weights is as small as the rounding is allowed to be."""
    done = export.export(source(saved("lora")), tmp_path / "out", merge=True, dtype="bfloat16")
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in held.values()} == {torch.bfloat16}
    assert done.compared.mean_difference < done.compared.trained_change / 2
    monkeypatch.setitem(comparing.TOLERANCES, "bfloat16", 1e9)
    lose_adapter(monkeypatch)
    with pytest.raises(CheckpointError, match="must hold what was trained"):
        export.export(source(saved("lora")), tmp_path / "two", merge=True, dtype="bfloat16")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_numbers_that_are_none_are_not_near(
    saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [torch.zeros(3, 4)]
    monkeypatch.setattr(comparing, "_reload", lambda _: ([rows[0] * torch.nan], {"text": None}))
    job = Job(Path(), None, Path(), [[1, 2, 3]], None)
    with pytest.raises(CheckpointError, match="its logits differ by nan"):
        compare(job, rows, rows, None, "float32")


def test_what_cannot_be_exported_is_refused(
    saved: Callable[..., Path], lab: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    folder = saved("lora")
    with pytest.raises(ConfigError, match="holds something"):
        export.export(source(folder), tmp_path / "taken")
    with pytest.raises(ConfigError, match="dtype is one of float32"):
        export.export(source(folder), tmp_path / "out", dtype="int8")
    (tmp_path / "only").mkdir()
    checkpoint.save(tmp_path / "only" / "one", lab.build(train=("projector",)))
    with pytest.raises(ConfigError, match="add --merge"):
        export.export(source(tmp_path / "only" / "one"), tmp_path / "out")
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    (damaged / "encoders.safetensors").write_bytes(b"")
    assert main(["export", str(damaged), str(tmp_path / "out")]) == 1
    assert "encoders.safetensors is missing or not what was saved" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "nothing"), str(tmp_path / "out")]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "only", "taken"]
    assert (tmp_path / "taken" / "notes.txt").read_text() == "mine"
    done = export.export(source(tmp_path / "only" / "one"), tmp_path / "out", merge=True)
    assert done.compared.trained_change < 1e-6 * done.compared.largest_logit


def test_the_command_exports_a_run_of_plait_train(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its best weights, merged."""
    from transformers import AutoModelForCausalLM

    settings = ["train.steps=2", "train.validate_every=2", "train.checkpoint_every=2"]
    train(load_config(tiny_recipe, settings), Console(file=io.StringIO()))
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--merge"]) == 0
    assert "plain transformers in another process computes its logits" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out") is not None
    facts = read_sealed(tmp_path / "out" / "export.json")
    (best,) = (tmp_path / "run" / "checkpoints").glob("best-*")
    assert facts["checkpoint"] == digest_of(verify(best))

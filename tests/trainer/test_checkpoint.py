"""Checkpoints: what they hold, who else reads them, and what is refused."""

import json
import pickle
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from plait.errors import CheckpointError
from plait.modalities import Text
from plait.stream import Message, Sample, pack, render
from plait.trainer import checkpoint, identity
from plait.trainer.build import Built, build
from plait.trainer.config import config_from
from plait.trainer.files import json_text
from plait.trainer.manifest import MANIFEST, read_manifest, sha256_of, verify, write_sealed
from plait.trainer.optimiser import make_optimizer
from plait.trainer.spec import LoraSpec, ModelSpec

QUESTION = Sample(
    messages=(Message("user", (Text("which: "),)), Message("assistant", (Text("a red disc"),)))
)


@pytest.fixture(scope="module")
def spec(tiny_values: dict[str, Any]) -> ModelSpec:
    return config_from(tiny_values).model


def stepped(built: Built) -> checkpoint.State:
    """Everything trainable moved, through one optimiser step."""
    generator = torch.Generator().manual_seed(5)
    optimizer = make_optimizer(built.model.trainable())
    for _, _, parameter in built.model.trainable():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.param_groups[0]["lr"] = 0.03
    optimizer.step()
    return checkpoint.capture(
        optimizer, 7, torch.Generator().manual_seed(42).get_state(), note={"rows": [1, 2]}
    )


def tensors(built: Built) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in built.model.state_dict().items()}


def same(mine: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(mine[name], other[name]) for name in mine | other)


@pytest.fixture(scope="module")
def saved(spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Built]:
    """A checkpoint to resume from, and the model it was saved from."""
    built = build(spec, 0)
    folder = tmp_path_factory.mktemp("saved") / "step-000007"
    checkpoint.save(folder, built, stepped(built))
    return folder, built


@pytest.fixture
def folder(saved: tuple[Path, Built], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    mine = tmp_path / "copy"
    mine.mkdir()
    for file in saved[0].iterdir():
        (mine / file.name).write_bytes(file.read_bytes())
    return mine


def test_a_round_trip_brings_everything_back(saved: tuple[Path, Built], spec: ModelSpec) -> None:
    folder, before = saved
    other = build(spec, 1)
    assert not same(tensors(other), tensors(before))
    state = checkpoint.load(folder, other)
    assert same(tensors(other), tensors(before))
    assert state is not None
    assert (state.step, state.extra) == (7, {"note": {"rows": [1, 2]}})
    optimizer = make_optimizer(other.model.trainable())
    optimizer.load_state_dict(state.optimizer)
    assert torch.equal(torch.Generator().manual_seed(42).get_state(), state.random)
    assert optimizer.param_groups[0]["lr"] == 0.03
    assert checkpoint.load(folder, other, with_state=False) is None


def test_the_manifest_says_what_it_is(saved: tuple[Path, Built]) -> None:
    folder, built = saved
    manifest = json.loads((folder / "manifest.json").read_text())
    names = {"adapter_config.json", "adapter_model.safetensors", "encoders.safetensors",
             "template.jinja", "preprocessing.json", "optimizer.safetensors",
             "state.json"}  # fmt: skip
    assert set(manifest["files"]) == names
    assert {path.name for path in folder.iterdir()} == {*names, "manifest.json"}
    assert manifest["step"] == 7
    assert manifest["hashes"] == built.hashes
    parts = {"language", "template", "renderer", "encoder:hf_vision", "preprocessing:hf_vision"}
    assert set(manifest["hashes"]) == parts
    assert manifest["versions"]["torch"].startswith("2.")
    assert manifest["spec"]["language"] == built.spec.language
    assert (folder / "template.jinja").read_text() == built.tokenizer.chat_template
    held = load_file(folder / "encoders.safetensors")
    projector = built.model.media_encoder("hf_vision").projector.state_dict()
    assert set(held) == {f"hf_vision.projector.{name}" for name in projector}
    assert not list(folder.glob("*.bin")) + list(folder.glob("*.pt"))


def test_the_adapter_loads_in_plain_peft(
    saved: tuple[Path, Built], tiny_language: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, built = saved
    plain = AutoModelForCausalLM.from_pretrained(tiny_language)
    document = render(QUESTION, built.tokenizer, built.layout)
    ids = torch.from_numpy(document.token_ids)[None]
    with torch.inference_mode():
        without = plain(ids).logits[0]
        theirs = PeftModel.from_pretrained(plain, folder).eval()(ids).logits[0]
        built.model.eval()
        hidden, _ = built.model.hidden(pack([document], [[]]))
        ours = built.model.logits(hidden)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (without - theirs).abs().max() > 0.01, "the adapter must change something"


@pytest.mark.parametrize("name", [
    "manifest.json", "adapter_config.json", "adapter_model.safetensors", "encoders.safetensors",
    "template.jinja", "preprocessing.json", "optimizer.safetensors", "state.json",
])  # fmt: skip
def test_any_flipped_bit_is_refused(folder: Path, saved: tuple[Path, Built], name: str) -> None:
    built = saved[1]
    before = tensors(built)
    file = folder / name
    whole = file.read_bytes()
    generator = torch.Generator().manual_seed(len(whole))
    places = torch.randint(len(whole), (20,), generator=generator).tolist()
    for place in [0, len(whole) - 1, *places]:
        bit = 1 << int(torch.randint(8, (), generator=generator))
        file.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        with pytest.raises(CheckpointError):
            checkpoint.load(folder, built)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError):
        checkpoint.load(folder, built)
    file.unlink()
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        checkpoint.load(folder, built)
    assert same(tensors(built), before)
    file.write_bytes(whole)
    checkpoint.load(folder, built)


def test_a_setting_changed_in_the_manifest_is_refused(
    folder: Path, saved: tuple[Path, Built]
) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["spec"]["lora"]["alpha"] = 1.0
    (folder / "manifest.json").write_text(json_text(manifest))
    with pytest.raises(CheckpointError, match=r"manifest\.json is not what was saved"):
        checkpoint.load(folder, saved[1])


Change = Callable[[ModelSpec, Path], ModelSpec]


def other_vision(spec: ModelSpec, folder: Path) -> ModelSpec:
    from transformers import ViTModel

    vision = Path(str(spec.encoders["image"].weights))
    torch.manual_seed(8)
    ViTModel(ViTModel.from_pretrained(vision).config, add_pooling_layer=False).save_pretrained(
        folder
    )
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (vision / name).is_file():
            (folder / name).write_bytes((vision / name).read_bytes())
    return replace(spec, encoders={"image": replace(spec.encoders["image"], weights=str(folder))})


def other_language(spec: ModelSpec, folder: Path) -> ModelSpec:
    from safetensors.torch import save_file

    for file in Path(spec.language).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    held = load_file(folder / "model.safetensors")
    held["model.norm.weight"] = held["model.norm.weight"] + 1e-3
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return replace(spec, language=str(folder))


def other_preprocessing(spec: ModelSpec, folder: Path) -> ModelSpec:
    weights = Path(str(spec.encoders["image"].weights))
    for file in weights.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings["image_mean"] = [0.4, 0.5, 0.6]
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return encoder_with(spec, weights=str(folder))


def encoder_with(spec: ModelSpec, **changes: Any) -> ModelSpec:
    return replace(spec, encoders={"image": replace(spec.encoders["image"], **changes)})


OTHERS: dict[str, tuple[Change, str]] = {
    "language": (other_language, "trained with another language"),
    "template": (
        lambda spec, _: replace(spec, template="{% for m in messages %}{{ m }}{% endfor %}"),
        "trained with another template",
    ),
    "encoder": (other_vision, "trained with another encoder:hf_vision"),
    "preprocessing": (other_preprocessing, "trained with another preprocessing:hf_vision"),
    "grid": (lambda spec, _: encoder_with(spec, grid=(1, 1)), "another encoder:hf_vision"),
    "no encoder": (
        lambda spec, _: replace(spec, encoders={}), "trained with another encoder:hf_vision"
    ),
    "projector": (lambda spec, _: encoder_with(spec, projector="linear"), "saved encoders must"),
    "rank": (lambda spec, _: replace(spec, lora=LoraSpec(rank=2)), "saved adapter must fit"),
    "alpha": (lambda spec, _: replace(spec, lora=LoraSpec(rank=4, alpha=8)), r"lora\.alpha 32"),
    "targets": (
        lambda spec, _: replace(spec, lora=LoraSpec(rank=4, targets=("q_proj",))),
        "saved adapter must fit",
    ),
    "no adapter": (
        lambda spec, _: replace(spec, train=("projector",)),
        "has adapter_model.safetensors, which this model would ignore",
    ),
    "full": (lambda spec, _: replace(spec, lora=None), "safetensors, which this model"),
    "tower": (
        lambda spec, _: replace(spec, train=("projector", "language", "vision")),
        "saved encoders must fit",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHERS)
def test_a_checkpoint_of_another_model_is_refused_by_name(
    saved: tuple[Path, Built], spec: ModelSpec, tmp_path: Path, what: str
) -> None:
    change, message = OTHERS[what]
    (tmp_path / "other").mkdir()
    built = build(change(spec, tmp_path / "other"), 3)
    before = tensors(built)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(saved[0], built)
    assert same(tensors(built), before), "a refused checkpoint changes nothing"


def test_another_renderer_is_refused_by_name(
    saved: tuple[Path, Built], spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that writes rows otherwise, from the same template: it is no setting but our own code."""
    render = identity.render

    def other(*words: Any) -> Any:
        document = render(*words)
        return replace(document, weights=document.weights[::-1])

    monkeypatch.setattr(identity, "render", other)
    with pytest.raises(CheckpointError, match="trained with another renderer"):
        checkpoint.load(saved[0], build(spec, 3))


def test_a_model_without_a_template_has_a_renderer_too(saved: tuple[Path, Built]) -> None:
    tokenizer, layout = copy(saved[1].tokenizer), saved[1].layout
    before = identity.renderer_hash(tokenizer, layout)
    assert before == saved[1].hashes["renderer"]
    tokenizer.chat_template = None
    assert identity.renderer_hash(tokenizer, layout) != before


@pytest.mark.parametrize("changes", [
    {"lora": None},
    {"train": ("projector",)},
    {"train": ("language", "projector", "vision")},
])  # fmt: skip
def test_other_trained_parts_round_trip(
    spec: ModelSpec, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Full fine-tuning with tied weights, a projector alone, a tower that trains."""
    changed = replace(spec, **changes)
    built, other = build(changed, 0), build(changed, 1)
    checkpoint.save(tmp_path / "one", built, stepped(built))
    assert checkpoint.load(tmp_path / "one", other) is not None
    assert same(tensors(other), tensors(built))
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert ("language.safetensors" in names) == ("lora" in changes)
    assert ("adapter_model.safetensors" in names) == ("vision" in changed.train)


class Bomb:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_no_pickle_is_opened(
    folder: Path, saved: tuple[Path, Built], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Guarantee 13: files that other trainers would unpickle lie there, and are not even read."""
    bombs = ["optimizer.pt", "adapter_model.bin", "pytorch_model.bin", "state.pkl", "encoders.pt",
             "rng_state.pth", "training_args.bin", "last.ckpt"]  # fmt: skip
    for name in bombs:
        (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a pickle was read")

    for owner, name in [(pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"),
                        (torch, "load")]:  # fmt: skip
        monkeypatch.setattr(owner, name, refuse)
    opened: list[str] = []
    path_open = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, *a, **k: (opened.append(self.name), path_open(self, *a, **k))[1]
    )
    assert checkpoint.load(folder, saved[1]) is not None
    assert set(opened) & {"state.json", "manifest.json"}
    assert not set(opened) & set(bombs)
    assert not (tmp_path / "exploded").exists()


def test_a_safetensors_file_that_is_a_pickle_is_refused(
    folder: Path, saved: tuple[Path, Built], tmp_path: Path
) -> None:
    """Even where whoever planted it made the manifest agree."""
    bomb = folder / "encoders.safetensors"
    bomb.write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    manifest = read_manifest(folder)
    manifest["files"][bomb.name] = sha256_of(bomb)
    write_sealed(folder / MANIFEST, manifest)
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load(folder, saved[1])
    assert not (tmp_path / "exploded").exists()


def test_not_a_checkpoint(tmp_path: Path, saved: tuple[Path, Built]) -> None:
    with pytest.raises(CheckpointError, match=r"must have a manifest\.json"):
        verify(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 99, "files": {}}')
    with pytest.raises(CheckpointError, match="has format 99; this version reads 2"):
        verify(tmp_path)


def test_deleting_takes_the_manifest_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed on the way, a deleted checkpoint is not taken for whole."""
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)
    checkpoint.delete(folder)
    with pytest.raises(CheckpointError):
        verify(folder)

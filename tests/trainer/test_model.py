"""Guarantees 3, 5 and 13 in one process: entered once, trains or is frozen, runs no code."""

import json
import pickle
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from plait.encoders import weights
from plait.encoders.base import Encoder, Grid, Inputs
from plait.encoders.layouts.plain import PlainLayout
from plait.encoders.media_encoder import MediaEncoder
from plait.encoders.projectors import create_pool, create_projector
from plait.errors import ConfigError, DataError, ModelError, Origin, PlaitError
from plait.stream import Encoded, Sample, check_placeholders, pack, render
from plait.trainer.build import Built, load_language, load_tokenizer
from plait.trainer.engine.computing import Slice, compute
from plait.trainer.engine.runs import Run
from plait.trainer.model import LEARN, PlaitModel
from plait.trainer.optimiser import StepSettings

TRAIN = [("language", "projector"), ("projector",), ("vision", "projector"), ("vision",)]


def streams(lab: Any) -> dict[str, list[Sample]]:
    text, pictures = lab.samples[2], lab.samples[1]
    bare = Sample(parts=(lab.picture(5), *lab.samples[0].messages[1].parts))
    return {"text": [text, text], "pictures": [bare, bare], "mixed": [text, pictures, bare]}


@pytest.mark.parametrize("train", TRAIN)
@pytest.mark.parametrize("held", ["text", "pictures", "mixed"])
def test_every_trainable_part_is_entered_once(lab: Any, train: tuple[str, ...], held: str) -> None:
    built = lab.build(train=train)
    built.model.train()
    encoder = built.model.media_encoder("hf_vision")
    entered: Counter[str] = Counter()
    for name, module in encoder.projector.named_modules():
        module.register_forward_hook(lambda *_, name=name: entered.update([name]))
    encoder.encoder.register_forward_hook(lambda *_: entered.update(["tower"]))
    built.model.compute(lab.stream(built, streams(lab)[held])).loss.backward()
    if held != "text":
        assert entered.pop("tower") == 1
    # A text-only stream reaches a trainable tower through its parameters, not its forward.
    assert entered.pop("tower", 0) == 0
    if "projector" in train or held != "text":
        names = [name for name, _ in encoder.projector.named_modules()]
        assert entered == Counter(names)
    for part, name, parameter in built.model.trainable():
        assert parameter.grad is not None, name
        reads = held != "text" or part == "language"
        assert bool(parameter.grad.any()) == reads or "lora_A" in name or "key.bias" in name, name


def test_a_model_with_two_encoders_touches_the_one_that_is_not_read(lab: Any) -> None:
    built = with_tower(lab, trainable=True)
    other = lab.build().model.media_encoder("hf_vision")
    built.model.encoders["hf_vision"] = other
    built.model.compute(lab.stream(built, [lab.samples[0]])).loss.backward()
    assert all(p.grad is not None for _, _, p in built.model.trainable())
    assert all(not p.grad.any() for p in other.parameters() if p.requires_grad)


class NormTower(Encoder):
    """A linear map of cells of 8 x 8 pixels, with BatchNorm and dropout."""

    medium = "image"
    width = 8

    def __init__(self, extra: int = 0) -> None:
        super().__init__("norm")
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(192, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.extra = extra

    def plan(self, header: Any) -> Grid:
        return 1, header.height // 8, header.width // 8

    def process(self, array: NDArray[np.uint8]) -> dict[str, Tensor]:
        cells = torch.from_numpy(array.copy()).float().div(255).unfold(0, 8, 8).unfold(1, 8, 8)
        return {"cells": cells.flatten(2).flatten(0, 1)}

    def forward(self, inputs: Sequence[Inputs]) -> list[Encoded]:
        made = [self.net(item["cells"]) for item in inputs]
        return [Encoded(rows[: len(rows) - self.extra]) for rows in made]

    def processing(self) -> str:
        return ""


def with_tower(lab: Any, trainable: bool = False, extra: int = 0) -> Built:
    """The tiny model with a `NormTower` for its pictures."""
    built: Built = lab.build(encoders={})
    generator = torch.Generator().manual_seed(0)
    projector = create_projector("linear", 8, 32, embedding_std=0.1, generator=generator)
    encoder = MediaEncoder(NormTower(extra), create_pool("keep"), projector, trainable)
    model = PlaitModel(built.model.language, {"norm": encoder})
    return replace(built, model=model, layout=PlainLayout({"image": encoder}))


@pytest.mark.parametrize("trainable", [False, True])
def test_batch_norm_never_leaves_eval_and_frozen_towers_keep_nothing(
    lab: Any, trainable: bool
) -> None:
    built = with_tower(lab, trainable)
    tower = built.model.media_encoder("norm").encoder
    stream = lab.stream(built, lab.samples)
    seen: list[tuple[bool, bool]] = []
    tower.register_forward_hook(
        lambda _, __, out: seen.append((torch.is_grad_enabled(), out[0].embeddings.requires_grad))
    )
    for switch in (built.model.train, tower.train, tower.net[1].train):
        switch()
        assert not tower.net[1].training or switch == tower.net[1].train
        before = [buffer.clone() for buffer in tower.buffers()]
        built.model.compute(stream).loss.backward()
        assert all(torch.equal(a, b) for a, b in zip(before, tower.buffers(), strict=True))
        assert not tower.net[1].training and tower.net[2].training == trainable
    assert seen == [(trainable, trainable)] * 3
    assert all((p.grad is not None) == trainable for p in tower.parameters())


def test_an_encoder_that_breaks_its_promise_names_the_row(lab: Any) -> None:
    built = with_tower(lab, extra=1)
    sample = replace(lab.samples[0], origin=Origin("pets", 7, "cat.png"))
    document = render(sample, built.tokenizer, built.layout)
    check_placeholders(document, -1)
    stream = pack([document], [lab.inputs(built, document)])
    with pytest.raises(DataError, match=r"'norm'.*\(dataset pets, row 7, file cat\.png\)"):
        built.model.compute(stream)


def test_media_of_an_unknown_encoder_are_refused(lab: Any) -> None:
    stream = lab.stream(lab.build(), lab.samples)
    with pytest.raises(ModelError, match=r"'hf_vision'.*lacks; it has: norm"):
        with_tower(lab).model.compute(stream)


def learn(run: Run, lab: Any, batches: list[list[int]]) -> None:
    """A forward_backward of the lab's samples, in these micro-batches."""
    documents, _ = lab.documents(run.built, lab.samples)
    run.begin()
    for batch in batches:
        one = Slice(run, [documents[i] for i in batch], LEARN, backward=True)
        [result] = compute([one], lambda document, built: lab.inputs(built, document))
        assert isinstance(result, list), result
    run.finish()


def test_a_trainable_parameter_out_of_reach_is_named(lab: Any) -> None:
    built = lab.build()
    built.model.media_encoder("hf_vision").projector.register_module("lost", nn.Linear(2, 2))
    run = Run("alone", built)
    learn(run, lab, [[0, 1, 2, 3]])
    before = {name: p.clone() for _, name, p in built.model.trainable()}
    with pytest.raises(ModelError, match=r"must train.*hf_vision\.projector\.lost\.weight"):
        run.step(StepSettings(), divide_by_weight=False)
    assert all(torch.equal(before[name], p) for _, name, p in built.model.trainable())


@pytest.mark.parametrize("train", TRAIN)
def test_what_is_marked_trainable_moves_and_nothing_else(lab: Any, train: tuple[str, ...]) -> None:
    built = lab.build(train=train)
    run = Run("alone", built)
    before = {name: value.clone() for name, value in built.model.state_dict().items()}
    learn(run, lab, [[0, 1], [2, 3]])
    run.step(StepSettings(learning_rate=1e-2), divide_by_weight=False)
    trained = {name for _, name, _ in built.model.trainable()}
    assert {part for part, _, _ in built.model.trainable()} == set(train)
    for name, value in built.model.state_dict().items():
        if name not in trained:
            assert torch.equal(value, before[name]), name
        elif "lora_A" not in name and "key.bias" not in name:
            assert not torch.equal(value, before[name]), name


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.write_text, (self.marker, "ran")


def test_a_truncated_language_model_is_refused(lab: Any, tmp_path: Path) -> None:
    shutil.copytree(lab.language, tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    for left in (0, 4, file.stat().st_size // 2):
        file.write_bytes((lab.language / file.name).read_bytes()[:left])
        with pytest.raises(ConfigError, match="holds no language model that loads"):
            load_language(tmp_path / "cut", "float32")


def test_no_pickle_is_ever_read(lab: Any, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for source in (lab.language, lab.vision):
        folder = shutil.copytree(source, tmp_path / source.name)
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(marker)))
    changes: list[dict[str, Any]] = [{"language": str(tmp_path / lab.language.name)}]
    encoder = lab.spec().encoders["image"]
    changes.append({
        "encoders": {"image": replace(encoder, weights=str(tmp_path / lab.vision.name))}
    })  # fmt: skip
    for change in changes:
        with pytest.raises(ConfigError, match=r"safetensors.*pickle"):
            lab.build(**change)
    with pytest.raises(ConfigError, match="safetensors"):
        weights.resolve(changes[0]["language"])
    with pytest.raises(ConfigError, match="safetensors"):  # past the check of names
        load_language(Path(changes[0]["language"]), "float32")
    assert not marker.exists()
    with (tmp_path / lab.language.name / "pytorch_model.bin").open("rb") as file:
        pickle.load(file)
    assert marker.exists()  # the bomb is live


CODE = "from pathlib import Path\nPath({marker!r}).write_text('ran')\nclass Odd: pass\n"
AUTO = {
    "AutoConfig": "odd.Odd",
    "AutoModel": "odd.Odd",
    "AutoModelForCausalLM": "odd.Odd",
    "AutoTokenizer": ["odd.Odd", "odd.Odd"],
    "AutoImageProcessor": "odd.Odd",
}


def booby_trap(source: Path, folder: Path, marker: Path, **facts: Any) -> Path:
    """A copy whose every configuration asks for the code of odd.py."""
    shutil.copytree(source, folder)
    (folder / "odd.py").write_text(CODE.format(marker=str(marker)))
    for file in folder.glob("*config.json"):
        values = json.loads(file.read_text())
        held = facts if file.name == "config.json" else {}
        file.write_text(json.dumps(values | {"auto_map": AUTO} | held))
    return folder


def test_code_in_a_checkpoint_never_runs(lab: Any, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    language = booby_trap(lab.language, tmp_path / "language", marker)
    vision = booby_trap(lab.vision, tmp_path / "vision", marker)
    encoder = replace(lab.spec().encoders["image"], weights=str(vision))
    built = lab.build(language=str(language), encoders={"image": encoder})
    assert type(built.model.language).__name__ == "LlamaForCausalLM"
    built.model.compute(lab.stream(built, lab.samples))

    unknown = booby_trap(lab.language, tmp_path / "odd", marker, model_type="odd")
    for load in (load_tokenizer, load_language):
        try:
            load(unknown, *([] if load is load_tokenizer else ["float32"]))  # type: ignore[operator]
        except PlaitError as error:
            assert str(unknown) in str(error)
        else:
            assert load is load_tokenizer  # whose class does not hang on the model's
    with pytest.raises(ConfigError, match="no language model that loads"):
        load_language(unknown, "float32")
    assert not marker.exists()


def test_an_adapter_pickle_beside_the_weights_is_not_read(lab: Any, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    folder = shutil.copytree(lab.language, tmp_path / "model")
    adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"],
               "base_model_name_or_path": str(folder)}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(PlaitError, match=r"adapter"):
        lab.build(language=str(folder))
    assert not marker.exists()

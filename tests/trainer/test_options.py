"""What trains and how: parts by pattern, kinds of adapters, checkpointing, optimisers by name."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from plait.errors import ConfigError, ModelError, UnknownNameError
from plait.trainer.build import Built
from plait.trainer.engine.runs import Run
from plait.trainer.model import LEARN
from plait.trainer.optimiser import OPTIMIZERS, StepSettings, make_optimizer, prepare_step
from plait.trainer.spec import LoraSpec, ModelSpec


def names(built: Built) -> set[str]:
    return {name for _, name, _ in built.model.trainable()}


def test_a_part_may_be_narrowed_by_a_pattern(lab: Any) -> None:
    whole = lab.build(train=("vision", "projector"))
    some = lab.build(train=(r"vision:layers\.1\.", "projector"))
    chosen = names(some)
    assert chosen < names(whole)
    towers = {name for name in chosen if ".projector." not in name}
    assert towers and all("layers.1." in name for name in towers)
    both = lab.build(train=(r"vision:layers\.0\.", r"vision:layers\.1\."))
    assert names(both) > towers
    layers = lab.build(lora=None, train=(r"language:^model\.layers\.1\.",))
    assert all(name.startswith("language.model.layers.1.") for name in names(layers))


def test_only_what_a_pattern_chooses_moves(lab: Any) -> None:
    built = lab.build(train=(r"vision:layers\.1\.",))
    before = {name: value.clone() for name, value in built.model.state_dict().items()}
    built.model.compute(lab.stream(built, lab.samples)).loss.backward()
    trainable = list(built.model.trainable())
    optimizer = make_optimizer(trainable)
    prepare_step(trainable, optimizer, StepSettings(learning_rate=0.1), 1.0)
    optimizer.step()
    moved = {n for n, v in built.model.state_dict().items() if not torch.equal(v, before[n])}
    assert moved and moved <= names(built)


def test_what_chooses_nothing_or_is_no_pattern_is_refused(lab: Any) -> None:
    with pytest.raises(ConfigError, match=r"chooses no parameter of vision: .*names are like"):
        lab.build(train=("vision:layers_9",))
    with pytest.raises(ConfigError, match=r"regular expression; '\(' is none"):
        ModelSpec(language="x", train=("vision:(",))
    with pytest.raises(UnknownNameError, match="did you mean 'vision'"):
        ModelSpec(language="x", train=("visoin:a",))


@pytest.mark.parametrize("lora", [LoraSpec(rank=3, dora=True), LoraSpec(rank=4, rslora=True)])
def test_other_kinds_of_adapters_are_peft_s(lab: Any, lora: LoraSpec) -> None:
    """Beside a plain one in one row, against peft's own forward on each."""
    from plait.trainer.build import attach

    with pytest.warns(UserWarning, match="one adapter after another"):
        built = lab.build(lora=lora)
    stream = lab.stream(built, lab.samples)
    shared, gradient = lab.gradients(built, [stream])
    assert built.model.backbone.shared is not None
    built.model.backbone.shared.remove()
    built.model.backbone.shared = None
    alone, expected = lab.gradients(built, [stream])
    torch.testing.assert_close(shared, alone, rtol=1e-5, atol=0)
    assert (gradient - expected).norm() <= 1e-5 * expected.norm()
    if lora.rslora:
        layer = built.model.language.model.layers[0].self_attn.q_proj
        assert layer.scaling["default"] == pytest.approx(32 / 4**0.5)
    attach(built.base, replace(built.spec, lora=LoraSpec(rank=2)), 1, adapter="other")


@pytest.fixture
def siglip(tmp_path: Path, tiny_vision: Path) -> str:
    """A tower that drops keywords: what its layers may see is told by a context."""
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        image_size=32, patch_size=8,
    )  # fmt: skip
    SiglipVisionModel(config).save_pretrained(tmp_path / "siglip")
    for file in tiny_vision.glob("preprocessor*"):
        (tmp_path / "siglip" / file.name).write_bytes(file.read_bytes())
    return str(tmp_path / "siglip")


def test_checkpointing_computes_the_same_and_keeps_less(lab: Any, siglip: str) -> None:
    encoder = replace(lab.spec().encoders["image"], weights=siglip)
    facts: dict[str, Any] = {"encoders": {"image": encoder}, "train": ("vision", "language")}

    def kept(built: Built) -> tuple[Tensor, Tensor, int]:
        saved: list[int] = []
        built.model.train()
        stream = lab.stream(built, lab.samples)

        def count(tensor: Tensor) -> Tensor:
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            losses, gradient = lab.gradients(built, [stream])
        return losses, gradient, sum(saved)

    plain = lab.build(**facts)
    again = lab.build(**facts, checkpointing=("vision", "language"))
    losses, gradient, memory = kept(plain)
    found, gradients, less = kept(again)
    torch.testing.assert_close(found, losses, rtol=1e-6, atol=0)
    assert (gradients - gradient).norm() <= 1e-6 * gradient.norm()
    assert less < memory


def test_what_cannot_be_checkpointed_is_refused(lab: Any) -> None:
    with pytest.raises(ConfigError, match="checkpointing names audio, which this model lacks"):
        lab.build(checkpointing=("audio",))
    with pytest.raises(UnknownNameError, match=r"part in model\.checkpointing 'projector'"):
        lab.build(checkpointing=("projector",))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimisers_are_torch_s_by_name(name: str) -> None:
    """Three steps with torch's own class, and through ours."""
    torch.manual_seed(0)
    mine, theirs = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.empty(3, 2))
    theirs.data.copy_(mine.data)
    options: dict[str, Any] = {"momentum": 0.5} if name in ("sgd", "rmsprop") else {}
    settings = StepSettings(optimizer=name, learning_rate=0.1, weight_decay=0.01, options=options)
    trainable = [("language", "w", mine)]
    optimizer = make_optimizer(trainable, name, settings.arguments)
    kind: Any = OPTIMIZERS[name]
    other = kind([theirs], lr=0.1, weight_decay=0.01, **settings.arguments)
    for _ in range(3):
        gradient = torch.randn(3, 2)
        mine.grad, theirs.grad = gradient.clone(), gradient.clone()
        prepare_step(trainable, optimizer, settings, 1.0)
        optimizer.step()
        other.step()
    torch.testing.assert_close(mine, theirs)


def test_an_optimiser_is_kept_and_its_options_are_known(lab: Any) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'adamax'"):
        StepSettings(optimizer="adamx")
    with pytest.raises(UnknownNameError, match="option of optimizer 'sgd' 'momentun'"):
        StepSettings(optimizer="sgd", options={"momentun": 0.9})
    for wrong in ({"momentum": -1.0}, {"momentum": "x"}, {"nesterov": True}):
        with pytest.raises(ConfigError, match="optimizer 'sgd' refuses its options"):
            make_optimizer([("language", "w", nn.Parameter(torch.ones(2)))], "sgd", wrong)
    built = lab.build()
    run = Run("alone", built)
    sums = built.model.compute(lab.stream(built, lab.samples), LEARN)
    sums.loss.backward()
    run.finish()
    run.step(StepSettings(optimizer="sgd"), divide_by_weight=False)
    run.gradients = [torch.ones_like(p) for *_, p in run.trainable]
    with pytest.raises(ModelError, match="keeps its optimiser: this one began with SGD"):
        run.step(StepSettings(), divide_by_weight=False)


def test_parts_have_weight_decays_of_their_own(lab: Any) -> None:
    built = lab.build()
    trainable = list(built.model.trainable())
    for *_, parameter in trainable:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = make_optimizer(trainable)
    settings = StepSettings(weight_decay=0.1, part_weight_decays={"projector": 0.3})
    prepare_step(trainable, optimizer, settings, 1.0)
    found = {(group["part"], group["decays"]): group["weight_decay"]
             for group in optimizer.param_groups}  # fmt: skip
    assert found == {("language", True): 0.1, ("projector", True): 0.3, ("projector", False): 0}

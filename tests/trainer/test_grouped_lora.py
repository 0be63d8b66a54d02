"""Rows of several adapters: each document's logits and gradients are those of its run alone."""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plait.encoders import attention
from plait.errors import ModelError
from plait.kernels.interval_attention import Intervals
from plait.trainer.grouped_lora import GroupedLora, Stretches

RANKS = {"anna": 2, "ben": 5, "cleo": 16}
DOCUMENTS = [("ben", 7), ("anna", 1), (None, 4), ("ben", 3), ("cleo", 9), ("cleo", 2), ("anna", 6)]
NAMES = [name for name, _ in DOCUMENTS]
LENGTHS = [length for _, length in DOCUMENTS]
BOUNDS = [(sum(LENGTHS[:i]), sum(LENGTHS[: i + 1])) for i in range(len(LENGTHS))]
LENGTH = sum(LENGTHS)


def language(**options: Any) -> Any:
    """A random Llama of two layers with an adapter of each rank, all of which train.

    `options` are peft's; a dictionary gives each adapter its own value.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import LlamaConfig, LlamaForCausalLM

    attention.register()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1,
            attn_implementation=attention.NAME,
        )
    )  # fmt: skip
    model.requires_grad_(False)
    for name, rank in RANKS.items():
        mine = {k: v[name] if isinstance(v, dict) else v for k, v in options.items()}
        targets = mine.pop("target_modules", "all-linear")
        if targets == "all-linear":
            targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        config = LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=targets, **mine)
        inject_adapter_in_model(config, model, adapter_name=name)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)
            if "magnitude" not in name:
                parameter.data.normal_(std=0.08, generator=generator)
    return model


IDS = torch.randint(0, 50, (LENGTH,), generator=torch.Generator().manual_seed(2))


def row_of(model: Any) -> Tensor:
    """(T, V) logits of the packed row."""
    lo = torch.cat([torch.full((stop - start,), start) for start, stop in BOUNDS])
    visible = Intervals(lo, torch.arange(1, LENGTH + 1))
    positions = torch.arange(LENGTH) - lo
    logits: Tensor = model(
        input_ids=IDS[None], position_ids=positions[None], visible=visible, use_cache=False
    ).logits[0]
    return logits


def alone(model: Any) -> Tensor:
    """(T, V) logits of each document by itself, through peft's own switch of adapters."""
    found = []
    for name, (start, stop) in zip(NAMES, BOUNDS, strict=True):
        activate(model, name)
        size = stop - start
        visible = Intervals(torch.zeros(size, dtype=torch.long), torch.arange(1, size + 1))
        found.append(model(input_ids=IDS[None, start:stop], visible=visible).logits[0])
    return torch.cat(found)


def activate(model: Any, name: str | None) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(name is not None)
            if name is not None:
                module.set_adapter(name)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in parameter_name)


def gradients(model: Any, logits: Tensor) -> dict[str, Tensor]:
    """Of a loss that weighs every logit differently."""
    seed = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    model.zero_grad(set_to_none=True)
    (logits * seed).sum().backward()  # type: ignore[no-untyped-call]
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check_same(model: Any) -> None:
    """The row equals the documents alone: logits, and the gradients of every tensor."""
    true = alone(model)
    want = gradients(model, true)
    activate(model, "anna")
    with GroupedLora(model) as adapters, adapters.on(NAMES, BOUNDS):
        logits = row_of(model)
        have = gradients(model, logits)
    torch.testing.assert_close(logits, true, rtol=1e-5, atol=2e-6)
    assert want.keys() <= have.keys()
    for name, gradient in have.items():
        value = want.get(name, torch.zeros_like(gradient))
        assert (gradient - value).norm() <= 1e-5 * value.norm() + 1e-9, name


@pytest.fixture
def no_warning() -> Iterator[None]:
    """No layer may take the plain path."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*one adapter after another.*")
        yield


def test_a_mixed_row_gives_each_adapter_what_its_run_alone_gives(no_warning: None) -> None:
    check_same(language())


def test_an_adapter_whose_scale_was_changed_uses_it(no_warning: None) -> None:
    model = language()
    model.model.layers[1].mlp.up_proj.set_scale("ben", 0.3)
    check_same(model)


def test_adapters_of_different_layers_share_a_row(no_warning: None) -> None:
    targets = {"anna": ["q_proj", "down_proj"], "ben": ["q_proj", "v_proj"], "cleo": "all-linear"}
    check_same(language(target_modules=targets))


def test_one_adapter_over_the_whole_row_is_pefts_own_forward() -> None:
    model = language()
    activate(model, "ben")
    want = row_of(model)
    with GroupedLora(model) as adapters, adapters.on(["ben"], [(0, LENGTH)]):
        have = row_of(model)
    torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-6)


def test_an_adapter_without_documents_gets_no_gradient_from_the_row() -> None:
    model = language()
    with GroupedLora(model) as adapters, adapters.on(["ben", "cleo"], [(0, 5), (5, LENGTH)]):
        found = gradients(model, row_of(model))
    assert not any(gradient.any() for name, gradient in found.items() if ".anna." in name)
    assert all(gradient.any() for name, gradient in found.items() if ".ben." in name)


def test_a_16_bit_base_keeps_float32_adapters() -> None:
    model = language()
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    true = alone(model)
    want = gradients(model, true)
    with GroupedLora(model) as adapters, adapters.on(NAMES, BOUNDS):
        logits = row_of(model)
        have = gradients(model, logits)
    assert logits.dtype == torch.bfloat16
    assert (logits - true).norm() < 0.02 * true.norm()
    for name, value in want.items():
        assert have[name].dtype == torch.float32
        assert (have[name] - value).norm() < 0.05 * value.norm(), name


def test_gradient_checkpointing_recomputes_with_the_rows_adapters() -> None:
    model = language()
    with GroupedLora(model) as adapters, adapters.on(NAMES, BOUNDS):
        want = gradients(model, row_of(model))
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        have = gradients(model, row_of(model))
    for name, value in want.items():
        torch.testing.assert_close(have[name], value)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_row_computed_again_where_nobody_describes_it_is_refused(reentrant: bool) -> None:
    model = language()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    with GroupedLora(model) as adapters:
        with adapters.on(NAMES, BOUNDS):
            loss = row_of(model).sum()
        with pytest.raises(ModelError, match="move the backward inside"):
            loss.backward()
        row_of(model).sum().backward()  # described by nobody, before as after


def test_a_base_that_brings_its_weight_from_elsewhere_is_called() -> None:
    model = language()
    activate(model, "anna")
    base = model.model.layers[0].self_attn.q_proj.base_layer
    plain = base.forward
    base.forward = lambda x: plain(x) + 1  # as accelerate's hooks do
    want = row_of(model)
    with GroupedLora(model) as adapters, adapters.on(["anna"], [(0, LENGTH)]):
        torch.testing.assert_close(row_of(model), want)


VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "variant Dora"),
    "one of three is dora": (
        {"use_dora": {"anna": False, "ben": True, "cleo": False}}, "variant Dora",
    ),
    "rslora": ({"use_rslora": True}, "rsLoRA"),
    "bias": ({"lora_bias": True}, "has a bias"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*lora_bias=True.*")
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_runs_plainly_right_and_says_so_once(name: str) -> None:
    options, reason = VARIANTS[name]
    model = language(**options)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        check_same(model)
    plain = [str(w.message) for w in said if "one adapter after another" in str(w.message)]
    assert len(plain) == 1, plain
    assert "Linear over Linear" in plain[0] and reason in plain[0]


def test_embeddings_run_plainly_and_right() -> None:
    targets = ["embed_tokens", "q_proj", "down_proj"]
    with pytest.warns(UserWarning, match="Embedding over Embedding"):
        check_same(language(target_modules=targets))


def test_dropout_runs_plainly_in_training_and_is_grouped_without(no_warning: None) -> None:
    model = language(lora_dropout={"anna": 0.0, "ben": 0.5, "cleo": 0.0})
    model.eval()
    check_same(model)
    model.train()
    warnings.simplefilter("always")
    with GroupedLora(model) as adapters, adapters.on(NAMES, BOUNDS):
        with pytest.warns(UserWarning, match="has dropout"):
            first = row_of(model)
        second = row_of(model)
    changed = (first != second).any(-1)
    ben = torch.cat([torch.full((n,), name == "ben") for name, n in DOCUMENTS])
    assert torch.equal(changed, ben), "dropout is drawn for its adapter's positions alone"


class Mixer(nn.Module):
    """A convolution over positions, between two embeddings of a row."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.conv(x.T[None])[0].T
        return mixed


def test_a_convolution_does_not_mix_documents_and_a_row_that_it_shortens_is_refused() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    model = Mixer()
    for name in RANKS:
        config = LoraConfig(r=2, target_modules=["conv"], init_lora_weights=False)
        inject_adapter_in_model(config, model, adapter_name=name)
    x = torch.randn(LENGTH, 6)
    want = []
    for name, (start, stop) in zip(NAMES, BOUNDS, strict=True):
        activate(model, name)
        want.append(model(x[start:stop]))
    activate(model, "anna")
    with GroupedLora(model) as adapters:
        with adapters.on(NAMES, BOUNDS), pytest.warns(UserWarning, match="Conv1d over Conv1d"):
            torch.testing.assert_close(model(x), torch.cat(want))
        for layer in [model.conv.get_base_layer(), *model.conv.lora_A.values()]:
            layer.padding = (0,)
        refusal = pytest.raises(ModelError, match=f"must read and write the whole row of {LENGTH}")
        with adapters.on(["anna", "ben"], [(0, 10), (10, LENGTH)]), refusal:
            model(x)


def test_merged_adapters_serve_their_own_row_and_no_other() -> None:
    model = language()
    activate(model, "ben")
    want = row_of(model)
    for module in model.modules():
        if hasattr(module, "merge"):
            module.merge(adapter_names=["ben"])
    with GroupedLora(model) as adapters:
        with adapters.on(["ben"], [(0, LENGTH)]), pytest.warns(UserWarning, match="merged into"):
            torch.testing.assert_close(row_of(model), want, rtol=1e-4, atol=1e-5)
        with adapters.on(NAMES, BOUNDS), pytest.raises(ModelError, match="unmerge first"):
            row_of(model)


def test_files_and_names_stay_pefts(tmp_path: Path) -> None:
    from peft import get_peft_model_state_dict

    model = language()
    before = {name: get_peft_model_state_dict(model, adapter_name=name) for name in RANKS}
    keys = list(model.state_dict())
    with GroupedLora(model) as adapters, adapters.on(NAMES, BOUNDS):
        row_of(model)
        assert list(model.state_dict()) == keys
        for name, state in before.items():
            now = get_peft_model_state_dict(model, adapter_name=name)
            assert now.keys() == state.keys()
            assert all(torch.equal(now[key], state[key]) for key in state)


def test_removing_gives_pefts_forward_back() -> None:
    model = language()
    activate(model, "cleo")
    want = row_of(model)
    adapters = GroupedLora(model)
    assert torch.equal(row_of(model), want), "rows that nobody describes are peft's own"
    with adapters.on(NAMES, BOUNDS):
        assert not torch.equal(row_of(model), want)
    assert torch.equal(row_of(model), want)
    adapters.remove()
    adapters.remove()
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert torch.equal(row_of(model), want)


def test_a_forward_that_a_layer_had_of_its_own_comes_back() -> None:
    model = language()
    layer = model.model.layers[0].self_attn.q_proj
    heard: list[torch.Size] = []
    theirs = layer.forward

    def listening(x: Tensor) -> Tensor:
        heard.append(x.shape)
        answer: Tensor = theirs(x)
        return answer

    layer.forward = listening
    with GroupedLora(model):
        pass
    assert layer.__dict__["forward"] is listening
    row_of(model)
    assert heard


def test_disabled_adapters_are_no_adapters() -> None:
    from peft.tuners.lora.layer import LoraLayer

    model = language()
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.enable_adapters(False)
    want = row_of(model)
    with GroupedLora(model) as adapters, adapters.on(NAMES, BOUNDS):
        assert torch.equal(row_of(model), want)


def test_layers_that_run_plainly_keep_the_active_adapter() -> None:
    model = language(use_rslora=True)
    activate(model, "cleo")
    want = row_of(model)
    with GroupedLora(model) as adapters:
        with adapters.on(NAMES, BOUNDS), pytest.warns(UserWarning, match="rsLoRA"):
            row_of(model)
        assert torch.equal(row_of(model), want)


def test_an_adapter_that_comes_later_is_seen() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = language(target_modules=["q_proj"])
    with GroupedLora(model) as adapters:
        config = LoraConfig(r=3, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
        inject_adapter_in_model(config, model, adapter_name="dora")
        activate(model, "anna")
        with adapters.on(["dora", "anna"], [(0, 9), (9, LENGTH)]):
            found = gradients(model, row_of(model))
    assert sum(".dora." in name for name in found) == 8
    layer = model.model.layers[0].self_attn.o_proj
    assert "forward" not in layer.__dict__


def test_what_would_be_computed_with_the_wrong_adapter_is_refused() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = language()
    with GroupedLora(model) as adapters:
        refusal = pytest.raises(ModelError, match="no LoRA layer has an adapter 'dora'")
        with refusal, adapters.on(["dora"], [(0, LENGTH)]):
            pass
        refusal = pytest.raises(ModelError, match=r"whole row of 8 positions; .*q_proj has 32")
        with adapters.on(NAMES[:2], BOUNDS[:2]), refusal:
            row_of(model)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    inject_adapter_in_model(config, model, adapter_name="saves")
    with pytest.raises(ModelError, match="lm_head is a ModulesToSaveWrapper"):
        GroupedLora(model)


@pytest.mark.parametrize("joined", [False, True])
def test_stretches_cover_the_row_gaps_included(joined: bool) -> None:
    stretches = Stretches(["a", "a", None, "a"], [(1, 3), (3, 4), (4, 4), (6, 7)], 9)
    pieces: Sequence[Any] = [(0, 1, None), (1, 4, "a"), (4, 6, None), (6, 7, "a"), (7, 9, None)]
    if not joined:
        pieces = [pieces[0], (1, 3, "a"), (3, 4, "a"), *pieces[2:]]
    assert list(stretches.covering(joined)) == list(pieces)

"""LoRA through peft's layers, named and stored as peft does."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from plait.errors import CheckpointError, ConfigError
from plait.trainer.spec import LoraSpec

_PREFIX = "base_model.model."


def linear_names(model: nn.Module, output: nn.Module | None) -> list[str]:
    """The last name components of every linear layer but the output layer."""
    names = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not output
    }
    return sorted(names)


def add_lora(model: nn.Module, output: nn.Module | None, spec: LoraSpec, seed: int) -> Any:
    """Put an adapter on `model` in place, drawn from `seed`; returns its peft configuration.

    Raises:
        ConfigError: the model has no such layers.
    """
    from peft import LoraConfig, inject_adapter_in_model

    known = linear_names(model, output)
    if not known:
        raise ConfigError(
            f"an adapter needs linear layers and {type(model).__name__} has none but its output "
            "layer: train the whole language model (lora: null), or choose another"
        )
    targets = known if spec.targets == ("all-linear",) else list(spec.targets)
    unknown = [name for name in targets if name not in known]
    if unknown:
        raise ConfigError(
            f"lora.targets names no linear layer: {unknown[0]!r}; known: {', '.join(known)}"
        )
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return config


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors under peft's file names."""
    return {
        _PREFIX + name.replace(".default.", "."): parameter.detach()
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }


def check_exactly(mine: Mapping[str, Tensor], saved: Mapping[str, Tensor], what: str) -> None:
    """Refuse any name or shape that is only on one side."""
    odd = sorted(set(mine) ^ set(saved))
    if odd:
        side = "lacks" if odd[0] in mine else "has an unknown"
        raise CheckpointError(
            f"the saved {what} must fit this model; it {side} tensor {odd[0]!r}: use the "
            "configuration it was trained with"
        )
    for name, tensor in mine.items():
        if tensor.shape != saved[name].shape:
            raise CheckpointError(
                f"the saved {what} must fit this model; {name!r} is "
                f"{tuple(saved[name].shape)} there and {tuple(tensor.shape)} here"
            )


@torch.no_grad()
def copy(mine: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy `saved`, which `check_exactly` passed, into `mine` in place."""
    for name, tensor in mine.items():
        tensor.copy_(saved[name])

"""LoRA through peft's layers, named and stored as peft does."""

import warnings
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from plait.errors import CheckpointError, ConfigError
from plait.trainer.ranks.sharding import fill
from plait.trainer.spec import OUTPUT, LoraSpec

_PREFIX = "base_model.model."


def linear_names(model: nn.Module, output: nn.Module | None) -> list[str]:
    """The last name components of every linear layer but the output layer.

    Layers that have adapters already count as what they were.
    """
    from peft.tuners.lora.layer import LoraLayer

    adapted = [
        name
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and module is not output
    ]
    inside = tuple(f"{name}." for name in adapted)
    names = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not _belongs_to(module, output)
        and not name.startswith(inside)
    }
    return sorted(names | {name.rsplit(".", 1)[-1] for name in adapted})


def _belongs_to(module: nn.Module, output: nn.Module | None) -> bool:
    """Whether it is the output layer, or one of the parts that an adapter gave it."""
    return output is not None and any(module is part for part in output.modules())


def output_factors(
    output: nn.Module, adapter: str | None, hidden: Tensor
) -> tuple[Tensor, Tensor] | None:
    """What an adapter on the output layer adds to the logits, as two factors.

    hidden (P, H) -> down (P, R), and up (V, R): down up^T are the added logits. None where this
    adapter does not reach the output layer.
    """
    layer: Any = output
    if adapter is None or adapter not in getattr(layer, "lora_A", {}):
        return None
    dropped = layer.lora_dropout[adapter](hidden.float())
    down = layer.lora_A[adapter](dropped) * layer.scaling[adapter]
    return down, layer.lora_B[adapter].weight


def add_lora(
    model: nn.Module,
    output: nn.Module | None,
    spec: LoraSpec,
    seed: int,
    adapter: str = "default",
) -> Any:
    """Put an adapter on `model` in place, drawn from `seed`; returns its peft configuration.

    Adapters that are there stay as they are.

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
    targets = _targets(spec, known)
    unknown = [name for name in targets if name not in known and name != OUTPUT]
    if unknown:
        raise ConfigError(
            f"lora.targets names no linear layer: {unknown[0]!r}; known: {', '.join(known)}"
        )
    if OUTPUT in targets:
        targets[targets.index(OUTPUT)] = _name_of(model, output)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        use_dora=spec.dora,
        use_rslora=spec.rslora,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
        warnings.filterwarnings("ignore", ".*tie_word_embeddings.*")  # `Export` unties them
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, adapter)
    for name, parameter in model.named_parameters():
        if f".{adapter}." in name and ".lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    return config


def _targets(spec: LoraSpec, known: list[str]) -> list[str]:
    """Names of layers, `OUTPUT` among them."""
    targets = list(dict.fromkeys(spec.targets))
    if "all-linear" in targets:
        return known + [OUTPUT] * (OUTPUT in targets)
    return targets


def _name_of(model: nn.Module, output: nn.Module | None) -> str:
    """The last component of the output layer's name.

    Raises:
        ConfigError: the model has none of its own.
    """
    for name, module in model.named_modules():
        if module is output and hasattr(module, "weight"):
            return str(name).rsplit(".", 1)[-1]
    raise ConfigError(f"{type(model).__name__} has no output layer that an adapter could stand on")


def remove_lora(model: nn.Module, adapter: str) -> None:
    """Take an adapter off every layer that has it; one that is not there is no error."""
    from peft.tuners.lora.layer import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            layer: Any = module
            # Or peft makes another one active, and says so for each layer.
            layer._active_adapter = [one for one in layer.active_adapters if one != adapter]
            layer.delete_adapter(adapter)
    getattr(model, "peft_config", {}).pop(adapter, None)


def copy_lora(model: nn.Module, source: str, target: str) -> None:
    """Give every layer a frozen copy of adapter `source` under the name `target`."""
    from peft.tuners.lora.layer import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            _copy_entries(module, source, target)


def _copy_entries(layer: Any, source: str, target: str) -> None:
    """All that a layer knows of an adapter stands in mappings by the adapter's name."""
    for name in layer.adapter_layer_names:
        held = getattr(layer, name, {})
        if source in held:
            held[target] = deepcopy(held[source]).requires_grad_(False)
    for value in list(vars(layer).values()):
        if isinstance(value, dict) and source in value:
            value[target] = value[source]
    if source in layer.lora_dropout:
        layer.lora_dropout[target] = nn.Identity()


def adapter_state(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """The adapter's tensors under peft's file names."""
    return {
        _PREFIX + name.replace(f".{adapter}.", "."): parameter.detach()
        for name, parameter in model.named_parameters()
        if ".lora_" in name and f".{adapter}." in name
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


def copy(mine: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy `saved`, which `check_exactly` passed, into `mine` in place."""
    for name, tensor in mine.items():
        fill(tensor, saved[name])

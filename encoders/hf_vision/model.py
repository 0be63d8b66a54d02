"""Loading the vision tower of a transformers checkpoint, with only the parts that are used."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from plait.encoders.attention import prepare_tower
from plait.encoders.checkpoint import SAFE, reading_checkpoint
from plait.errors import ConfigError, UnknownNameError


@dataclass(frozen=True, slots=True)
class Family:
    """What differs between towers.

    `norm` is the norm over all positions after the last layer; `unused` are modules and
    parameters that only serve a pooled output or pre-training; `extra` counts the class tokens
    before the patches; `resizes` says that the forward takes `interpolate_pos_encoding`.
    """

    norm: str = ""
    unused: tuple[str, ...] = ()
    extra: int = 1
    resizes: bool = True


FAMILIES = {
    "clip_vision_model": Family(unused=("post_layernorm",)),
    "siglip_vision_model": Family(norm="post_layernorm", unused=("head",), extra=0),
    "siglip2_vision_model": Family(norm="post_layernorm", unused=("head",), extra=0, resizes=False),
    "dinov2": Family(norm="layernorm", unused=("embeddings.mask_token",), resizes=False),
    "dinov2_with_registers": Family(
        norm="layernorm", unused=("embeddings.mask_token",), resizes=False
    ),
    "vit": Family(norm="layernorm", unused=("pooler", "embeddings.mask_token")),
}


@dataclass(slots=True)
class Tower:
    """A loaded tower, its image processor, and how to call it."""

    model: nn.Module
    config: Any
    processor: Any
    family: Family

    @property
    def extra_tokens(self) -> int:
        """Class tokens and registers, which stand before the patches."""
        return self.family.extra + int(getattr(self.config, "num_register_tokens", 0))


def load_tower(folder: Path, layer: int, dtype: torch.dtype) -> Tower:
    """The tower of a checkpoint folder, ending after the layer asked for.

    Neither code nor pickles of the checkpoint are run; nothing is downloaded.

    Raises:
        ConfigError: the folder is no such checkpoint, lacks weights, or has too few layers.
        UnknownNameError: its family is not supported.
    """
    with reading_checkpoint("hf_vision", folder):
        config = AutoConfig.from_pretrained(folder, **SAFE)
        config = getattr(config, "vision_config", config)
        if config.model_type not in FAMILIES:
            raise UnknownNameError("vision tower", config.model_type, FAMILIES)
        processors: Any = AutoImageProcessor
        processor = processors.from_pretrained(folder, **SAFE)
        model, report = AutoModel.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **prepare_tower(config),
            **SAFE,
        )
    family = FAMILIES[config.model_type]
    _trim(model, config, family, layer)
    absent = sorted(set(report["missing_keys"]) & model.state_dict().keys())
    if absent:
        raise ConfigError(
            f"a vision checkpoint must hold every weight of its tower: {str(folder)!r} lacks "
            f"{absent[0]!r} and {len(absent) - 1} more; take a complete one"
        )
    return Tower(model, config, processor, family)


def _trim(model: nn.Module, config: Any, family: Family, layer: int) -> None:
    """Remove what does not reach the features of `layer`.

    It would take memory and time, and, in a trained tower, stay without gradients.
    """
    if not isinstance(layer, int) or not -config.num_hidden_layers <= layer <= -1:
        raise ConfigError(
            "layer is a whole number that counts from the end: -1 to "
            f"-{config.num_hidden_layers} for this tower; got {layer!r}"
        )
    for name in family.unused:
        _remove(model, name)
    if hasattr(model, "use_head"):
        setattr(model, "use_head", False)  # noqa: B010  (mypy: not a tensor)
    if layer == -1:
        return
    if family.norm:
        setattr(model, family.norm, nn.Identity())
    (layers,) = (
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers
    )
    del layers[layer + 1 :]


def _remove(model: nn.Module, name: str) -> None:
    parent_name, _, attribute = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    held = getattr(parent, attribute, None)
    if isinstance(held, nn.LayerNorm):
        setattr(parent, attribute, nn.Identity())  # the forward calls it whatever is used
    elif held is not None:
        setattr(parent, attribute, None)

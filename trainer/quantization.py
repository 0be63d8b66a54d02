"""QLoRA: the frozen language model's linear layers in 4 bits, through bitsandbytes.

NF4 with double quantization (Dettmers et al. 2023, arXiv 2305.14314), as transformers loads it.
Weights are quantized from float32 whatever the run computes in, so that an export, which compares
in float32, has the very weights that were trained on.
"""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plait.errors import ConfigError, ModelError


def options(folder: Path, dtype: str, device: torch.device | None) -> dict[str, Any]:
    """Arguments for `from_pretrained` that quantize each weight as it is loaded, on the device.

    Args:
        dtype: In which products with the weights are computed.

    Raises:
        ConfigError: bitsandbytes is not installed, or the folder's weights are quantized already.
    """
    _refuse_quantized(folder)
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            "model.quantize 'nf4' needs bitsandbytes, which is not installed: pip install "
            "-c constraints.txt -e '.[qlora]', or leave model.quantize out"
        )
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    return {"quantization_config": config, "device_map": {"": device or torch.device("cpu")}}


def _refuse_quantized(folder: Path) -> None:
    file = folder / "config.json"
    held = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    if "quantization_config" in held:
        method = held["quantization_config"].get("quant_method")
        raise ConfigError(
            f"model.quantize needs weights that are not quantized, and those of {folder} are "
            f"({method}): name the original model, or leave model.quantize out"
        )


def settle(language: Any, dtype: str) -> None:
    """Give a model that was loaded in float32 with `options` the dtype that the run computes in.

    Raises:
        ModelError: it has no linear layer that is quantized.
    """
    layers = list(_quantized_layers(language))
    if not layers:
        raise ModelError(
            f"model.quantize needs linear layers, and {type(language).__name__} has none but its "
            "output layer: leave model.quantize out"
        )
    wanted = getattr(torch, dtype)
    for layer in layers:
        # Where a CPU multiplies in bfloat16, bitsandbytes would lay the weights out anew for
        # evaluation and round to bfloat16: what is sampled would not be what trains.
        layer.support_avx512bf16_for_cpu = False
        layer.weight.quant_state.dtype = wanted  # of what a backward pass multiplies with
    kept = {*(language._keep_in_fp32_modules or ()), *(language._keep_in_fp32_modules_strict or ())}
    for name, parameter in language.named_parameters():
        if parameter.dtype == torch.float32 and kept.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(wanted)


def dequantized(folder: Path) -> Any:
    """The language model as plain float32 layers, with the weights that 4 bits leave of it."""
    from transformers import AutoModelForCausalLM

    language: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True,
        **options(folder, "float32", None),
    )  # fmt: skip
    return language.dequantize(dtype=torch.float32)


def elements(parameter: Tensor) -> int:
    """Of a parameter, two of which share a byte where it is quantized."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())


def _quantized_layers(language: nn.Module) -> Iterator[Any]:
    """By name, for bitsandbytes takes a second to import."""
    for module in language.modules():
        if type(module).__name__ == "Linear4bit":
            yield module

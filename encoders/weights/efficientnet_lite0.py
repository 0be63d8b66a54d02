"""From the published pickle of EfficientNet-Lite0 to safetensors in our names."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from plait.encoders.efficientnet_lite.model import convert_reference_state_dict


def convert(source: Path, target: Path, tell: Callable[[int, int], None]) -> None:
    """Write weights and config of the one `.pth` file under `source` into `target`.

    Args:
        tell: Called with the tensors done and their number.
    """
    file = next(source.rglob("*.pth"))
    state = torch.load(file, map_location="cpu", weights_only=True)
    ours = {name: t.contiguous() for name, t in convert_reference_state_dict(state).items()}
    save_file(ours, target / "model.safetensors", metadata={"format": "pt"})
    config = {"architecture": "efficientnet_lite0"}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tell(len(ours), len(ours))

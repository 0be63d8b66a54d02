"""From the published pickle of aiSFX to safetensors in our names."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from plait.encoders.sound_cnn.encoder import ARCHITECTURE
from plait.encoders.sound_cnn.model import convert_reference_state_dict

_NUMPY = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype")


def convert(source: Path, target: Path, tell: Callable[[int, int], None]) -> None:
    """Write weights and config of the one `.pth` file under `source` into `target`.

    Args:
        tell: Called with the tensors done and their number.
    """
    state = read_weights(next(source.rglob("checkpoint.pth")))
    ours = {name: t.contiguous() for name, t in convert_reference_state_dict(state).items()}
    save_file(ours, target / "model.safetensors", metadata={"format": "pt"})
    config = {"architecture": ARCHITECTURE}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tell(len(ours), len(ours))


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of the checkpoint, by name; nothing of the pickle runs.

    Beside them lie the names of the training libraries with numbers of numpy's. Those are not
    needed, so where the pickle asks for numpy, torch's own reader is given something that does
    nothing; anything else it asks for is refused.
    """
    stand_ins: list[Any] = [(_Ignored, name) for name in _NUMPY]
    with torch.serialization.safe_globals(stand_ins):
        state, _ = torch.load(file, map_location="cpu", weights_only=True)
    return dict(state)


class _Ignored:
    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass

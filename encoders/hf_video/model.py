"""Loading the tower of a VideoMAE checkpoint, without what only pre-training used."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from plait.encoders.attention import prepare_tower
from plait.encoders.checkpoint import SAFE, reading_checkpoint
from plait.encoders.hf_vision.sizes import check_plannable, processed_size
from plait.errors import ConfigError, UnknownNameError

FAMILIES = ("videomae",)


@dataclass(slots=True)
class Tower:
    """A loaded tower and its processor; `patch` and `image` are (height, width) in pixels."""

    model: nn.Module
    processor: Any
    width: int
    frames: int
    tubelet: int
    patch: tuple[int, int]
    image: tuple[int, int]


def load_tower(folder: Path, dtype: torch.dtype) -> Tower:
    """The encoder of a checkpoint folder; a decoder and heads are not taken.

    Neither code nor pickles of the checkpoint are run; nothing is downloaded.

    Raises:
        ConfigError: the folder is no such checkpoint, lacks weights, or its processor makes
            pictures of another size than the tower reads.
        UnknownNameError: its family is not supported.
    """
    with reading_checkpoint("hf_video", folder):
        config = AutoConfig.from_pretrained(folder, **SAFE)
        if config.model_type not in FAMILIES:
            raise UnknownNameError("video tower", config.model_type, FAMILIES)
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
    if report["missing_keys"]:
        raise ConfigError(
            f"a video checkpoint must hold every weight of its tower: {str(folder)!r} lacks "
            f"{min(report['missing_keys'])!r}; take a complete one"
        )
    tower = Tower(
        model,
        processor,
        int(config.hidden_size),
        int(config.num_frames),
        int(config.tubelet_size),
        _pair(config.patch_size),
        _pair(config.image_size),
    )
    _check_size(tower)
    return tower


def _check_size(tower: Tower) -> None:
    check_plannable(tower.processor, "hf_video")
    made = {processed_size(tower.processor, *shape) for shape in ((300, 500), (500, 300))}
    if made != {tower.image}:
        raise ConfigError(
            f"a VideoMAE tower reads pictures of one size, {tower.image}; its processor makes "
            f"{sorted(made)}: mend size and crop_size in its preprocessor_config.json"
        )


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)

"""Loading the sound tower of a transformers checkpoint, with only the parts that are used."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoFeatureExtractor, HubertModel, Wav2Vec2Model, WavLMModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from plait.encoders.attention import prepare_tower, switch_off_dropout
from plait.encoders.checkpoint import SAFE, reading_checkpoint
from plait.encoders.hf_audio.tower import Tower
from plait.encoders.hf_audio.waveform import WaveformTower
from plait.encoders.hf_audio.whisper import WhisperTower
from plait.errors import ConfigError, UnknownNameError

NAME = "hf_audio"


@dataclass(frozen=True, slots=True)
class Family:
    """How transformers' model of a family is read.

    `names` maps names of weights, as regular expressions, to those of `model`, for a tower that
    is only a part of the checkpoint. `own_attention` says that transformers lets nobody replace
    its attention (WavLM adds a bias to scores that no other family has).
    """

    model: Any
    tower: Callable[[Any, Any, Any], Tower]
    names: dict[str, str] | None = None
    own_attention: bool = False


FAMILIES = {
    "whisper": Family(WhisperEncoder, WhisperTower, {r"^(model\.)?encoder\.": ""}),
    "wav2vec2": Family(Wav2Vec2Model, WaveformTower),
    "hubert": Family(HubertModel, WaveformTower),
    "wavlm": Family(WavLMModel, WaveformTower, own_attention=True),
}


def load_tower(folder: Path, layer: int, dtype: torch.dtype) -> Tower:
    """The tower of a checkpoint folder, ending after the layer asked for.

    Neither code nor pickles of the checkpoint are run; nothing is downloaded.

    Raises:
        ConfigError: the folder is no such checkpoint, lacks weights, or has too few layers.
        UnknownNameError: its family is not supported.
    """
    with reading_checkpoint(NAME, folder):
        config = AutoConfig.from_pretrained(folder, **SAFE)
        if config.model_type not in FAMILIES:
            raise UnknownNameError("sound tower", config.model_type, FAMILIES)
        family = FAMILIES[config.model_type]
        extractors: Any = AutoFeatureExtractor
        extractor = extractors.from_pretrained(folder, **SAFE)
        # Layers that are skipped at random would leave parameters without gradients.
        config.layerdrop = config.encoder_layerdrop = 0.0
        switch_off_dropout(config)
        options = {} if family.own_attention else prepare_tower(config)
        model, report = family.model.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            key_mapping=family.names,
            use_safetensors=True,
            output_loading_info=True,
            **options,
            **SAFE,
        )
    absent = sorted(set(report["missing_keys"]) - {"masked_spec_embed"})
    if absent:
        raise ConfigError(
            f"a sound checkpoint must hold every weight of its tower: {str(folder)!r} lacks "
            f"{absent[0]!r} and {len(absent) - 1} more; take a complete one"
        )
    tower = family.tower(model, config, extractor)
    if not isinstance(layer, int) or not -tower.depth <= layer <= -1:
        raise ConfigError(
            "layer is a whole number that counts from the end: -1 to "
            f"-{tower.depth} for this tower; got {layer!r}"
        )
    if layer < -1:
        tower.cut(layer)
    return tower

"""From CTranslate2's Whisper (English only) to the folder that transformers loads.

The weights stay float16, as they were published; the model is whole, so that it can transcribe.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from plait.encoders.weights.ctranslate2 import layers, variables

_Tensors = dict[str, NDArray[Any]]

_GELU = 3
_MODULES = {
    "self_attention/layer_norm": "self_attn_layer_norm",
    "attention/layer_norm": "encoder_attn_layer_norm",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
    "layer_norm": "layer_norm",
    "conv1": "conv1",
    "conv2": "conv2",
    "embeddings": "embed_tokens",
    "position_encodings": "embed_positions",
}
_LEAVES = {"gamma": "weight", "beta": "bias", "encodings": "weight"}
_JOINED = {
    "self_attention/linear_0": ("self_attn", "qkv"),
    "self_attention/linear_1": ("self_attn", "o"),
    "attention/linear_0": ("encoder_attn", "q"),
    "attention/linear_1": ("encoder_attn", "kv"),
    "attention/linear_2": ("encoder_attn", "o"),
}
_PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}


def convert(source: Path, target: Path, tell: Callable[[int, int], None]) -> None:
    """Write config, weights, tokenizer and preprocessor of the one model under `source`.

    Args:
        tell: Called with the variables done and their number.
    """
    file = next(source.rglob("model.bin"))
    held = variables(file, "WhisperSpec")
    facts = {name: int(value) for name, value in held.items() if value.ndim == 0}
    if facts["decoder/activation"] != _GELU or facts["decoder/scale_embeddings"]:
        raise ValueError("a Whisper with GELU and unscaled embeddings was expected")
    weights = {name: value for name, value in held.items() if value.ndim}
    tensors: _Tensors = {}
    for done, (name, value) in enumerate(weights.items(), 1):
        tensors |= hf_tensors(name, value)
        tell(done, len(weights))
    said = json.loads((file.parent / "config.json").read_text(encoding="utf-8"))
    tokenizer = json.loads((file.parent / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    _write(target / "config.json", _config(weights, facts, ids))
    _write(target / "generation_config.json", _generation(said, ids))
    _write(target / "preprocessor_config.json", _preprocessor(weights))
    _write(target / "tokenizer_config.json", _TOKENIZER)
    shutil.copyfile(file.parent / "tokenizer.json", target / "tokenizer.json")
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def hf_tensors(name: str, value: NDArray[Any]) -> _Tensors:
    """transformers' tensors of one variable: joined projections are split into equal parts.

    transformers' k_proj has no bias; here it is zero.
    """
    match = re.fullmatch(r"(encoder|decoder)/(?:layer_(\d+)/)?(.+)/(\w+)", name)
    if match is None or match[3] not in _MODULES | _JOINED:
        raise ValueError(f"unexpected variable {name!r}")
    part, layer, module, leaf = match.groups()
    prefix = f"model.{part}." + (f"layers.{layer}." if layer else "")
    leaf = _LEAVES.get(leaf, leaf)
    if module in _MODULES:
        return {f"{prefix}{_MODULES[module]}.{leaf}": np.ascontiguousarray(value)}
    attention, letters = _JOINED[module]
    parts = dict(zip(letters, np.split(value, len(letters)), strict=True))
    if leaf == "bias" and "k" in parts and np.any(parts.pop("k")):
        raise ValueError(f"{name!r} has a bias for its keys, which Whisper has not")
    return {
        f"{prefix}{attention}.{_PROJECTIONS[letter]}.{leaf}": np.ascontiguousarray(values)
        for letter, values in parts.items()
    }


def _config(weights: _Tensors, facts: dict[str, int], ids: dict[str, int]) -> dict[str, Any]:
    width, bins, _ = weights["encoder/conv1/weight"].shape
    end = ids["<|endoftext|>"]
    shared = {
        f"{part}_{what}": value
        for part in ("encoder", "decoder")
        for what, value in (
            ("layers", layers(weights, part)),
            ("attention_heads", facts[f"{part}/num_heads"]),
            ("ffn_dim", len(weights[f"{part}/layer_0/ffn/linear_0/bias"])),
        )
    }
    return shared | {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "d_model": width,
        "num_mel_bins": bins,
        "max_source_positions": len(weights["encoder/position_encodings/encodings"]),
        "max_target_positions": len(weights["decoder/position_encodings/encodings"]),
        "vocab_size": len(weights["decoder/embeddings/weight"]),
        "activation_function": "gelu",
        "scale_embedding": False,
        "tie_word_embeddings": True,
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "decoder_start_token_id": ids["<|startoftranscript|>"],
        "dtype": "float16",
    }


def _generation(said: dict[str, Any], ids: dict[str, int]) -> dict[str, Any]:
    end = ids["<|endoftext|>"]
    return {
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "decoder_start_token_id": ids["<|startoftranscript|>"],
        "no_timestamps_token_id": ids["<|notimestamps|>"],
        "prev_sot_token_id": ids["<|startofprev|>"],
        "suppress_tokens": said["suppress_ids"],
        "begin_suppress_tokens": said["suppress_ids_begin"],
        "alignment_heads": said["alignment_heads"],
        "is_multilingual": False,
        "return_timestamps": False,
        "max_length": 448,
    }


def _preprocessor(weights: _Tensors) -> dict[str, Any]:
    return {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": weights["encoder/conv1/weight"].shape[1],
        "sampling_rate": 16_000,
        "hop_length": 160,
        "n_fft": 400,
        "chunk_length": 30,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": False,
    }


_TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|endoftext|>",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "model_max_length": 448,
    "clean_up_tokenization_spaces": False,
}


def _write(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

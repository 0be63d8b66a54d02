"""From llama.cpp's GGUF file of SmolLM2 to the folder that transformers loads.

transformers can read the file itself, in 35 seconds because it parses it several times; one pass
takes 7. tests/encoders/test_weights.py compares the two, tensor by tensor.

The file's weights are 4-bit blocks (Q4_1; the embedding is Q8_0), scale * integer + offset. Neither
float16 nor bfloat16 holds the products exactly (42 % and 79 % change), so float32 is written.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

_SPLIT_DIGITS, _CONTROL_TOKEN = "smollm", 3

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(source: Path, target: Path, tell: Callable[[int, int], None]) -> None:
    """Write config, weights and tokenizer of the one GGUF file under `source` into `target`.

    Args:
        tell: Called with the tensors done and their number.
    """
    reader = GGUFReader(next(source.rglob("*.gguf")))
    facts = {name: field.contents() for name, field in reader.fields.items()}
    if facts["general.architecture"] != "llama" or facts["tokenizer.ggml.model"] != "gpt2":
        raise ValueError("a Llama model with a byte-level BPE tokenizer was expected")
    tensors: dict[str, NDArray[Any]] = {}
    for done, tensor in enumerate(reader.tensors, 1):
        weights = dequantize(tensor.data, tensor.tensor_type)
        name = hf_name(tensor.name)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            kind = "head_count" if "q_proj" in name else "head_count_kv"
            weights = unpermute(weights, facts[f"llama.attention.{kind}"])
        tensors[name] = np.ascontiguousarray(weights)
        tell(done, len(reader.tensors))
    tied = "output.weight" not in {tensor.name for tensor in reader.tensors}
    quantised = sorted({tensor.tensor_type.name for tensor in reader.tensors})
    _write(target / "config.json", _config(facts, tied, quantised))
    _write_tokenizer(facts, target)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def hf_name(name: str) -> str:
    """transformers' name of a llama.cpp tensor."""
    if name == "output.weight":
        return "lm_head.weight"
    block = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
    if block is None or block[2] not in _NAMES:
        raise ValueError(f"unexpected tensor {name!r}")
    layer = f"model.layers.{block[1]}." if block[1] else ""
    return f"{layer}{_NAMES[block[2]]}.weight"


def unpermute(weights: NDArray[Any], heads: int) -> NDArray[Any]:
    """Undo llama.cpp's reordering of q and k (it rotates neighbours, transformers halves)."""
    half = weights.shape[0] // heads // 2
    pairs = weights.reshape(heads, half, 2, weights.shape[1])
    return pairs.swapaxes(1, 2).reshape(weights.shape)


def _config(facts: dict[str, Any], tied: bool, quantised: list[str]) -> dict[str, Any]:
    heads = facts["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": facts["llama.embedding_length"],
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "head_dim": facts["llama.embedding_length"] // heads,
        "max_position_embeddings": facts["llama.context_length"],
        "rms_norm_eps": facts["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": facts["llama.rope.freq_base"],
        "vocab_size": len(facts["tokenizer.ggml.tokens"]),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "pad_token_id": facts["tokenizer.ggml.padding_token_id"],
        "dtype": "float32",
        "dequantized_from": {"format": "GGUF", "bits": 4, "types": quantised},
    }


def _write_tokenizer(facts: dict[str, Any], target: Path) -> None:
    tokens = facts["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    splits: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if facts["tokenizer.ggml.pre"] == _SPLIT_DIGITS:
        splits.insert(0, pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.ByteLevel()
    kinds = facts["tokenizer.ggml.token_type"]
    controls = [t for t, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in controls])
    tokenizer.save(str(target / "tokenizer.json"))
    named = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    settings = {
        f"{ours}_token": tokens[facts[f"tokenizer.ggml.{theirs}_token_id"]]
        for ours, theirs in named.items()
    }
    settings |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": facts["llama.context_length"],
        "clean_up_tokenization_spaces": False,
    }
    _write(target / "tokenizer_config.json", settings)
    (target / "chat_template.jinja").write_text(facts["tokenizer.chat_template"], encoding="utf-8")


def _write(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

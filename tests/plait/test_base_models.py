"""Sampling from a base model, also one that no adapter fits."""

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from plait.client import ServiceClient
from plait.errors import ConfigError
from plait.types import ModelInput, SamplingParams


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, tiny_language: Path) -> Path:
    """Its linear layers are transformers' Conv1D."""
    folder = tmp_path_factory.mktemp("gpt2")
    config = GPT2Config(vocab_size=320, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    torch.manual_seed(7)
    GPT2LMHeadModel(config).save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(tiny_language).save_pretrained(folder)
    return folder


def test_an_adapter_without_layers_is_refused(gpt2: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="GPT2LMHeadModel has none but its output layer"):
        ServiceClient(tmp_path).create_lora_training_client(str(gpt2), train=["language"])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_base_model_answers_as_transformers_would(
    kind: str, gpt2: Path, tiny_language: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = {"llama": tiny_language, "gpt2": gpt2}[kind]
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = [5, 9, 12]
    with ServiceClient(tmp_path).create_sampling_client(base_model=str(folder)) as client:
        assert not [name for name, _ in client._built.model.named_parameters() if "lora" in name]
        params = SamplingParams(max_tokens=4, temperature=0.0, stop=())
        row = client.sample(ModelInput.from_ints(tokens), 1, params).result().sequences[0]
        allowed = len(client.get_tokenizer())
    for token, logprob in zip(row.tokens, row.logprobs, strict=True):
        with torch.no_grad():
            logits = plain(torch.tensor([tokens])).logits[0, -1]
        assert token == int(logits[:allowed].argmax())
        assert logprob == pytest.approx(float(logits.log_softmax(-1)[token]), abs=1e-4)
        tokens.append(token)

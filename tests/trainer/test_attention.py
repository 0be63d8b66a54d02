"""What a language model asks of attention and logits is computed, or refused by name."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

from plait.errors import ModelError
from plait.trainer.model import PlaitModel


class DropsKeywords(nn.Module):
    """A layer of a family that hands no keywords on to its attention."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, visible: Any = None, **kwargs: Any) -> Any:
        del visible
        return self.inner(*args, **kwargs)


def test_a_family_that_drops_the_intervals_is_refused(lab: Any) -> None:
    built = lab.build()
    layers = built.model.backbone.decoder.layers
    layers[1].self_attn = DropsKeywords(layers[1].self_attn)
    with pytest.raises(ModelError, match=r"LlamaAttention.*`visible`.*attention\.attending"):
        built.model.compute(lab.stream(built, lab.samples))


def test_attention_dropout_is_refused_when_the_model_is_loaded(lab: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(lab.language, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    with pytest.raises(ModelError, match=r"attention dropout must be 0.*0\.1.*config\.json"):
        lab.build(language=str(folder))


def gemma2(folder: Path, tokenizer: Path, **options: Any) -> Path:
    config = Gemma2Config(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, query_pre_attn_scalar=8, sliding_window=6,
        **options,
    )  # fmt: skip
    torch.manual_seed(0)
    Gemma2ForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("options", [
    {"attn_logit_softcapping": 0.2, "final_logit_softcapping": None},
    {"attn_logit_softcapping": None, "final_logit_softcapping": 0.5},
    {"attn_logit_softcapping": 0.2, "final_logit_softcapping": 0.5},
])  # fmt: skip
def test_caps_on_scores_and_on_logits_are_kept(
    lab: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    built = lab.build(language=str(gemma2(tmp_path / "b", lab.language, **options)), lora=None)
    stream = lab.stream(built, [lab.sample("a red disc", "what is it, a bar or a big cross ")])
    with torch.no_grad():
        sums = built.model.compute(stream)
        logits = built.model.logits(built.model.hidden(stream)[0])
    built.model.language.set_attn_implementation("eager")
    with torch.no_grad():
        expected = built.model.language(input_ids=stream.token_ids[None]).logits[0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    right = expected.log_softmax(-1).gather(-1, stream.targets[:, None])[:, 0][sums.index]
    torch.testing.assert_close(sums.logprobs, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("facts", "named"),
    [
        ({"logit_scale": 0.25}, r"logit_scale=0\.25"),
        ({"logits_scaling": 8.0}, r"logits_scaling=8\.0"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
    ],
)
def test_what_would_silently_change_logits_is_refused(facts: dict[str, Any], named: str) -> None:
    text = SimpleNamespace(**facts)
    language = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))
    with pytest.raises(ModelError, match=named):
        PlaitModel(language, {})

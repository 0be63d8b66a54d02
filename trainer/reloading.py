"""Loads an export as anybody would, with transformers and peft alone, and says what it computes.

    python -I reloading.py JOB.json

It runs in a process of its own, by its path, and imports nothing of Plait: an export must not need
it. The job names `model` (a folder), `quantize` ("nf4" or null), `adapter` (a folder or null),
`tokenizer` (a folder), `rows` (token ids), `messages` (a conversation or null), and where to write
`logits` (safetensors, one tensor for each row) and `facts` (JSON).
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig


def load(job: dict[str, Any]) -> Any:
    """The model in float32, whatever its files hold: what is compared is the weights.

    Quantized ones are made plain again, because some CPUs multiply with them in bfloat16.
    """
    more: dict[str, Any] = {}
    if job["quantize"] is not None:
        more["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=job["quantize"],
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
        more["device_map"] = "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch.float32, trust_remote_code=False, use_safetensors=True, **more
    )
    if job["quantize"] is not None:
        model = model.dequantize(dtype=torch.float32)
    if job["adapter"] is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, job["adapter"])
    return model.eval()


def main(file: str) -> None:
    job = json.loads(Path(file).read_text(encoding="utf-8"))
    model = load(job)
    with torch.inference_mode():
        logits = {
            str(number): model(torch.tensor([row])).logits[0].float().contiguous()
            for number, row in enumerate(job["rows"])
        }
    save_file(logits, job["logits"])
    tokenizer: Any = AutoTokenizer.from_pretrained(job["tokenizer"], trust_remote_code=False)
    text = None
    if job["messages"] is not None:
        text = tokenizer.apply_chat_template(job["messages"], tokenize=False)
    facts = {"text": text, "plait": any(name.split(".")[0] == "plait" for name in sys.modules)}
    Path(job["facts"]).write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])

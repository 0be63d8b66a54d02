"""A whole LoRA step of a 7B-shaped model on a GPU, as a share of what its multipliers can do.

    python -m benchmarks.step_large --json

Qwen2.5-7B's shape with random bf16 weights, rank-16 adapters on every linear layer, one packed row
of documents that each hold a picture of 576 cached positions; forward, backward and AdamW. The
rate is that of operations which the step needs (nothing is recomputed, frozen weights get no
gradient), beside the rate of a plain bf16 product measured in the same run. First a model of two
layers must give the loss and the gradients that attention in float64 with a dense mask and cross
entropy on all logits give.
"""

import argparse
import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.cuda_timing import matmul_rate, medians
from benchmarks.step_model import PICTURE, Row, build, document
from benchmarks.timing import apart, largest, machine
from plait.encoders import attention
from plait.stream import TokenStream, pack
from plait.trainer.model import PlaitModel

DOCUMENT, PATCHES, CHANNELS = 1024, 576, 1152
LEARNED = 112
"""Positions of a document, of its picture, channels of its features, and tokens learned."""

LARGE_MEMORY = 100e9
TOLERANCES = {"loss": 0.02, "gradient": 0.1}
"""In bf16, as norms."""


def language(layers: int | None = None) -> Any:
    """Random weights on the GPU."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=152_064, hidden_size=3584, intermediate_size=18_944,
        num_hidden_layers=layers or 28, num_attention_heads=28, num_key_value_heads=4,
        max_position_embeddings=32_768, tie_word_embeddings=False,
    )  # fmt: skip
    attention.register()
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=attention.NAME
        )


def stream(documents: int, vocabulary: int) -> TokenStream:
    random = np.random.default_rng(0)
    rows = []
    for number in range(documents):
        ids = random.integers(0, vocabulary, DOCUMENT + 1)
        ids[16 : 16 + PATCHES] = PICTURE
        learned = np.arange(DOCUMENT + 1) > DOCUMENT - LEARNED
        features = torch.randn(PATCHES, CHANNELS, generator=torch.Generator().manual_seed(number))
        rows.append(Row(ids, learned, (features,)))
    made = [document(row) for row in rows]
    return pack([d for d, _ in made], [inputs for _, inputs in made])


def operations(model: PlaitModel, row: TokenStream) -> float:
    """Multiplications and additions that a step needs: 2 a weight forward, 2 more backward."""
    config = model.language.config
    frozen = trained = 0
    for name, parameter in model.backbone.decoder.named_parameters():
        if parameter.ndim == 2 and "embed" not in name:
            frozen += 0 if parameter.requires_grad else parameter.numel()
            trained += parameter.numel() if parameter.requires_grad else 0
    learned = int((row.weights != 0).sum())
    pairs = int((row.visible[1] - row.visible[0]).sum())
    size = config.hidden_size // config.num_attention_heads
    seen = 14 * pairs * size * config.num_attention_heads * config.num_hidden_layers
    head = 4 * learned * model.output_weight.numel()
    return float(row.length * (4 * frozen + 6 * trained) + head + seen)


def check(model: PlaitModel, row: TokenStream) -> dict[str, float]:
    """The relative differences of loss and gradients to plain torch's.

    Raises:
        SystemExit: one is too large.
    """
    parameters: list[Tensor] = [parameter for _, _, parameter in model.trainable()]
    loss = model.compute(row).loss
    ours = torch.autograd.grad(loss, parameters)
    expected = plain_loss(model, row)
    theirs = torch.autograd.grad(expected, parameters)
    pairs = zip(ours, theirs, strict=True)
    found = {"loss": apart(loss, expected), "gradient": largest(apart(a, b) for a, b in pairs)}
    for name, value in found.items():
        if not value <= TOLERANCES[name]:
            raise SystemExit(f"the {name} differs by {value:.1e} from plain torch's: no number")
    return {name: float(f"{value:.1e}") for name, value in found.items()}


def plain_loss(model: PlaitModel, row: TokenStream) -> Tensor:
    """The loss by attention in float64 with a dense mask, and from all logits."""
    backbone = model.backbone
    route, backbone.attention_route = backbone.attention_route, "naive"
    try:
        hidden, _ = model.hidden(row)
    finally:
        backbone.attention_route = route
    index = row.weights.nonzero()[:, 0]
    logits = torch.nn.functional.linear(hidden[index.to(hidden.device)], model.output_weight)
    targets = row.targets[index].to(hidden.device)
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")


def measure(layers: int | None = None) -> dict[str, Any]:
    memory = torch.cuda.get_device_properties(0).total_memory
    small = build(language(layers=2), CHANNELS)
    vocabulary = small.output_weight.shape[0]
    differences = check(small, stream(2, vocabulary))
    del small
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model = build(language(layers), CHANNELS)
    row = stream(8 if memory > LARGE_MEMORY else 4, vocabulary)
    parameters: list[Tensor] = [parameter for _, _, parameter in model.trainable()]
    optimiser = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def step() -> None:
        model.compute(row).loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    seconds = medians({"step": step}, rounds=5, seconds=1.0)["step"]
    rate, work = matmul_rate(), operations(model, row)
    return {
        "device": torch.cuda.get_device_name(),
        "share_of_matmul_rate": round(work / seconds / rate, 4),
        "seconds": round(seconds, 4),
        "positions_a_second": round(row.length / seconds),
        "tflops": round(work / seconds / 1e12, 1),
        "matmul_tflops": round(rate / 1e12, 1),
        "positions": row.length,
        "layers": model.language.config.num_hidden_layers,
        "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1),
        "differences": differences,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="A LoRA step of a 7B-shaped model on a GPU.")
    parser.add_argument("--json", action="store_true", help="print one JSON object only")
    parser.add_argument("--layers", type=int, help="of the model, where 28 do not fit")
    words = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this measures a GPU, and torch finds none")
    found = measure(words.layers)
    if not words.json:
        print(f"{found['share_of_matmul_rate']:.0%} of {found['matmul_tflops']} TFLOP/s")
    print(json.dumps(found | {"machine": machine()}))


if __name__ == "__main__":
    main()

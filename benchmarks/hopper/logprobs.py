"""The specialisations of token logprobs' kernels that a training run on Hopper launches."""

from typing import Any

from benchmarks.hopper.compiling import Case
from plait.kernels.token_logprobs.triton_kernels import (
    gradient_kernel,
    launch_of,
    statistics_kernel,
)

VOCABULARIES = (1000, 8192, 151_936)
"""One for each row of the launch table."""

NUMBERS = {
    "lse": "*fp32",
    "entropy": "*fp32",
    "softcap": "fp32",
    "inverse_temperature": "fp32",
}
STATISTICS = {"logits": "*fp32", "ids": "*i64", "picked": "*fp32", **NUMBERS}
GRADIENT = {
    "logits": "*fp32",
    "ids": "*i64",
    "by_logprobs": "*fp32",
    "by_entropy": "*fp32",
    **NUMBERS,
}


def cases() -> list[Case]:
    """Both kernels, for each launch: one target and nothing more, and all they can do."""
    found = []
    for vocabulary in VOCABULARIES:
        launch = launch_of(vocabulary)
        for full in (False, True):
            constants: dict[str, Any] = {
                "vocabulary": vocabulary,
                "count": 20 if full else 1,
                "capped": full,
                "with_entropy": full,
                "block": launch.block,
            }
            suffix = f"{vocabulary}{'_full' if full else ''}"
            found.append(
                Case(
                    name=f"logprobs_statistics_{suffix}",
                    kernel=statistics_kernel,
                    signature=STATISTICS,
                    constants=constants,
                    warps=launch.warps,
                )
            )
            for dtype in ("fp32", "bf16"):
                found.append(
                    Case(
                        name=f"logprobs_gradient_{dtype}_{suffix}",
                        kernel=gradient_kernel,
                        signature={**GRADIENT, "gradient": f"*{dtype}"},
                        constants=constants,
                        warps=launch.warps,
                    )
                )
    return found

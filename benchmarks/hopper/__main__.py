"""Every kernel compiled for Hopper, with what it takes: `python -m benchmarks.hopper --json`.

Needs no GPU. Exits with 1 where a kernel spills registers, takes too much shared memory or
multiplies without the tensor cores it should use.
"""

import argparse
import json
import sys
from dataclasses import asdict

import torch

from benchmarks.hopper import attention, logprobs, lora
from benchmarks.hopper.compiling import Case, compile_case

ROOMS = {"attention": attention.cases, "logprobs": logprobs.cases, "lora": lora.cases}


def quick_cases() -> list[Case]:
    """What most models run: half a minute instead of ten."""
    attending = attention.cases((64, 128), (torch.bfloat16,), (False,))
    return [*attending, *logprobs.cases(), *lora.cases((16,), ("*bf16",))]


def main() -> int:
    parser = argparse.ArgumentParser(description="What the kernels become on a Hopper chip.")
    parser.add_argument("--json", action="store_true", help="print one JSON object only")
    parser.add_argument("--quick", action="store_true", help="the usual types and sizes alone")
    parser.add_argument("--room", choices=ROOMS, help="this operation alone")
    words = parser.parse_args()
    chosen = [words.room] if words.room else list(ROOMS)
    cases = quick_cases() if words.quick else [case for name in chosen for case in ROOMS[name]()]
    found, problems = [], []
    for case in cases:
        made = compile_case(case)
        found.append(asdict(made))
        problems += made.problems(case)
        if not words.json:
            print(
                f"{made.name:60} {made.registers:4} registers, {made.stack + made.local:4} bytes "
                f"spilled, {made.shared // 1024:4} KB shared"
            )
    print(json.dumps({"kernels": len(found), "problems": problems, "resources": found}))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

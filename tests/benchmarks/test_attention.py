"""The attention benchmark on short rows: the sides agree, or there is no number.

In a process of its own, started at the root, because plait takes the root off `sys.path`.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

ON_A_CPU = """
import json
import torch
from benchmarks import attention
torch.set_num_threads(1)

def refusal(what):
    try:
        what()
        return ""
    except SystemExit as error:
        return str(error)

ones = torch.ones(3)
refused = [refusal(lambda wrong=wrong: attention.check([ones, wrong, ones], [ones] * 3))
           for wrong in (ones * 1.01, ones * torch.nan)]
packed, mask = attention.attention_case(512, 2), attention.mask_case(1024, 2)
metadata = attention.metadata
def everything(row):
    blocks = metadata(row).block_map(None, row.length, 128, 128)
    blocks.queries[:, 0], blocks.queries[:, 3] = 0, row.length
    return type("Everything", (), {"block_map": lambda self, *words: blocks})()
attention.metadata = everything
refused.append(refusal(lambda: attention.mask_case(1024, 1)))
print(json.dumps({"packed": packed, "mask": mask, "refused": refused}))
"""

GPU_CASES_ON_A_CPU = """
import json
from functools import partial
import torch
from torch.nn.attention import SDPBackend
from benchmarks import attention_gpu as gpu
torch.set_num_threads(1)

ours = gpu.ours
gpu.DEVICE, gpu.HEADS, gpu.KEY_HEADS = "cpu", 4, 2
gpu.BACKENDS = (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION)
gpu.ours = lambda row, route="auto": ours(row, "auto")
gpu.flex = lambda row: ours(row, "naive")  # FlexAttention has no backward pass here
gpu.medians = lambda steps: {name: float(step() is not None) for name, step in steps.items()}
torch.cuda.get_device_name = lambda: "none"
gpu.cases = lambda: {"causal": partial(gpu.causal, 3, 256, 64),
                     "groups": partial(gpu.with_groups, 256, 64)}
found = gpu.measure()
gpu.flex = lambda row: lambda q, k, v: ours(row)(q, k, 1.1 * v)
try:
    gpu.measure()
except SystemExit as error:
    found["refused"] = str(error)
found["late"] = gpu.measure(1e-9)["left_out"]
print(json.dumps(found))
"""


def facts(program: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: Any = json.loads(done.stdout.splitlines()[-1])
    return found


def test_sides_agree_and_a_side_that_does_not_gives_no_number() -> None:
    found = facts(ON_A_CPU)
    assert found["packed"]["difference"] < 1e-5
    assert found["packed"]["ratio"] > 0 and found["mask"]["ratio"] > 0
    assert len(found["refused"]) == 3 and all("no number" in text for text in found["refused"])


def test_the_cases_of_a_gpu_compare_what_they_say() -> None:
    found = facts(GPU_CASES_ON_A_CPU)
    assert set(found["causal"]["forward_ratio"]) >= {"sdpa math, keys repeated", "flash route"}
    assert {"flex", "sdpa math"} <= set(found["groups"]["backward_ratio"])
    assert found["left_out"] == [] and found["late"] == ["causal", "groups"]
    assert "no number" in found["refused"]

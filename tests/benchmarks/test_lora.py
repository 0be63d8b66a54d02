"""The adapters' benchmark on a model of 16 channels: one step on every side, or no number.

In a process of its own, started at the root, because plait takes the root off `sys.path`.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import json
import torch
from benchmarks import lora
torch.set_num_threads(1)

load = lora.Load(hidden=16, intermediate=24, layers=1, heads=2, key_heads=1, vocabulary=64,
                 ranks=(2, 3, 8), lengths=lora.lengths_of(3, 40, 12))
found = lora.measure(load, rounds=2)

def refusal(side, factor=1.01):
    step = getattr(lora.Bench, side)
    def wrong(self):
        losses = step(self)
        model = self.ours if side == "together" else self.theirs
        for name, parameter in model.named_parameters():
            if "lora_A.run1" in name:
                parameter.grad *= factor
        return losses
    setattr(lora.Bench, side, wrong)
    try:
        lora.measure(load, rounds=1)
        return ""
    except SystemExit as error:
        return str(error)
    finally:
        setattr(lora.Bench, side, step)

refused = [refusal("together"), refusal("single"), refusal("together", float("nan"))]
print(json.dumps({"found": found, "fill": load.fill, "refused": refused}))
"""


def test_it_measures_one_step_or_gives_no_number() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        cwd=ROOT, text=True, capture_output=True, check=True,
    )  # fmt: skip
    facts = json.loads(done.stdout.splitlines()[-1])
    found = facts["found"]
    assert found["ratio"] > 0 and found["ratio_of_grouping"] > 0
    assert found["peer"] in ("padded", "single")
    assert {side: len(rounds) for side, rounds in found["rounds"].items()} == {
        "padded": 2, "single": 2, "packed": 2,
    }  # fmt: skip
    assert max(max(values.values()) for values in found["differences"].values()) < 1e-5
    assert found["positions"] == 120 and 0.3 < facts["fill"] < 1
    assert "gradient of padded" in facts["refused"][0]
    assert "gradient of single" in facts["refused"][1]
    assert "differs by nan" in facts["refused"][2]
    assert all("no number is given" in text for text in facts["refused"])

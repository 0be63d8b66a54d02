"""The step benchmark on a model of 16 channels: it measures one step, or gives no number.

In a process of its own, started at the root, because plait takes the root off `sys.path`.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import json
import numpy as np, torch
from transformers import LlamaConfig
from benchmarks import packing, step, step_rows, step_sides, timing
torch.set_num_threads(1)

config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                     num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
                     tie_word_embeddings=True)
r = np.random.default_rng(3)
def row(n):
    pictures, text = n % 3, 4 + n
    before, after = r.integers(0, 64, n % 2), r.integers(0, 64, text)
    ids = np.concatenate([before, np.full(3 * pictures, step_rows.PICTURE), after])
    return step_rows._row(ids, len(ids) - 2, [3] * pictures, 8, r)
batches = [[row(n) for n in range(size)] for size in (5, 7)]
model = step.build(step._random(config), 8)
# A pack of 40 positions makes several packs of a batch.
case = step.Case(model, batches, 40, {"weights": "tiny"})
found = step.measure(case, rounds=2)

mix = step_rows.vlm(64, 2, 1)
chosen = np.random.default_rng(1).permutation(packing.SAMPLES)[:32]
same = [len(row.ids) for batch in mix for row in batch] == packing.vlm()[chosen].tolist()

class Mixed(step_sides.Packed):
    def __call__(self):
        loss = super().__call__()
        for _, _, parameter in self.model.trainable():
            parameter.grad *= 1.01
        return loss
step.Packed = Mixed
try:
    step.measure(case, rounds=1)
    refused = ""
except SystemExit as error:
    refused = str(error)
rounds = timing.summary([(1.0, 2.0), (1.0, 5.0), (2.0, 6.0)])
print(json.dumps({"found": found, "same": same, "refused": refused, "rounds": rounds}))
"""


@pytest.mark.slow
def test_it_measures_one_step_or_gives_no_number() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, check=True, text=True, capture_output=True
    )
    facts = json.loads(done.stdout.splitlines()[-1])
    found = facts["found"]
    assert found["ratio"] > 0
    assert len(found["rounds"]) == 2
    assert max(found["differences"].values()) < 1e-5
    assert found["batches"] == 2
    assert 0.5 < found["padded_fill"] < 1
    assert facts["same"], "the rows must be those of the packing benchmark's mix"
    assert "no number is given" in facts["refused"]
    assert facts["rounds"]["ratio"] == 3

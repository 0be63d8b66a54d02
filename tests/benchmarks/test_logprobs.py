"""The logprobs benchmark's correctness check on tiny sizes, without the peer.

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
from benchmarks import logprobs, logprobs_sides as sides
torch.set_num_threads(1)

batch = sides.make(sides.Size(positions=24, hidden=16, vocabulary=301, sequences=4))
hidden = batch.hidden.detach().requires_grad_()
logprobs_of_all = (hidden @ batch.weight.T).log_softmax(-1)
plain_rl = sides.finished(sides.clipped(logprobs_of_all.gather(-1, batch.targets[:, None])[:, 0],
                                        batch), hidden)
differences = logprobs.checked({"plain": (sides.nll(batch), sides.plain_nll(batch)),
                                "plain rl": (sides.rl(batch), plain_rl)}, 1e-5)
ratio = (logprobs_of_all.gather(-1, batch.targets[:, None])[:, 0] - batch.old_logprobs).exp()
loss, gradient = sides.nll(batch)
refused = []
for broken in ((loss * 1.01, gradient), (loss, gradient * 1.01), (loss, gradient * torch.nan)):
    try:
        logprobs.checked({"plain": (broken, sides.plain_nll(batch))}, 1e-4)
    except SystemExit as stop:
        refused.append(str(stop))
clocks = {"ours": lambda: 1.0, "peer": lambda: 2.0}
print(json.dumps({
    "differences": differences,
    "refused": refused,
    "clipped": float(((ratio - 1).abs() > sides.EPSILON).float().mean()),
    "ratio": logprobs.ratio(logprobs.in_turn(clocks, 3), "peer", "ours"),
    "shapes": {name: list(value.shape) for name, value in logprobs.by_sequence(batch).items()},
}))
"""


def test_sides_agree_and_a_side_that_does_not_gives_no_number() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["differences"]) == 2 and max(found["differences"].values()) < 1e-5
    assert len(found["refused"]) == 3 and all("no number" in line for line in found["refused"])
    assert 0.1 < found["clipped"] < 0.9, "both branches of the clipped ratio are taken"
    assert found["ratio"] == 2.0
    assert found["shapes"]["hidden"] == [4, 6, 16] and found["shapes"]["targets"] == [4, 6]

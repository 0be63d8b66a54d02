"""The film benchmark on 20 seconds: it measures, or gives no number.

In a process of its own, started at the root, because plait takes the root off `sys.path`.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import sys, numpy as np
from benchmarks import video
kept = video.by_seeking
def wrong(path):
    found = kept(path)
    found.pixels[3] = 0
    return found
video.by_seeking = wrong
sys.argv[1:] = ["--json", "--seconds", "4"]
video.main()
"""


def test_seeking_is_measured_and_checked() -> None:
    command = [sys.executable, "-m", "benchmarks.video", "--json", "--seconds", "20"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ratio"] > 0 and found["frames"] == 16 and found["film_seconds"] == 20


def test_a_wrong_frame_gives_no_number() -> None:
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "seeking is wrong" in done.stderr
    assert "ratio" not in done.stdout

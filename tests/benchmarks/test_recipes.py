"""The benchmark of the recipes says what passed, and that a recipe failed; on recipes of a line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import sys
from pathlib import Path
from typing import Any
from benchmarks import recipes
recipes.ROOT = Path(sys.argv[1])
sys.argv[1:] = sys.argv[2:]
recipes.main()
"""
RECIPE = """
import json, sys
seed = int(sys.argv[sys.argv.index("--seed") + 1])
if seed == 2:
    raise ValueError("a broken recipe")
print("step 1")
print(json.dumps({"less": 0.35 - 0.1 * seed, "seed": seed}))
"""


def test_each_recipe_must_reach_its_number(tmp_path: Path) -> None:
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "distil.py").write_text(RECIPE)

    def run(*seeds: str) -> tuple[int, Any]:
        words = ["--only", "distil", "--folder", str(tmp_path / "out"), "--seeds", *seeds]
        command = [sys.executable, "-c", PROGRAM, str(tmp_path), "--json", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        return done.returncode, json.loads(done.stdout.splitlines()[-1])

    code, found = run("0")
    assert (code, found["passed"]) == (0, True)
    code, found = run("0", "1", "2")
    seeds = found["recipes"]["distil"]["seeds"]
    assert (code, found["passed"]) == (1, False)
    assert [seeds[seed]["passed"] for seed in "012"] == [True, False, False]
    assert seeds["2"]["returncode"] == 1
    kept = json.loads((tmp_path / "out" / "distil-1.json").read_text())
    assert kept["seed"] == 1 and len(kept["load"]) == 2
    assert "a broken recipe" in (tmp_path / "out" / "distil-2.log").read_text()
    assert not (tmp_path / "out" / "distil-2.json").exists()

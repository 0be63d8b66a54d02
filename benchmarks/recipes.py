"""The recipes of `examples/` that must reach a number, one after another.

    plait fetch plaited && plait fetch preferences
    python -m benchmarks.recipes --seeds 0 1 2 --json

Each runs in a process of its own. What it prints goes into the folder of results, and its last line
as JSON, with the load of the machine before and after.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.timing import machine

ROOT = Path(__file__).resolve().parents[1]

Facts = dict[str, Any]

RECIPES: dict[str, Callable[[Facts], bool]] = {
    # A rise of 0.15 on unseen problems within twenty minutes, the worked sums included.
    "rl_arithmetic": lambda facts: facts["rise"] >= 0.15 and facts["seconds"] <= 1200,
    "rl_picture": lambda facts: facts["interval"][0] > 0,
    # More held-out pairs right than a coin would have.
    "dpo": lambda facts: facts["interval"][0] > 0.5,
    "dpo_float64": lambda facts: facts["apart"] <= 1e-4,
    "distil": lambda facts: facts["less"] >= 0.3,
    "sft": lambda facts: all(facts["after"][m] < facts["before"][m] for m in facts["before"]),
}


def run(name: str, seed: int, folder: Path, options: Sequence[str]) -> Facts:
    """What the recipe found, and whether that is its number; one that fails has found nothing."""
    load = os.getloadavg()[0]
    command = [sys.executable, "-m", f"examples.{name}", "--seed", str(seed), *options]
    log, kept = (folder / f"{name}-{seed}.{ending}" for ending in ("log", "json"))
    kept.unlink(missing_ok=True)  # an old one must not be taken for this run's
    with log.open("w", encoding="utf-8") as output:
        done = subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    if done.returncode:
        return {"passed": False, "returncode": done.returncode}
    facts: Facts = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    facts |= {"passed": RECIPES[name](facts)}
    facts |= {"load": [round(load, 2), round(os.getloadavg()[0], 2)]}
    kept.write_text(json.dumps(facts) + "\n", encoding="utf-8")
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", choices=RECIPES, nargs="+", default=list(RECIPES))
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "recipes")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="of each recipe")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Facts] = {}
    for name in arguments.only:
        seeds = {}
        for seed in arguments.seeds:
            seeds[seed] = run(name, seed, arguments.folder, arguments.options)
            told = "passed" if seeds[seed]["passed"] else "FAILED"
            print(f"{name} {seed}: {told}", file=sys.stderr, flush=True)
        found[name] = {"passed": all(facts["passed"] for facts in seeds.values()), "seeds": seeds}
    passed = all(facts["passed"] for facts in found.values())
    result = {"passed": passed, "recipes": found, "machine": machine()}
    print(json.dumps(result, indent=None if arguments.json else 2))
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()

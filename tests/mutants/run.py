"""Break Plait by one line at a time and require a red test for each break.

    python tests/mutants/run.py [WORD ...]

`breaks/` holds them, a file for each room. Each is applied to a copy of the tree, where the tests
it names must fail; on the unbroken copy they must pass. With words, only breaks whose file or tests
contain one are run. Exits with 1 when a break survives, its old text is not found exactly once, or
a test is red without a break. A break that needs a library which is not installed is left out, and
said.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BREAKS = Path(__file__).with_name("breaks")
SECONDS = 600
"""A break may make a test hang; that counts as red."""


@dataclass(frozen=True)
class Mutant:
    """One break: `old` becomes `new` in `file`, and one of `tests` must fail."""

    guarantee: int | str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    needs: str | None = None
    """A library without which its tests are skipped."""

    def apply(self, tree: Path) -> str | None:
        """Break the tree; the reason where that is impossible."""
        path = tree / self.file
        text = path.read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            return f"its old text stands {text.count(self.old)} times"
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")
        return None


def load(words: list[str]) -> list[Mutant]:
    entries = [
        entry
        for file in sorted(BREAKS.rglob("*.toml"))
        for entry in tomllib.loads(file.read_text(encoding="utf-8"))["mutant"]
    ]
    mutants = [Mutant(**{**entry, "tests": tuple(entry["tests"])}) for entry in entries]
    for name in sorted({m.needs for m in mutants if m.needs and find_spec(m.needs) is None}):
        print(f"{name} is not installed: {sum(m.needs == name for m in mutants)} breaks left out")
        mutants = [m for m in mutants if m.needs != name]
    if not words:
        return mutants
    return [m for m in mutants if any(w in m.file or w in " ".join(m.tests) for w in words)]


def copy_tree(target: Path) -> None:
    """What git tracks, and what it would: links stay links."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True, text=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        source, to = ROOT / name, target / name
        if source.is_symlink() or source.is_file():
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, to, follow_symlinks=False)


def tests_fail(tree: Path, tests: tuple[str, ...]) -> bool:
    """Run tests on a tree's own plait, whatever is installed."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    where = subprocess.run(
        [sys.executable, "-c", "import plait; print(plait.__file__)"],
        cwd=tree.parent, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if where.returncode == 0 and not Path(where.stdout.strip()).is_relative_to(tree):
        raise SystemExit(f"the copy is not what is imported: {where.stdout}")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True,
            errors="replace", timeout=SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return True
    if done.returncode > 1:  # not a red test but a test that could not be run
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    return done.returncode != 0  # negative: the break killed the interpreter


def judge(mutant: Mutant) -> str:
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tree = Path(folder) / "tree"
        copy_tree(tree)
        problem = mutant.apply(tree)
        if problem is None and not tests_fail(tree, mutant.tests):
            problem = "SURVIVED"
    verdict = problem or "red"
    told = f"{mutant.guarantee!s:>3}  {verdict:<10} {mutant.file}: {mutant.new.strip()[:60]}"
    print(told, flush=True)
    return verdict


def red_without_a_break(mutants: list[Mutant], pool: ThreadPoolExecutor) -> list[str]:
    """The files whose named tests fail on the tree as it is."""
    named: dict[str, list[str]] = {}
    for test in dict.fromkeys(test for mutant in mutants for test in mutant.tests):
        named.setdefault(test.partition("::")[0], []).append(test)
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tree = Path(folder) / "tree"
        copy_tree(tree)
        failed = list(pool.map(lambda tests: tests_fail(tree, tuple(tests)), named.values()))
    return [file for file, red in zip(named, failed, strict=True) if red]


def main(words: list[str]) -> int:
    mutants = load(words)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        if red := red_without_a_break(mutants, pool):
            print(f"red without any break, mend it first: {', '.join(red)}")
            return 1
        verdicts = list(pool.map(judge, mutants))
    caught = verdicts.count("red")
    print(f"{caught} of {len(mutants)} breaks turned a test red")
    return 0 if caught == len(mutants) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

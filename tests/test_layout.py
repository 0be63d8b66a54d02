"""The house: links, import order, names that are not hidden, and sizes. Nothing here imports ours.

Modules are read as text, so an import inside a function counts as well.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("configs", "datasets", "encoders", "kernels", "modalities", "service", "trainer")
ROOMS = tuple(room for room in LINKED if room != "configs")
PACKAGES = ("cli", "client", "primitives", "stream")
"""Folders of plait/ that are no links."""

_DATASETS = {"errors", "home", "modalities", "stream"}
_ENCODERS = {*_DATASETS, "ranges", "kernels", "datasets"}
_TRAINER = {*_ENCODERS, "loss_inputs", "encoders"}
_PRIMITIVES = {*_TRAINER, "types", "trainer"} - {"kernels"}
_SERVICE = {*_PRIMITIVES, "primitives"}
_CLIENT = {*_SERVICE, "service"}

MAY_IMPORT = {
    "errors": set[str](),
    "ranges": {"errors"},
    "loss_inputs": set[str](),
    "home": set[str](),
    "kernels": set[str](),
    "modalities": {"errors"},
    "stream": {"errors", "modalities"},
    "types": {"errors", "ranges", "loss_inputs", "modalities"},
    "datasets": _DATASETS,
    "encoders": _ENCODERS,
    "trainer": _TRAINER,
    "primitives": _PRIMITIVES,
    "service": _SERVICE,
    "tinker_compat": {"errors", "service"},
    "client": _CLIENT,
    "cli": {*_CLIENT, "client"} - {"primitives"},
}
"""What each room, or module of plait/, may import besides itself.

`types` are the API's, which the rooms never see: the client translates.
"""

LONGEST_FUNCTION, LONGEST_FILE = 80, 450


def modules() -> list[tuple[str, Path]]:
    """(room or module of plait/, file) of every Python file that is shipped."""
    found = [(room, file) for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))]
    own = [(file.stem, file) for file in sorted((ROOT / "plait").glob("*.py"))]
    own += [
        (name, file) for name in PACKAGES for file in sorted((ROOT / "plait" / name).glob("*.py"))
    ]
    return found + [(name, file) for name, file in own if name != "__init__"]


def every_file() -> list[Path]:
    own = [f"plait/{name}" for name in PACKAGES]
    folders = [*ROOMS, *own, "benchmarks", "examples", "docs", "tests"]
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    return files + sorted((ROOT / "plait").glob("*.py"))


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def imported(tree: ast.Module) -> Iterator[str]:
    """Full names of all modules imported anywhere in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import in line {node.lineno}"
            assert node.module is not None
            # `from plait import errors` names plait.errors.
            submodules = [f"plait.{alias.name}" for alias in node.names]
            yield from submodules if node.module == "plait" else [node.module]


def test_rooms_are_relative_links_to_the_root_folders() -> None:
    for room in LINKED:
        link = ROOT / "plait" / room
        assert link.is_symlink(), f"plait/{room} must be a link"
        assert str(link.readlink()) == f"../{room}"
        assert link.resolve() == ROOT / room
    folders = [path for path in (ROOT / "plait").iterdir() if (path / "__init__.py").is_file()]
    links = {path.name for path in (ROOT / "plait").iterdir() if path.is_symlink()}
    assert links == set(LINKED)
    assert {path.name for path in folders} == {*ROOMS, *PACKAGES}
    for room in ROOMS:
        assert (ROOT / room / "__init__.py").is_file()
    for folder in (ROOT, ROOT / "tests"):
        assert not (folder / "__init__.py").exists()
    assert not (ROOT / "conftest.py").exists()


def test_imports_point_one_way() -> None:
    wrong = []
    for room, file in modules():
        for name in imported(parsed(file)):
            package, _, rest = name.partition(".")
            target = rest.split(".")[0]
            if package == "plait" and target and target not in MAY_IMPORT[room] | {room}:
                wrong.append(f"{file.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_table_of_imports_is_an_order() -> None:
    order = ["errors", "ranges", "loss_inputs", "home", "kernels", "modalities", "types", "stream",
             "datasets", "encoders", "trainer", "primitives", "service", "tinker_compat", "client",
             "cli"]  # fmt: skip
    assert set(order) == MAY_IMPORT.keys() == {room for room, _ in modules()}
    for room, allowed in MAY_IMPORT.items():
        assert all(order.index(other) < order.index(room) for other in allowed)


def test_rooms_use_the_package_itself_only_for_its_place() -> None:
    """`import plait` would give a room every public name through the back door."""
    for _, file in modules():
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                public = node.value.id == "plait" and not node.attr.startswith("__")
                assert not public, f"{file.relative_to(ROOT)} uses plait.{node.attr}"


def test_rooms_are_imported_by_their_full_names() -> None:
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in every_file()
        for name in imported(parsed(file))
        if name.split(".")[0] in LINKED
    ]
    assert not wrong, "\n".join(wrong)


def test_rooms_load_no_framework_when_they_are_imported() -> None:
    """The `__init__` of a room stays light, so that the command line starts at once."""
    for room in ROOMS:
        heavy = {"torch", "transformers", "lightning", "torchvision", "peft"}
        names = {name.split(".")[0] for name in imported(parsed(ROOT / room / "__init__.py"))}
        assert not names & heavy


@pytest.mark.parametrize("start", ["-c", "-m"])
def test_importing_plait_unhides_the_packages_named_like_our_rooms(
    start: str, tmp_path: Path
) -> None:
    """At the root, `datasets` and `kernels` are ours until plait is imported, and never after."""
    program = (
        "import importlib.util as u\n"
        f"hidden = [u.find_spec(n) for n in {LINKED!r}]\n"
        "import plait\n"
        "print(sum('/' in str(s and s.origin) for s in hidden))\n"
        f"for n in {LINKED!r}:\n"
        "    spec = u.find_spec(n)\n"
        "    where = spec and [spec.origin, *(spec.submodule_search_locations or [])]\n"
        "    print(n, where or [])\n"
    )
    (tmp_path / "program.py").write_text(program)
    command = [start, program] if start == "-c" else ["-m", "program"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}" if start == "-m" else ""}
    lines = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, check=True, text=True,
        capture_output=True,
    ).stdout.splitlines()  # fmt: skip
    assert int(lines[0]) >= len(ROOMS), "the test must begin with names that are hidden"
    for line in lines[1:]:
        assert str(ROOT / line.split()[0]) not in line
        assert f"{ROOT}/plait" not in line


def test_functions_and_files_stay_short() -> None:
    for file in every_file():
        tree, where = parsed(file), file.relative_to(ROOT)
        if "versions" in where.parts or where.name.endswith("_pb2.py"):  # made by tools
            continue
        lines = len(file.read_text(encoding="utf-8").splitlines())
        assert lines <= LONGEST_FILE, f"{where} has {lines} lines; split it by subject"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                assert length <= LONGEST_FUNCTION, f"{where}: {node.name} has {length} lines"


def test_modules_and_public_classes_say_what_they_are() -> None:
    silent = []
    for _, file in modules():
        tree = parsed(file)
        if ast.get_docstring(tree) is None:
            silent.append(str(file.relative_to(ROOT)))
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        silent += [
            f"{file.relative_to(ROOT)}: {node.name}"
            for node in classes
            if not node.name.startswith("_") and ast.get_docstring(node) is None
        ]
    assert not silent, "without a docstring:\n" + "\n".join(silent)

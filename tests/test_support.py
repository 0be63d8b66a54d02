"""docs/support.md: every component has a row, and every row a test."""

import ast
import importlib.util
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

TESTS = Path(__file__).resolve().parent
SCRIPT = TESTS.parent / "docs" / "support.py"


@pytest.fixture(scope="module")
def support() -> ModuleType:
    spec = importlib.util.spec_from_file_location("support", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name while it is executed.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "support", module)
        spec.loader.exec_module(module)
    return module


def test_every_component_has_one_row(support: ModuleType) -> None:
    rows = Counter((row.kind, row.name) for row in support.ROWS)
    assert set(rows.values()) == {1}
    missing = support.components() - rows.keys()
    assert not missing, f"add rows to docs/support.py and run it: {sorted(missing)}"
    # Language families have no registry: transformers brings them.
    unregistered = {row for row in rows if row[0] != "language family"} - support.components()
    assert not unregistered, f"rows of components that do not exist: {sorted(unregistered)}"


def test_the_page_is_what_the_script_writes(support: ModuleType) -> None:
    text = SCRIPT.with_name("support.md").read_text(encoding="utf-8")
    assert text == support.page(), "run: python docs/support.py"


def test_every_named_test_exists_and_real_weights_are_really_used(support: ModuleType) -> None:
    for row in support.ROWS:
        file, _, name = row.test.partition("::")
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        found = [
            node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name
        ]
        assert found, f"{row.kind} {row.name} names a test that does not exist: {row.test}"
        marks = [ast.unparse(mark) for mark in found[0].decorator_list]
        # What ran in the demo or in a recipe has a test of its own beside it.
        claimed = row.real and not any(way in row.ran_on for way in ("make demo", "examples/"))
        assert claimed == ("pytest.mark.weights" in marks), (
            f"{row.kind} {row.name} ran on {row.ran_on!r}, but {row.test} is marked {marks}"
        )

"""docs/tinker.md lists every public method of the official client, and says the truth of each."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "tinker.md"
ROW = re.compile(r"\| (\w+Client) \| `([^`]+)` \| (.+) \|")
PLAIN = {
    "tokens": [5, 6, 7],
    "inputs": {"target_tokens": [6, 7, 8], "weights": [1.0, 1.0, 1.0]},
}


def table() -> dict[tuple[str, str], str]:
    rows = [match.groups() for match in ROW.finditer(PAGE.read_text(encoding="utf-8"))]
    listed = {(client, method): says for client, method, says in rows}
    assert len(listed) == len(rows), "a row stands twice"
    return listed


@pytest.fixture(scope="module")
def told(server: Any, run_tinker: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return run_tinker(server, "0.38.0", "surface", {"plain": [PLAIN]})


def test_the_table_lists_every_method(told: dict[str, Any]) -> None:
    listed = {(client, method.split("(")[0]) for client, method in table()}
    assert listed == {
        (client, method) for client, methods in told["public"].items() for method in methods
    }


def test_each_row_says_one_of_three_things() -> None:
    for row, says in table().items():
        assert re.match(r"(supported|client|refused: .+)(: .+)?$", says), row


def test_what_is_refused_is_refused_by_that_name(told: dict[str, Any]) -> None:
    refused = {
        f"{client}.{method}": says.removeprefix("refused: ")
        for (client, method), says in table().items()
        if says.startswith("refused")
    }
    assert refused.keys() == told["refused"].keys()
    for name, words in refused.items():
        failed = told["refused"][name]
        assert failed["kind"] is not None, f"{name} was accepted: {failed['says']}"
        assert words in failed["says"], name


def test_options_are_refused_by_name(told: dict[str, Any]) -> None:
    words = {
        "project_id": "no projects", "stable_reinforce": "stable_reinforce",
        "weights_access_token": "weights_access_token", "base_model": "other",
        "age_encryption": "age_encryption_recipients",
    }  # fmt: skip
    assert told["more"].keys() == words.keys()
    for name, failed in told["more"].items():
        assert failed["kind"] is not None and words[name] in failed["says"], (name, failed)


def test_a_sampler_is_handed_on(told: dict[str, Any]) -> None:
    assert len(told["handle"]) == 2


def test_the_audit_log_can_be_read(told: dict[str, Any]) -> None:
    assert told["audit"] > 0


def test_what_was_refused_leaves_no_gap(told: dict[str, Any]) -> None:
    """The client counts refused requests too: the server must not wait for their numbers."""
    _, seconds = told["later"]
    assert seconds < 20

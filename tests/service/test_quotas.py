"""What one owner may have: more is refused, and takes nothing from what was there."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from plait.errors import ConfigError, UnknownNameError
from plait.service.catalog import Offer
from plait.service.settings import Quotas, ServiceSettings, overridden
from plait.trainer.spec import ModelSpec
from tests.service.test_isolation import batch, session_of


@pytest.fixture(scope="module")
def narrow(new_server: Callable[..., Any]) -> Any:
    """A server with two keys and small quotas."""
    return new_server("--set", "quotas.runs=2", "--set", "quotas.waiting_bytes=1",
                      "--set", "quotas.upload_bytes=1000").start()  # fmt: skip


@pytest.fixture(scope="module")
def keys(narrow: Any) -> dict[str, str]:
    return {owner: narrow.new_key(owner) for owner in ("anna", "ben", "carl")}


def test_runs_of_an_owner(narrow: Any, keys: dict[str, str]) -> None:
    session, first = session_of(narrow, keys["anna"])
    session_of(narrow, keys["anna"])
    body = {"session_id": session, "model_seq_id": 1, "base_model": "tiny",
            "lora_config": {"rank": 2}}  # fmt: skip
    answer = narrow.post("/api/v1/create_model", body, keys["anna"])
    assert (answer.status_code, "up to 2 runs" in answer.text) == (422, True)
    again = narrow.post("/api/v1/create_model", {**body, "model_seq_id": 0}, keys["anna"])
    assert again.json()["model_id"] == first  # one that is there is answered as before
    session_of(narrow, keys["ben"])


def test_runs_that_are_asked_for_at_once(new_server: Callable[..., Any]) -> None:
    server = new_server("--set", "quotas.runs=2").start()
    key = server.new_key("dora")
    session, _ = session_of(server, key)

    def create(number: int) -> int:
        body = {"session_id": session, "model_seq_id": number, "base_model": "tiny",
                "lora_config": {"rank": 2}}  # fmt: skip
        status: int = server.post("/api/v1/create_model", body, key).status_code
        return status

    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(create, range(1, 9)))
    assert sorted(statuses) == [200] + 7 * [422]


def test_bytes_that_wait(narrow: Any, keys: dict[str, str]) -> None:
    _, run = session_of(narrow, keys["carl"])
    path = "/api/v1/forward_backward"
    waits = narrow.ask("POST", path, keys["carl"], content=batch(run, seq=2))  # 1 is not there yet
    assert waits.is_success, waits.text
    more = narrow.ask("POST", path, keys["carl"], content=batch(run, seq=3))
    assert (more.status_code, "bytes wait" in more.text) == (429, True)
    missing = narrow.ask("POST", path, keys["carl"], content=batch(run, seq=1))
    assert missing.is_success, missing.text  # for which the other one waits
    asked = {"request_id": waits.json()["request_id"]}
    assert narrow.post("/api/v1/retrieve_future", asked, keys["carl"]).is_success
    session_of(narrow, keys["ben"])


def test_uploads_of_an_owner(narrow: Any, keys: dict[str, str]) -> None:
    """What has come in part counts, and what is taken away does not any more."""

    def send(owner: str, name: str, offset: int = 0) -> Any:
        asked = {"sha256": name * 64, "size": "900", "offset": str(offset)}
        key, content = keys[owner], bytes(600 if not offset else 200)
        return narrow.ask("POST", "/api/v1/media", key, params=asked, content=content)

    assert send("anna", "a").is_success
    refused = send("anna", "b")
    assert (refused.status_code, "1000 bytes together" in refused.text) == (413, True)
    assert send("ben", "b").is_success
    assert send("anna", "a", 600).json()["received"] == 800
    assert narrow.ask("DELETE", f"/api/v1/media/{'a' * 64}", keys["anna"]).status_code == 204
    assert narrow.ask("DELETE", f"/api/v1/media/{'a' * 64}", keys["anna"]).status_code == 404
    assert send("anna", "b").is_success


@pytest.mark.parametrize("word", ["quotas.runs=0", "quotas.waiting=0", "quotas.waiting_bytes=x"])
def test_a_quota_that_cannot_be(word: str, tmp_path: Path) -> None:
    settings = ServiceSettings(
        models={"tiny": Offer(ModelSpec(language="tiny"))}, data_dir=tmp_path
    )
    with pytest.raises(ConfigError):
        overridden(settings, [word])
    with pytest.raises(UnknownNameError):
        overridden(settings, ["quotas.nothing=1"])
    given = overridden(settings, ["quotas.runs=7", "port=1"])
    assert (given.port, given.quotas) == (1, Quotas(runs=7))

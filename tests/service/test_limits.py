"""What requests may send, and what a clock that jumps does; without a server's process."""

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from plait.service import middleware
from plait.service.catalog import Offer
from plait.service.database.database import Database
from plait.service.database.migrate import migrate
from plait.service.database.payloads import Payloads
from plait.service.downloads import SECONDS, Downloads
from plait.service.errors import NotFoundError, ServiceError, UnavailableError
from plait.service.keys import Keys
from plait.service.middleware import Bounded, crowded, unpacked
from plait.service.service import Service
from plait.service.sessions import Sessions
from plait.service.settings import ServiceSettings
from plait.trainer.spec import ModelSpec

Message = dict[str, Any]


async def echo(scope: Any, receive: Any, send: Any) -> None:
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(len(body)).encode()})


def ask(
    app: Any, parts: Callable[[], Awaitable[Message]], path: str = "/x", **headers: str
) -> tuple[int | None, bytes]:
    """The status, and the body; None where nothing was answered."""
    told: list[Message] = []

    async def send(message: Message) -> None:
        told.append(message)

    scope = {
        "type": "http", "path": path, "state": {},
        "headers": [(name.replace("_", "-").encode(), value.encode())
                    for name, value in headers.items()],
    }  # fmt: skip
    asyncio.run(app(scope, parts, send))
    body = b"".join(one.get("body", b"") for one in told)
    return (told[0]["status"] if told else None), body


def sending(*parts: bytes, pause: float = 0.0, gone: bool = False) -> Any:
    left = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    if not gone and left:
        left[-1]["more_body"] = False

    async def receive() -> Message:
        await asyncio.sleep(pause)
        return left.pop(0) if left else {"type": "http.disconnect"}

    return receive


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "_LINGER_SECONDS", 0.05)


def test_a_body_in_parts_arrives_whole() -> None:
    assert ask(Bounded(echo, 10, 100), sending(b"ab", b"", b"c")) == (200, b"3")
    packed = zstandard.compress(b"a" * 10)
    assert ask(Bounded(echo, 30, 100), sending(packed), content_encoding="zstd") == (200, b"10")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content_length": "11"}, 413),
        ({"content_length": "9" * 5000}, 413),
        ({"content_length": "-1"}, 413),
        ({"content_length": "x"}, 413),
        ({"content_encoding": "gzip"}, 415),
        ({"content_encoding": "zstd"}, 400),
    ],
)
def test_headers_of_bodies_that_are_not_read(headers: dict[str, str], status: int) -> None:
    told, body = ask(Bounded(echo, 10, 100), sending(b"abc"), **headers)
    assert told == status
    assert set(json.loads(body)) >= {"error", "category"}


def test_a_body_without_a_length_is_measured_as_it_comes() -> None:
    assert ask(Bounded(echo, 10, 100), sending(b"a" * 6, b"a" * 6))[0] == 413
    assert ask(Bounded(echo, 10, 5), sending(b"a" * 6))[0] == 503
    assert ask(Bounded(echo, 10, 100), sending(b"x"), path="/a\0b")[0] == 400


def test_a_client_that_vanishes_is_not_answered() -> None:
    app = Bounded(echo, 10, 100)
    assert ask(app, sending(b"ab", gone=True)) == (None, b"")
    assert app._left == 100


def test_slow_clients_are_let_go() -> None:
    assert ask(Bounded(echo, 10, 100, patience=0.05), sending(b"a", pause=1))[0] == 408
    drops = sending(*[b"a"] * 9, pause=0.02)
    assert ask(Bounded(echo, 10, 100, patience=0.1), drops)[0] == 408
    assert ask(Bounded(echo, 10, 100, patience=1.0), sending(b"a", b"b", pause=0.01))[0] == 200


def statuses_of(app: Bounded, owners: str) -> list[int]:
    """What bodies of nine bytes are answered, sent at once, each by the owner of this letter."""
    statuses = {}

    async def one(number: int, owner: str) -> None:
        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses[number] = message["status"]

        headers = [(b"x-api-key", owner.encode()), (b"transfer-encoding", b"chunked")]
        scope = {"type": "http", "path": "/x", "state": {}, "headers": headers}
        await app(scope, sending(b"a" * 8, b"b", pause=0.05), send)

    async def all_of_them() -> None:
        await asyncio.gather(*(one(*pair) for pair in enumerate(owners)))

    asyncio.run(all_of_them())
    return [statuses[number] for number in range(len(owners))]


async def key_of(scope: Any) -> str:
    owner = dict(scope["headers"])[b"x-api-key"].decode()
    if owner == "x":
        raise ServiceError("this key is not known", 401)
    return owner


def test_bodies_that_are_still_coming_count() -> None:
    """However many connections there are: all that is in memory is counted."""
    app = Bounded(echo, 10, 28, owner_of=key_of)
    assert sorted(statuses_of(app, "abcd")) == [200, 200, 200, 503]
    assert app._left == 28 and not app._of


def test_one_owner_s_bodies_leave_room_for_others() -> None:
    app = Bounded(echo, 10, 40, owner_of=key_of)
    told = statuses_of(app, "aaab")
    assert sorted(told[:3]) == [200, 200, 429] and told[3] == 200
    assert app._left == 40 and not app._of


def test_a_large_body_is_not_read_before_it_is_known_who_sends_it() -> None:
    app = Bounded(echo, 10_000_000, 40_000_000, owner_of=key_of)
    read = []

    async def never() -> Any:
        read.append(1)
        return {"type": "http.disconnect"}

    for headers in ({"content_length": "100000"}, {"transfer_encoding": "chunked"},
                    {"content_encoding": "zstd"}):  # fmt: skip
        assert ask(app, never, x_api_key="x", **headers)[0] == 401
    assert len(read) == 3  # what is read on for a moment, so that the answer is seen
    assert ask(app, sending(b"abc"), x_api_key="x", content_length="3")[0] == 200


def test_bodies_without_prompts_or_data_are_small() -> None:
    app = Bounded(echo, 10_000_000, 40_000_000)
    for path, status in (("/api/v1/save_weights", 413), ("/api/v1/asample", 200)):
        told = ask(app, sending(b"abc"), path=path, content_length="5000000")[0]
        assert told == status, path


def streamed(content: bytes) -> bytes:
    """Without its size at its head."""
    compressor = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    return compressor.compress(content) + compressor.flush()


@pytest.mark.parametrize("packed", [zstandard.compress, streamed])
def test_zstd_is_unpacked_whole_or_not_at_all(packed: Callable[[bytes], bytes]) -> None:
    content = os.urandom(1000) * 3
    body = packed(content)
    assert unpacked(body, 3000) == content
    for damaged in (b"", b"x", body[:-1], body[: len(body) // 2], body + b"x", body + body):
        with pytest.raises(ServiceError) as caught:
            unpacked(damaged, 10_000)
        assert caught.value.status == 400
    for most in (0, 2999):
        with pytest.raises(ServiceError) as caught:
            unpacked(body, most)
        assert caught.value.status == 413
    bomb = packed(bytes(300_000_000))
    with pytest.raises(ServiceError) as caught:
        unpacked(bomb, 1_000_000)
    assert caught.value.status == 413


def test_json_that_grows_is_refused_before_it_is_parsed() -> None:
    assert crowded(b"[" + b"[]," * 2_000_000 + b"[]]")
    assert crowded(b"[" + b"{}," * 2_000_000 + b"{}]")
    assert crowded(b"[" + b"1," * (1 << 25) + b"1]")
    assert not crowded(b"[" + b"1," * 5_000_000 + b"1]")
    assert not crowded(b'{"data": "' + b"A" * 10_000_000 + b'"}')


# Clocks that jump


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    url = f"sqlite:///{tmp_path / 'plait.db'}"
    migrate(url)
    made = Database(url, Payloads(tmp_path / "payloads"))
    yield made
    made.close()


def test_nobody_is_let_in_while_keys_are_looked_up(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        await Keys(database).create("anna", "user", "", 1000.0)
        read = database.read

        async def slow(work: Any) -> Any:
            await asyncio.sleep(0.2)
            return await read(work)

        monkeypatch.setattr(database, "read", slow)
        after_a_start = Keys(database)
        assert all(await asyncio.gather(*(after_a_start.any() for _ in range(40))))

        async def away(_: Any) -> Any:
            raise UnavailableError("the database does not answer")

        monkeypatch.setattr(database, "read", away)
        unknown = Keys(database)
        for _ in range(2):
            with pytest.raises(UnavailableError):
                await unknown.any()

    asyncio.run(story())


@pytest.mark.parametrize("jump", [-86_400.0, 10.0, 86_400.0])
def test_a_revoked_key_is_refused_whatever_the_clock_does(database: Database, jump: float) -> None:
    async def story() -> None:
        keys, others = Keys(database), Keys(database)
        key, name = await keys.create("anna", "user", "", 1000.0)
        assert (await keys.check(key, 1000.0)).owner == "anna"
        await others.revoke(name, 1000.0)  # in another process, as the command does
        with pytest.raises(ServiceError):
            await keys.check(key, 1000.0 + jump)

    asyncio.run(story())


def test_sessions_go_on_when_the_clock_is_set_back(database: Database) -> None:
    async def story() -> None:
        sessions = Sessions(database)
        name = await sessions.create("anna", {}, 1000.0)
        for now in (1001.0, 10_000.0, 5.0, 6.0, 1e9):
            await sessions.require("anna", name, now)
        assert sessions.seen_at(name) == 1e9
        await sessions.finish("anna", name, {}, 7.0)
        with pytest.raises(ServiceError) as caught:
            await sessions.require("anna", name, 8.0)
        assert caught.value.status == 410

    asyncio.run(story())


def test_an_address_ends_with_its_hour(tmp_path: Path) -> None:
    clock = Clock()
    downloads = Downloads(tmp_path, clock)
    folder = tmp_path / "run" / "weights" / "x"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    url = downloads.addresses("tinker://run/weights/x", "")["urls"]["manifest.json"]
    until, signature = url.partition("until=")[2].split("&signature=")
    words = ("run", "weights", "x", "manifest.json", int(until))

    def asked(*words: Any) -> int:
        return asyncio.run(downloads.file(*words, signature)).status_code

    assert asked(*words) == 200
    for wrong in (("run", "weights", "x", "manifest.json", int(until) + 1),
                  ("run", "weights", "x", "../lifetime.json", int(until)),
                  ("run", "weights", "..", "manifest.json", int(until))):  # fmt: skip
        with pytest.raises(ServiceError) as caught:
            asked(*wrong)
        assert caught.value.status == 403
    clock.now += SECONDS + 1
    with pytest.raises(ServiceError):
        asked(*words)
    clock.now -= 10 * SECONDS
    assert asked(*words) == 200


def test_an_expired_checkpoint_is_not_there(tmp_path: Path) -> None:
    from sqlalchemy import insert

    from plait.service.database.tables import checkpoints
    from plait.service.keys import Caller

    clock = Clock()
    settings = ServiceSettings(
        models={"tiny": Offer(ModelSpec(language="tiny"))}, data_dir=tmp_path
    )
    service = Service(settings, clock)
    path = "tinker://run/weights/x"
    values = {"path": path, "owner": "anna", "run_id": "run", "kind": "weights", "name": "x",
              "created_at": clock.now, "expires_at": clock.now + 60, "public": False,
              "metadata_json": "{}"}  # fmt: skip

    async def story() -> None:
        await service.database.write(
            lambda connection: connection.execute(insert(checkpoints).values(**values))
        )
        assert (await service.checkpoint(Caller("anna"), path)).path == path
        clock.now += 61
        with pytest.raises(NotFoundError):
            await service.checkpoint(Caller("anna"), path)

    asyncio.run(story())
    service.database.close()

"""`serve`, `keys`, and what asks a server: `status`, `runs`, `checkpoints`."""

import argparse
import asyncio
import os
import time
from pathlib import Path
from typing import Any

from plait.cli.shared import add_command
from plait.errors import ConfigError

URL = "PLAIT_BASE_URL"
KEY = "PLAIT_API_KEY"


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    _add_serve(commands)
    _add_keys(commands)
    for name, run, text in (
        ("status", _status, "Say how a server is doing."),
        ("runs", _runs, "List the runs on a server, the newest first."),
        ("checkpoints", _checkpoints, "List the checkpoints on a server, the newest first."),
    ):
        parser = add_command(commands, name, run, text)
        parser.add_argument("--url", help=f"the server's address; ${URL} by default")
        parser.add_argument("--key", help=f"your key; ${KEY} by default")


def _add_serve(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = add_command(
        commands, "serve", _serve,
        "Serve models to Plait's client, the tinker client and OpenAI's API, until it is stopped.",
    )  # fmt: skip
    parser.add_argument(
        "--model", action="append", required=True, metavar="[NAME=]WHAT",
        help="a model to offer: a recipe (.yaml), a run of plait train or a checkpoint for its "
        "weights, a folder, a hub id or pip:PACKAGE (may be repeated)",
    )  # fmt: skip
    _add_data_dir(parser)
    parser.add_argument(
        "--host", default="127.0.0.1",
        help="an address of this machine; others than 127.0.0.1, the default, need a key",
    )  # fmt: skip
    parser.add_argument("--port", type=int, default=8000, help="8000 by default")
    parser.add_argument(
        "--tls-cert", type=Path, metavar="FILE", help="a certificate (PEM), for https"
    )
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="its key")
    parser.add_argument(
        "--devices", type=int, default=1, help="ranks that train together; 1 by default"
    )
    parser.add_argument(
        "--threads", type=int, help="of the engine, on a CPU; as many as it has by default"
    )
    parser.add_argument(
        "--sampler-memory", type=int, default=1024, metavar="MB",
        help="for keys and values of what is sampled; 1024 by default",
    )  # fmt: skip
    parser.add_argument(
        "--capacity", type=int, default=4096, metavar="POSITIONS",
        help="of one row that is computed at once; 4096 by default",
    )  # fmt: skip
    parser.add_argument("--requests-per-minute", type=int, help="of each owner")
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="HOST",
        help="media may be fetched from this host (may be repeated)",
    )  # fmt: skip
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="any other setting of the server, for example: --set recovery_seconds=10",
    )  # fmt: skip


def _add_data_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data-dir", type=Path, metavar="FOLDER",
        help="checkpoints, uploads and the database; $PLAIT_HOME/service by default",
    )  # fmt: skip
    parser.add_argument(
        "--database", metavar="URL", help="postgresql://... in the place of the embedded SQLite"
    )


def _serve(words: argparse.Namespace) -> None:
    from plait.service.serve import serve

    serve(settings_of(words))


def settings_of(words: argparse.Namespace) -> Any:
    """The server's settings.

    Raises:
        ConfigError: one of them cannot be.
    """
    from plait.service.catalog import offer_of_argument
    from plait.service.settings import Quotas, ServiceSettings, overridden

    models = dict(offer_of_argument(argument) for argument in words.model)
    if len(models) < len(words.model):
        raise ConfigError("two models have one name: give one of them another, NAME=WHAT")
    settings = ServiceSettings(
        models=models,
        data_dir=_data_dir(words),
        database=words.database,
        host=words.host,
        port=words.port,
        tls_cert=words.tls_cert,
        tls_key=words.tls_key,
        devices=words.devices,
        threads=words.threads,
        sampler_memory_mb=words.sampler_memory,
        engine_capacity=words.capacity,
        allowed_hosts=tuple(words.allow_host),
        quotas=Quotas(requests_per_minute=words.requests_per_minute),
        jwt_secret=os.environ.get("PLAIT_JWT_SECRET"),
    )
    return overridden(settings, words.set)


def _data_dir(words: argparse.Namespace) -> Path:
    from plait.home import home

    folder: Path = words.data_dir or home() / "service"
    return folder


def _add_keys(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = add_command(commands, "keys", _keys, "Make, list and revoke the keys of a server.")
    actions = parser.add_subparsers(title="actions", dest="action", required=True)
    create = actions.add_parser("create", help="make a key; it is shown once")
    create.add_argument("owner", help="whose it is: owners do not see one another's runs")
    create.add_argument("--role", default="user", help="admin, user or read-only")
    create.add_argument("--label", default="", help="a word about it")
    actions.add_parser("list", help="all keys, without the secrets")
    revoke = actions.add_parser("revoke", help="refuse a key from now on")
    revoke.add_argument("id", help="as the list says")
    for one in actions.choices.values():
        _add_data_dir(one)


def _keys(words: argparse.Namespace) -> None:
    asyncio.run(_keys_of(words))


async def _keys_of(words: argparse.Namespace) -> None:
    from plait.service.database.database import Database
    from plait.service.database.migrate import migrate
    from plait.service.keys import Keys
    from plait.service.settings import make_folder

    folder = _data_dir(words)
    if words.action == "create":
        make_folder(folder)
    elif words.database is None and not (folder / "plait.db").is_file():
        raise ConfigError(f"there is no server's data in {folder}; name its --data-dir")
    url = words.database or f"sqlite:///{folder / 'plait.db'}"
    migrate(url)
    database = Database(url)
    try:
        keys = Keys(database)
        if words.action == "create":
            key, name = await keys.create(words.owner, words.role, words.label, time.time())
            print(f"key {name} of {words.owner} ({words.role}); keep it, it is not shown again:")
            print(key)
        elif words.action == "revoke":
            if not await keys.revoke(words.id, time.time()):
                raise ConfigError(f"there is no key {words.id} that is valid; plait keys list")
            print(f"key {words.id} is refused by a running server within ten seconds")
        else:
            await _print_keys(keys)
    finally:
        database.close()


async def _print_keys(keys: Any) -> None:
    rows = [
        (row.id, row.owner, row.role, row.label, _when(row.created_at), _when(row.revoked_at))
        for row in await keys.every()
    ]
    _table(("id", "owner", "role", "label", "made", "revoked"), rows)


def _when(seconds: float | None) -> str:
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    """What is read by people, and copied: whole, and nothing in it means more than it says."""
    lines = [head, *(tuple(map(str, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(padded).rstrip())


def _asked(words: argparse.Namespace, path: str) -> Any:
    """A server's answer.

    Raises:
        ConfigError: there is no server, or it refuses.
    """
    import httpx

    from plait.service.wire.certificates import certificates

    url = words.url or os.environ.get(URL, "http://127.0.0.1:8000")
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"a server's address begins with http:// or https://; got {url}")
    headers = {"X-API-Key": words.key or os.environ.get(KEY, "")}
    try:
        answer = httpx.get(
            f"{url.rstrip('/')}{path}", headers=headers, timeout=30, trust_env=False,
            verify=certificates(),
        )  # fmt: skip
    except httpx.HTTPError as error:
        raise ConfigError(f"no server answers at {url}: {error}") from error
    try:
        said = answer.json()
    except ValueError:
        raise ConfigError(f"what answers at {url} is no server of Plait") from None
    if answer.is_error:
        problem = said.get("error", answer.status_code)
        told = problem.get("message", problem) if isinstance(problem, dict) else problem
        raise ConfigError(f"{url} refuses: {told}")
    return said


def _status(words: argparse.Namespace) -> None:
    said = _asked(words, "/api/v1/status")
    engine = said["engine"]
    state = "answers" if engine["up"] else "is being started"
    print(f"the engine {state} ({engine['restarts']} restarts); {said['waiting']} requests wait")
    print(f"models: {', '.join(said['models'])}; you are {said['owner']} ({said['role']})")


def _runs(words: argparse.Namespace) -> None:
    found = _asked(words, "/api/v1/training_runs?limit=1000")["training_runs"]
    rows = [
        (one["training_run_id"], one["base_model"], one["lora_rank"] or "full",
         one["last_request_time"][:16])
        for one in found
    ]  # fmt: skip
    _table(("run", "model", "rank", "last used"), rows)


def _checkpoints(words: argparse.Namespace) -> None:
    found = _asked(words, "/api/v1/checkpoints?limit=1000")["checkpoints"]
    rows = [
        (one["tinker_path"], one["time"][:16], f"{(one['size_bytes'] or 0) / 1e6:.1f} MB",
         (one["expires_at"] or "")[:16])
        for one in found
    ]  # fmt: skip
    _table(("path", "saved", "size", "expires"), rows)

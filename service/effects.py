"""What a finished operation means for the other tables, written in the same transaction."""

import json
from collections.abc import Iterable

from sqlalchemy import Connection, update

from plait.service.database.tables import checkpoints, runs, samplers
from plait.service.engine.frames import Header
from plait.service.operations import Also, Operation, Outcome, insert_new


def written_with(operation: Operation, said: Header, now: float) -> Also | None:
    """What is written with a result; None where it is nothing."""
    if operation.kind == "create":
        return lambda connection: connection.execute(
            update(runs)
            .where(runs.c.id == operation.scope)
            .values(info_json=json.dumps(said["result"]))
        )
    if operation.kind == "save":
        return lambda connection: _saved(connection, operation, said, now)
    return None


def _saved(connection: Connection, operation: Operation, said: Header, now: float) -> None:
    path = operation.options["path"]
    kind, name = path.split("/")[-2:]
    values = {
        "path": path, "owner": operation.owner, "run_id": operation.scope, "kind": kind,
        "name": name, "created_at": now, "expires_at": said["expires_at"],
        "size_bytes": said["size"], "public": False,
        "metadata_json": json.dumps(operation.options["metadata"]),
    }  # fmt: skip
    insert = insert_new(connection, checkpoints).values(**values)
    connection.execute(
        insert.on_conflict_do_update(index_elements=["path"], set_={**values, "public": False})
    )


def failed_with(operation: Operation, now: float) -> Also | None:
    """What is written with a failure; None where it is nothing."""
    if operation.kind != "take_view":
        return None
    mine = samplers.c.id == operation.options["sampler"]
    closed = update(samplers).where(mine).values(closed_at=now)
    return lambda connection: connection.execute(closed)


def together(effects: Iterable[Also | None]) -> Also:
    """All that is written with a result."""

    def work(connection: Connection) -> None:
        for effect in effects:
            if effect is not None:
                effect(connection)

    return work


def outcome_of(said: Header, body: bytes) -> Outcome:
    """What the engine's answer means."""
    if "error" in said:
        return Outcome(error=said["error"], category=said["category"])
    if said.get("kind") == "proto":
        return Outcome("proto", body)
    return Outcome("json", json.dumps(said["result"]).encode())

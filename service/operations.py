"""The job log: what was promised, in the order in which it is done, and what came of it."""

import asyncio
import hashlib
import json
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import Connection, Row, Table, delete, func, select, update
from sqlalchemy.dialects import postgresql, sqlite

from plait.service.database.database import Database
from plait.service.database.payloads import Ref
from plait.service.database.tables import operations, runs
from plait.service.errors import ServiceError

MOST_AT_HAND = 65_536
"""Bytes of a result that is handed over from memory."""

_MAKES = ("create", "check_loss")
_MOST_CHANGED = 2_000
"""Rows at once: others wait for the database meanwhile."""

Also = Callable[[Connection], object]
State = Literal["queued", "done", "failed", "gone"]
Kind = Literal["json", "proto"]

LATE = "late"
"""The kind of an entry whose request came after later ones were done: it changed nothing, and the
next step of the run does not fail for it."""

REFUSED, MISSING = "refused", "missing"
"""Kinds of entries that are no promises: nothing was done under these numbers, and nothing will
be. What was refused its sender knows; what never came, the next step of the run has to say."""


@dataclass(slots=True, eq=False)
class Operation:
    """One promise.

    `scope` is the run or the sampler; `seq` its place there; `options` what the engine is told
    besides the body.
    """

    id: str
    owner: str
    scope: str
    seq: int
    kind: str
    options: dict[str, Any]
    digest: str
    body: Ref | None
    state: State = "queued"
    attempts: int = 0
    result: Ref | None = None
    result_kind: Kind | None = None
    error: str | None = None
    category: str | None = None
    created_at: float = 0.0
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    held: bytes | None = None
    """The body, while it is at hand."""

    answer: bytes | None = None
    """The result, where it is small: for those who wait for it now."""

    described: int = 0
    """Bytes of `options` where they are written."""

    @property
    def size(self) -> int:
        """Bytes that it has in memory and on the disk."""
        return self.described + (self.body.length if self.body is not None else 0)

    @property
    def repeats(self) -> bool:
        """Whether it changed something, if its kind does."""
        return self.state == "done" and not self.options.get("forward")

    @property
    def behind(self) -> int:
        """The number behind it."""
        return int(self.options["until"] if self.kind == MISSING else self.seq) + 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of an operation."""

    kind: Kind = "json"
    content: bytes = b"{}"
    error: str | None = None
    category: str | None = None


def digest_of(kind: str, options: Mapping[str, Any], body: bytes) -> str:
    """Tells a request that is sent again from another one under the same number."""
    said = json.dumps([kind, options], sort_keys=True).encode()
    return hashlib.sha256(said + b"\0" + body).hexdigest()


def insert_new(connection: Connection, table: Table) -> Any:
    """An insert that can say what happens where the row is there already."""
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    return dialect.insert(table)


def too_late(operation: Operation) -> Also:
    """What is written where a request came after later ones were done."""
    late = update(operations).where(operations.c.id == operation.id).values(kind=LATE)
    return lambda connection: connection.execute(late)


class JobLog:
    """Operations in the database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def accept(
        self,
        owner: str,
        scope: str,
        seq: int,
        kind: str,
        options: dict[str, Any],
        body: bytes,
        now: float,
        also: Also | None = None,
    ) -> tuple[Operation, bool]:
        """Promise it; durable when this returns. Whether it is new comes second.

        Args:
            also: What is written with it, where it is new.

        Raises:
            ServiceError: this number of the scope was given to another request.
        """
        digest, name = digest_of(kind, options, body), uuid.uuid4().hex
        said = json.dumps(options)
        refs: list[Ref] = []

        def work(connection: Connection, *given: Ref) -> Row[Any] | None:
            refs[:] = given
            values = {
                "id": name, "owner": owner, "scope": scope, "seq": seq, "kind": kind,
                "options_json": said, "digest": digest, "state": "queued",
                "body": str(given[0]) if given else None, "attempts": 0, "created_at": now,
            }  # fmt: skip
            # Drivers disagree on how many rows such an insert says it has written.
            insert = insert_new(connection, operations).values(**values).on_conflict_do_nothing()
            if connection.execute(insert.returning(operations.c.id)).first() is not None:
                if also is not None:
                    also(connection)
                return None
            found = (operations.c.scope == scope) & (operations.c.seq == seq)
            return connection.execute(select(operations).where(found)).one()

        row = await self._database.write(work, *([body] if body else []))
        if row is None:
            made = Operation(
                name, owner, scope, seq, kind, options, digest,
                refs[0] if refs else None, created_at=now, held=body, described=len(said),
            )  # fmt: skip
            return made, True
        there = of_row(row)
        if there.kind in (REFUSED, MISSING) and there.owner == owner:
            raise ServiceError(f"{there.error}; send it under the next number", 422)
        if there.digest != digest or there.owner != owner:
            raise ServiceError(
                f"request {seq} of {scope} was sent before with another content; a number names "
                "one request: send the next number",
                422,
            )
        return there, False

    async def finish(
        self, operation: Operation, outcome: Outcome, now: float, also: Also | None = None
    ) -> None:
        """Keep what came of it, and what it means for other tables; durable when this returns.

        An operation ends once: where it has already, its first end stands.
        """
        failed, c = outcome.error is not None, operations.c

        def work(connection: Connection, *given: Ref) -> tuple[Row[Any], bool]:
            ended = connection.execute(
                update(operations)
                .where((c.id == operation.id) & (c.state == "queued"))
                .values(
                    state="failed" if failed else "done",
                    result=str(given[0]) if given else None,
                    result_kind=None if failed else outcome.kind,
                    error=outcome.error,
                    category=outcome.category,
                    finished_at=now,
                )
            )
            if ended.rowcount and also is not None:
                also(connection)
            row = connection.execute(select(operations).where(c.id == operation.id)).one()
            return row, bool(ended.rowcount)

        blobs = [] if failed or not outcome.content else [outcome.content]
        row, mine = await self._database.write(work, *blobs)
        written = of_row(row)
        if mine and len(outcome.content) <= MOST_AT_HAND:
            operation.answer = outcome.content
        operation.state, operation.held = written.state, None
        operation.result, operation.result_kind = written.result, written.result_kind
        operation.error, operation.category = written.error, written.category
        operation.ended.set()

    async def pass_over(
        self, scope: str, owner: str, seq: int, kind: str, reason: str, now: float, until: int
    ) -> Operation:
        """Note that nothing comes under the numbers from `seq` to `until`; durable when this
        returns.

        Returns:
            What is there under `seq` now: this, or what was promised before.
        """
        name, c = uuid.uuid4().hex, operations.c
        values = {
            "id": name, "owner": owner, "scope": scope, "seq": seq, "kind": kind,
            "options_json": json.dumps({"until": until}), "digest": "", "state": "failed",
            "attempts": 0, "error": reason, "category": "user", "created_at": now,
            "finished_at": now,
        }  # fmt: skip

        def work(connection: Connection) -> Row[Any]:
            connection.execute(
                insert_new(connection, operations).values(**values).on_conflict_do_nothing()
            )
            return connection.execute(
                select(operations).where((c.scope == scope) & (c.seq == seq))
            ).one()

        return of_row(await self._database.write(work))

    async def by_id(self, name: str) -> Operation | None:
        return await self._one(operations.c.id == name)

    async def at(self, scope: str, seq: int) -> Operation | None:
        return await self._one((operations.c.scope == scope) & (operations.c.seq == seq))

    async def _one(self, condition: Any) -> Operation | None:
        row = await self._database.read(
            lambda connection: connection.execute(select(operations).where(condition)).one_or_none()
        )
        return None if row is None else of_row(row)

    async def queued(self) -> list[Operation]:
        """What was promised and is not done, of all scopes, in order."""
        return await self._several(operations.c.state == "queued")

    async def queued_below(self, scope: str, seq: int) -> list[Operation]:
        """What was promised and is not done of a scope, before `seq`, in order."""
        c = operations.c
        return await self._several((c.state == "queued") & (c.scope == scope) & (c.seq < seq))

    async def undelivered(self, scope: str, first: int, count: int) -> list[Operation]:
        """What is done of a scope and was not handed over, of `count` numbers from `first`."""
        c = operations.c
        within = (c.scope == scope) & (c.seq >= first) & (c.seq < first + count)
        ended = c.state.in_(("done", "failed")) & c.delivered_at.is_(None)
        return await self._several(within & ended)

    async def finished_after(self, scope: str, seq: int) -> list[Operation]:
        """What is done of a scope, behind `seq`, in order."""
        c = operations.c
        return await self._several(
            (c.scope == scope) & (c.seq > seq) & c.state.in_(("done", "failed"))
        )

    async def _several(self, condition: Any) -> list[Operation]:
        order = (operations.c.scope, operations.c.seq)
        rows: Sequence[Row[Any]] = await self._database.read(
            lambda connection: connection.execute(
                select(operations).where(condition).order_by(*order)
            ).all()
        )
        return [of_row(row) for row in rows]

    async def after_last_failure(self, scope: str, before: int) -> str | None:
        """Why the next step of a run must refuse: a forward_backward failed since the last one.

        Args:
            before: The number of what comes next.
        """
        c = operations.c

        def work(connection: Connection) -> str | None:
            steps = select(func.max(c.seq)).where(
                (c.scope == scope)
                & c.kind.in_(("optim_step", "load"))
                & c.state.in_(("done", "failed", "gone"))
                & (c.seq < before)
            )
            last = connection.execute(steps).scalar()
            failed = (
                select(c.error, c.options_json)
                .where((c.scope == scope) & c.kind.in_(("forward_backward", MISSING)))
                .where((c.state == "failed") & (c.seq > (-1 if last is None else last)))
                .where(c.seq < before)
                .order_by(c.seq.desc())
            )
            for row in connection.execute(failed):
                if not json.loads(row.options_json).get("forward"):
                    return str(row.error)
            return None

        return await self._database.read(work)

    async def delivered(self, names: Collection[str], now: float) -> None:
        """Their results were handed over: retention begins."""
        await self._database.write(
            lambda connection: connection.execute(
                update(operations)
                .where(operations.c.id.in_(names) & operations.c.delivered_at.is_(None))
                .values(delivered_at=now)
            )
        )

    async def tried(self, operation: Operation) -> None:
        """The engine ended while it did this one alone."""
        operation.attempts += 1
        await self._database.write(
            lambda connection: connection.execute(
                update(operations)
                .where(operations.c.id == operation.id)
                .values(attempts=operation.attempts)
            )
        )

    async def body(self, operation: Operation) -> bytes:
        if operation.held is not None:
            return operation.held
        return await self._payload(operation.body)

    async def result(self, operation: Operation) -> bytes:
        if operation.answer is not None:
            return operation.answer
        return await self._payload(operation.result)

    async def _payload(self, ref: Ref | None) -> bytes:
        if ref is None:
            return b""
        return await asyncio.to_thread(self._database.payloads.read, ref)

    async def forget_numbers(self, before: float) -> None:
        """Let go of all that is known of requests that ended before then and are covered by states
        that were kept; not of what made a run, whose number stays taken.
        """
        c = operations.c
        old = (c.state == "gone") & (c.finished_at < before) & c.kind.not_in(_MAKES)
        some = select(c.id).where(old).limit(_MOST_CHANGED)
        await self._database.write(
            lambda connection: connection.execute(delete(operations).where(c.id.in_(some)))
        )

    async def forget(self, now: float, retention: float, undelivered: float) -> int:
        """Let go of bodies and results that nobody needs, and of the files that held them."""
        c = operations.c
        kept = select(runs.c.kept_seq).where(runs.c.id == c.scope).scalar_subquery()
        old = (c.delivered_at < now - retention) | (c.finished_at < now - undelivered)
        covered = kept.is_(None) | (c.seq <= kept)

        ended = c.state.in_(("done", "failed"))
        some = select(c.id).where(ended & old & covered).limit(_MOST_CHANGED)
        gone = {"state": "gone", "body": None, "result": None, "options_json": "{}"}
        count, found = 0, _MOST_CHANGED
        while found == _MOST_CHANGED:  # looked for by a reader, so that writes go on meanwhile
            names = await self._database.read(
                lambda connection: list(connection.execute(some).scalars())
            )
            await self._database.write(
                lambda connection, names=names: connection.execute(
                    update(operations).where(c.id.in_(names) & ended).values(**gone)
                )
            )
            found = len(names)
            count += found
        # Taken first: what is promised from here on lies in this file or in a later one.
        current = self._database.payloads.current
        needed = await self._database.read(
            lambda connection: {
                Ref.of(text).file
                for column in (c.body, c.result)
                for text in connection.execute(select(column).where(column.is_not(None))).scalars()
            }
        )
        await asyncio.to_thread(self._database.payloads.remove_below, current, needed)
        return count


def of_row(row: Row[Any]) -> Operation:
    made = Operation(
        id=row.id,
        owner=row.owner,
        scope=row.scope,
        seq=row.seq,
        kind=row.kind,
        options=json.loads(row.options_json),
        digest=row.digest,
        body=Ref.of(row.body) if row.body else None,
        state=row.state,
        attempts=row.attempts,
        result=Ref.of(row.result) if row.result else None,
        result_kind=row.result_kind,
        error=row.error,
        category=row.category,
        created_at=row.created_at,
        described=len(row.options_json),
    )
    if made.state != "queued":
        made.ended.set()
    return made

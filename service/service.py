"""One server's parts, put together; routes are thin over it."""

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from typing import Any

import structlog
from sqlalchemy import Connection, Row, insert, select, update
from sqlalchemy.exc import IntegrityError

from plait.service import catalog
from plait.service.admission import Admission
from plait.service.audit import Audit
from plait.service.contexts import Contexts
from plait.service.database.database import Database
from plait.service.database.migrate import migrate
from plait.service.database.payloads import Payloads
from plait.service.database.tables import checkpoints, losses, runs, samplers
from plait.service.downloads import Downloads
from plait.service.engine.host import EngineHost
from plait.service.errors import BusyError, NotFoundError, ServiceError
from plait.service.fetching import Fetcher
from plait.service.finished import Completions
from plait.service.gate import Rate
from plait.service.keys import Caller, Keys
from plait.service.operations import Also, JobLog, Operation, insert_new
from plait.service.running import Runner
from plait.service.scopes import Scope
from plait.service.sessions import Sessions
from plait.service.settings import ServiceSettings, make_folder
from plait.service.sweeping import close_forgotten
from plait.service.talking import Talks
from plait.service.tokens import caller_of_token
from plait.service.uploads import Uploads

_LOG = structlog.get_logger()
_TICK = 1.0
_SWEEP = 60.0


class Service:
    """Everything behind the routes.

    Args:
        clock: Seconds since the epoch.
    """

    def __init__(self, settings: ServiceSettings, clock: Callable[[], float] = time.time) -> None:
        self.settings, self.clock = settings, clock
        make_folder(settings.data_dir)
        migrate(settings.database_url)
        self.payloads = Payloads(settings.data_dir / "payloads")
        self.database = Database(settings.database_url, self.payloads)
        self.log = JobLog(self.database)
        self.sessions = Sessions(self.database)
        self.keys = Keys(self.database)
        self.audit = Audit(self.database, clock)
        self.downloads = Downloads(settings.data_dir / "checkpoints", clock)
        self.host = EngineHost(_engine_options(settings), self._engine_changed)
        self.runner = Runner(
            self.log,
            self.database,
            self.host,
            recovery_seconds=settings.recovery_seconds,
            gap_seconds=settings.gap_seconds,
            clock=clock,
            rate=Rate(settings.quotas.requests_per_minute),
        )
        self.admission = Admission(settings.quotas, self.runner)
        self.completions = Completions(self.log, clock)
        self.runner.recorder.ended = self.completions.ended
        self.fetcher = Fetcher(settings.allowed_hosts, settings.media_bytes)
        self.uploads = Uploads(
            settings.data_dir / "media", settings.media_bytes, settings.quotas.upload_bytes
        )
        self.talks = Talks(self)
        self.contexts = Contexts(settings.models, self.ask_engine)
        self.draining = False
        self._delivered: set[str] = set()
        self._tasks: list[asyncio.Task[None]] = []

    def _engine_changed(self, up: bool) -> None:
        self.runner.engine_changed(up)

    async def start(self) -> None:
        self.host.start()
        await self.runner.begin()
        self._tasks = [
            asyncio.create_task(self._every(_TICK, self._tick), name="tick"),
            asyncio.create_task(self._every(_SWEEP, self._sweep), name="sweep"),
        ]

    async def stop(self) -> None:
        """Let go; what is under way is in the log, and is done by the next server."""
        self.draining = True
        self.database.hurry()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.runner.stop()
        await self.host.stop()
        await self.audit.write()
        await asyncio.to_thread(self.database.close)
        self.payloads.close()

    async def _every(self, seconds: float, work: Callable[[], Any]) -> None:
        while True:
            await asyncio.sleep(seconds)
            try:
                await work()
            except ServiceError as error:
                _LOG.warning("periodic_work_failed", error=error.message)
            except Exception:
                _LOG.exception("periodic_work_failed")

    async def _tick(self) -> None:
        await self.audit.write()
        await self._write_delivered()
        await self.runner.tick(self.settings.session_seconds)

    async def _sweep(self) -> None:
        settings = self.settings
        self.completions.sweep()
        self.sessions.forget_before(self.clock() - settings.session_seconds)
        if self.host.up:
            await close_forgotten(
                self.database, self.host, self.clock() - settings.undelivered_seconds
            )
        now = self.clock()
        await self.log.forget(now, settings.retention_seconds, settings.undelivered_seconds)
        await self.log.forget_numbers(now - settings.known_seconds)
        await self.audit.forget(now - settings.audit_seconds)

    # Promises

    async def submit(
        self,
        caller: Caller,
        scope_name: str,
        seq: int,
        kind: str,
        options: dict[str, Any],
        body: bytes = b"",
        *,
        also: Also | None = None,
    ) -> Operation:
        """Promise an operation, and send it on its way.

        Raises:
            BusyError: too much of this owner waits already.
            ServiceError: its number was given to another request.
        """
        if self.draining:
            raise BusyError("the server is being stopped; try again in a moment")
        self.admission.check_waiting(caller.owner, scope_name, seq)
        now = self.clock()
        operation, new = await self.log.accept(
            caller.owner, scope_name, seq, kind, options, body, now, also
        )
        return await self.runner.take_up(operation, new)

    async def refuse(self, scope_name: str, seq: int) -> None:
        """A number was answered with an error: nothing will come under it."""
        scope = await self.runner.scope(scope_name)
        if scope is not None:
            await self.runner.refuse(scope, seq)

    # What there is

    async def run(self, caller: Caller, name: str) -> Row[Any]:
        """
        Raises:
            NotFoundError: this owner has none.
        """
        return await self._owned(caller, runs, name, "run")

    async def owned(self, caller: Caller, name: str, kind: str) -> None:
        """That a run, or a sampler that is not closed, is this caller's; asked with each request.

        Raises:
            NotFoundError: this owner has none.
        """
        scope = await self.runner.scope(name)
        if scope is None or scope.owner != caller.owner or scope.is_run != (kind == "run"):
            raise NotFoundError(kind, name)

    async def sampler(self, caller: Caller, name: str) -> Row[Any]:
        """
        Raises:
            NotFoundError: this owner has none.
        """
        return await self._owned(caller, samplers, name, "sampling session")

    async def _owned(self, caller: Caller, table: Any, name: str, kind: str) -> Row[Any]:
        row: Row[Any] | None = await self.database.read(
            lambda connection: connection.execute(
                select(table).where((table.c.id == name) & (table.c.owner == caller.owner))
            ).one_or_none()
        )
        if row is None:
            raise NotFoundError(kind, name)
        return row

    async def checkpoint(self, caller: Caller, path: str, *, own: bool = False) -> Row[Any]:
        """
        Args:
            own: Others' public ones do not count.

        Raises:
            NotFoundError: there is none that this caller may read.
        """
        c = checkpoints.c
        readable = c.owner == caller.owner
        if not own:
            readable = readable | c.public
        now = self.clock()
        alive = c.expires_at.is_(None) | (c.expires_at > now)
        row: Row[Any] | None = await self.database.read(
            lambda connection: connection.execute(
                select(checkpoints).where((c.path == path) & readable & alive)
            ).one_or_none()
        )
        if row is None:
            raise NotFoundError("checkpoint", path)
        return row

    def manifest(self, path: str) -> dict[str, Any]:
        """Of a checkpoint that is there.

        Raises:
            NotFoundError: its files are gone.
        """
        parts = path.removeprefix("tinker://").split("/")
        file = self.settings.data_dir.joinpath("checkpoints", *parts, "manifest.json")
        try:
            manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except OSError:
            raise NotFoundError("checkpoint", path) from None
        return manifest

    # Making runs and samplers

    async def create_run(
        self,
        caller: Caller,
        session: str,
        number: int,
        base_model: str,
        options: dict[str, Any],
        metadata: dict[str, Any],
    ) -> Operation:
        """Promise a run `<session>:train:<number>`; its first operation makes it.

        Raises:
            ServiceError: this owner has as many runs as may be.
        """
        name, now = f"{session}:train:{number}", self.clock()
        values = {
            "id": name, "session_id": session, "owner": caller.owner, "base_model": base_model,
            "spec_json": json.dumps(options["spec"]), "seed": options["seed"],
            "metadata_json": json.dumps(metadata), "created_at": now, "used_at": now,
            "next_seq": 0, "kept_seq": -1,
        }  # fmt: skip

        def also(connection: Connection) -> None:
            self.admission.check_runs(connection, caller.owner)
            connection.execute(insert(runs).values(**values))

        return await self.submit(caller, name, 0, "create", options, also=also)

    async def create_sampler(
        self, caller: Caller, session: str, number: int, base_model: str, path: str | None
    ) -> str:
        """A sampler `<session>:sample:<number>`; the engine opens it with its first request."""
        name = f"{session}:sample:{number}"
        model: dict[str, Any] = {}
        if path is None:
            model = catalog.sampled(catalog.offered(self.settings.models, base_model))
        values = {
            "id": name, "session_id": session, "owner": caller.owner, "base_model": base_model,
            "model_path": path, "spec_json": json.dumps(model["spec"]) if "spec" in model else None,
            "weights": model.get("weights"), "joined": 0, "created_at": self.clock(),
        }  # fmt: skip
        await self.database.write(
            lambda connection: connection.execute(
                insert_new(connection, samplers).values(**values).on_conflict_do_nothing()
            )
        )
        return name

    async def close_sampler(self, name: str) -> None:
        """Give a sampler's weights back."""
        now = self.clock()
        await self.database.write(
            lambda connection: connection.execute(
                update(samplers).where(samplers.c.id == name).values(closed_at=now)
            )
        )
        await self.runner.drop_sampler(name)

    async def join_sampler(self, name: str) -> int:
        """Another client of a sampler: its number among them."""

        def work(connection: Connection) -> int:
            joined = samplers.c.joined + 1
            connection.execute(update(samplers).where(samplers.c.id == name).values(joined=joined))
            chosen = select(samplers.c.joined).where(samplers.c.id == name)
            return int(connection.execute(chosen).scalar_one())

        return await self.database.write(work)

    async def take_view(self, caller: Caller, run: Row[Any], seq: int, number: int) -> Operation:
        """Promise a sampler of a run's weights as they are now, which stay in memory."""
        name = f"{run.session_id}:sample:{number}"
        values = {
            "id": name, "session_id": run.session_id, "owner": caller.owner, "run_id": run.id,
            "base_model": run.base_model, "run_seq": seq, "joined": 0, "created_at": self.clock(),
        }  # fmt: skip
        try:
            return await self.submit(
                caller, run.id, seq, "take_view", {"sampler": name},
                also=lambda connection: connection.execute(insert(samplers).values(**values)),
            )  # fmt: skip
        except IntegrityError:  # two requests at once
            await self.refuse(run.id, seq)
            raise ServiceError(
                f"there is a sampler {number} in this session already", 422
            ) from None

    async def base_model_of(self, run: str) -> str:
        """The name under which a run's model is offered here."""
        name = await self.database.read(
            lambda connection: connection.execute(
                select(runs.c.base_model).where(runs.c.id == run)
            ).scalar_one_or_none()
        )
        if name is None:
            raise NotFoundError("run", run)
        return str(name)

    async def create_loss(
        self, caller: Caller, session: str, number: int, graph: dict[str, Any]
    ) -> Operation:
        """Promise that a loss was checked by the engine, and is kept."""
        name = f"{session}:loss:{number}"
        values = {
            "id": name, "session_id": session, "owner": caller.owner, "name": graph["name"],
            "graph_json": json.dumps(graph), "created_at": self.clock(),
        }  # fmt: skip
        return await self.submit(
            caller, name, 0, "check_loss", {"graph": graph, "loss_id": name},
            also=lambda connection: connection.execute(insert(losses).values(**values)),
        )  # fmt: skip

    async def loss(self, caller: Caller, name: str) -> dict[str, Any]:
        """An uploaded loss.

        Raises:
            NotFoundError: this owner has none.
        """
        row = await self._owned(caller, losses, name, "loss")
        graph: dict[str, Any] = json.loads(row.graph_json)
        return graph

    async def database_answers(self) -> bool:
        try:
            await asyncio.wait_for(
                self.database.read(lambda connection: connection.execute(select(1)).scalar()), 2.0
            )
        except (TimeoutError, ServiceError):
            return False
        return True

    async def ask_engine(self, header: dict[str, Any]) -> dict[str, Any]:
        """Something that is no promise: it is done at once, or is refused."""
        said, _ = await self.host.call(header)
        return said

    async def until_done(self, operation: Operation, seconds: float) -> Operation:
        """Wait for it; what is known of it then."""
        live = self.runner.live.get(operation.id, operation)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(live.ended.wait(), seconds)
        return live

    def queue_state(self, operation: Operation) -> tuple[str, str | None]:
        """What a client that waits is told, and why."""
        if not self.host.up:
            return "paused_capacity", "the engine is being started"
        if self.runner.rate.paused(operation.owner):
            return "paused_rate_limit", "this key's requests a minute are used up"
        if self.runner.busy:
            return "paused_capacity", "others are being served"
        return "active", None

    # What was delivered, and what is done

    def note_delivered(self, operation: Operation) -> None:
        """Its retention begins; written with the next tick."""
        self._delivered.add(operation.id)

    async def _write_delivered(self) -> None:
        names, self._delivered = self._delivered, set()
        if names:
            await self.log.delivered(names, self.clock())

    async def cancel(self, operation: Operation) -> None:
        """Ask that a sample not be drawn to its end; it ends as failed."""
        await self.runner.cancel(operation)

    async def identify(self, key: str) -> Caller:
        """Who a key, or a token, belongs to.

        Raises:
            ServiceError: nobody.
        """
        if key.startswith("eyJ") and self.settings.jwt_secret is not None:
            return caller_of_token(key, self.settings.jwt_secret, self.clock())
        return await self.keys.check(key, self.clock())

    def scope_now(self, name: str) -> Scope | None:
        return self.runner.scopes.get(name)


def _engine_options(settings: ServiceSettings) -> dict[str, Any]:
    return {
        "data_dir": str(settings.data_dir.resolve()),
        "capacity": settings.engine_capacity,
        "media_bytes": settings.media_bytes,
        "sampler_memory_mb": settings.sampler_memory_mb,
        "devices": settings.devices,
        "threads": settings.threads,
    }

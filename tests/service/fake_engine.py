"""An engine that only notes what it was told, and ends, or is silent, on cue; with the service's
real log, database and payload files around it."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import insert, select
from sqlalchemy.dialects import sqlite

from plait.service.database.database import Database
from plait.service.database.migrate import migrate
from plait.service.database.payloads import Payloads
from plait.service.database.tables import checkpoints, operations, runs, samplers, sessions
from plait.service.engine.host import EngineDiedError
from plait.service.operations import JobLog, Operation
from plait.service.running import Runner

Header = dict[str, Any]
Reply = asyncio.Future[tuple[Header, bytes]]


class FakeEngine:
    """Stands in for `EngineHost`. A run's weights are the list of what changed them."""

    def __init__(self) -> None:
        self.up, self.life, self.restarts = False, 0, 0
        self.changed: Callable[[bool], None] = lambda _: None
        self.disk: dict[str, list[str]] = {}
        self.held: dict[str, list[str]] = {}
        self.spoilt: set[str] = set()
        self.sent: list[Header] = []
        self.silent: set[str] = set()
        """Kinds that are done, and not answered until `answer`."""

        self.deadly: set[str] = set()
        """Bodies that end the process."""

        self._open: list[tuple[Header, Reply, Header]] = []

    def start(self) -> None:
        self.up, self.life = True, self.life + 1
        self.changed(True)

    def die(self) -> None:
        self.up, self.held, self.spoilt = False, {}, set()
        self.restarts += 1
        waiting, self._open = self._open, []
        for _, reply, _ in waiting:
            reply.set_exception(EngineDiedError("it ended"))
        self.changed(False)

    def answer(self, kind: str, last: bool = False) -> None:
        """Answer what was held back of a kind: all of it, or the last one alone."""
        chosen = [one for one in self._open if one[0]["do"] == kind]
        for one in chosen[-1:] if last else chosen:
            self._open.remove(one)
            one[1].set_result((one[2], b""))

    def kinds(self, *but: str) -> list[str]:
        return [header["do"] for header in self.sent if header["do"] not in but]

    def send(
        self, header: Header, body: bytes = b"", listener: Any = None, life: int | None = None
    ) -> Reply:
        reply: Reply = asyncio.get_running_loop().create_future()
        if not self.up or (life is not None and life != self.life):
            reply.set_exception(EngineDiedError("it is down"))
            reply.exception()
            return reply
        self.sent.append(header)
        if body.decode() in self.deadly:
            self._open.append((header, reply, {}))
            asyncio.get_running_loop().call_soon(self._restart)
            return reply
        try:
            said = {"result": self._done(header, body.decode())}
        except ValueError as error:
            said = {"error": str(error), "category": "user"}
        said |= {"size": 1, "expires_at": None}
        if header["do"] in self.silent:
            self._open.append((header, reply, said))
        else:
            reply.set_result((said, b""))
        return reply

    def _restart(self) -> None:
        if self.up:
            self.die()
            asyncio.get_running_loop().call_later(0.01, self.start)

    async def call(self, header: Header, body: bytes = b"") -> tuple[Header, bytes]:
        return await self.send(header, body)

    def _done(self, header: Header, body: str) -> Any:
        scope, kind = header["scope"], header["do"]
        if kind == "create":
            path = header.get("path")
            kept = f"tinker://{scope}/weights/{header['kept']}" if "kept" in header else path
            self.held[scope] = list(self.disk[kept]) if kept else []
        elif kind == "drop":
            self.held.pop(scope, None)
        elif kind == "open_view":
            self.held[scope] = self.disk[header["path"]]
        elif kind == "forget":
            for path in header["paths"]:
                del self.disk[path]
            mine = f"tinker://{scope}/weights/"
            for path in [path for path in self.disk if path.startswith(mine)]:
                if int(path.removeprefix(mine)) < header.get("below", 0):
                    del self.disk[path]
        elif scope not in self.held:
            raise ValueError(f"the engine does not hold {scope}")
        else:
            return self._of_held(header, body)
        return {}

    def _of_held(self, header: Header, body: str) -> Any:
        scope, kind = header["scope"], header["do"]
        weights = self.held[scope]
        if kind == "optim_step" and scope in self.spoilt:
            self.spoilt.discard(scope)
            raise ValueError("a forward_backward before it failed")
        if kind == "forward_backward" and body == "bad":
            self.spoilt.add(scope)
            raise ValueError("this is no data")
        if kind in ("forward_backward", "optim_step"):
            weights.append(body or f"step {header['number']}")
        elif kind == "load":
            weights[:] = self.disk[header["path"]]
        elif kind == "abandon":
            self.spoilt.add(scope)
        elif kind == "take_view":
            self.held[header["sampler"]] = list(weights)
        elif kind in ("keep", "keep_view"):
            path = header.get("path", f"tinker://{scope}/weights/{header.get('name')}")
            self.disk[path] = list(weights)
        elif kind == "sample":
            return list(weights)
        return {}


@dataclass
class World:
    """A service without routes; `again` is what a kill and a new process make of it."""

    folder: Path
    gap_seconds: float = 60.0
    recovery_seconds: float = 1e9
    engine: FakeEngine = field(default_factory=FakeEngine)

    def open(self) -> None:
        url = f"sqlite:///{self.folder / 'plait.db'}"
        migrate(url)
        self.payloads = Payloads(self.folder / "payloads", lock_seconds=0.0)
        self.database = Database(url, self.payloads, patience=0.2)
        self.log = JobLog(self.database)
        self.runner = Runner(
            self.log,
            self.database,
            self.engine,  # type: ignore[arg-type]
            recovery_seconds=self.recovery_seconds,
            gap_seconds=self.gap_seconds,
            clock=time.time,
        )
        self.engine.changed = self.runner.engine_changed

    async def close(self) -> None:
        await self.runner.stop()
        self.database.close()
        self.payloads.close()

    async def again(self) -> None:
        """Another server process, and with it another engine."""
        if self.engine.up:
            self.engine.die()
        await self.close()
        self.open()
        await self.runner.begin()
        self.engine.start()

    async def crash(self) -> None:
        """Another engine."""
        self.engine.die()
        await settle()
        self.engine.start()

    async def create(self, name: str = "run", **options: Any) -> Operation:
        values = {"id": name, "session_id": "session", "owner": "anna", "base_model": "tiny",
                  "spec_json": "{}", "created_at": 0.0, "used_at": 0.0, "next_seq": 0,
                  "kept_seq": -1}  # fmt: skip
        return await self.submit(
            name, 0, "create", {"spec": {}, "seed": 0, **options}, table=runs, values=values
        )

    async def view(self, sampler: str, seq: int, run: str = "run") -> Operation:
        values = {"id": sampler, "session_id": "session", "owner": "anna", "base_model": "tiny",
                  "run_id": run, "run_seq": seq, "joined": 0, "created_at": 0.0}  # fmt: skip
        return await self.submit(
            run, seq, "take_view", {"sampler": sampler}, table=samplers, values=values
        )

    async def checkpoint(self, path: str, weights: list[str]) -> None:
        """Weights under a name, as a save leaves them."""
        self.engine.disk[path] = weights
        run, kind, name = path.removeprefix("tinker://").split("/")
        values = {"path": path, "owner": "anna", "run_id": run, "kind": kind, "name": name,
                  "created_at": time.time(), "public": False, "metadata_json": "{}"}  # fmt: skip
        row = sqlite.insert(checkpoints).values(**values)
        anew = row.on_conflict_do_update(index_elements=["path"], set_=values)
        await self.database.write(lambda connection: connection.execute(anew))

    async def sampler(self, name: str, path: str) -> None:
        """A sampler of a checkpoint."""
        values = {"id": name, "session_id": "session", "owner": "anna", "base_model": "tiny",
                  "model_path": path, "joined": 0, "created_at": time.time()}  # fmt: skip
        await self.database.write(
            lambda connection: connection.execute(insert(samplers).values(**values))
        )

    async def learn(self, seq: int, body: str, run: str = "run") -> Operation:
        return await self.submit(run, seq, "forward_backward", {"forward": False}, body)

    async def step(self, seq: int, run: str = "run") -> Operation:
        return await self.submit(run, seq, "optim_step", {"number": seq})

    async def sample(self, sampler: str, seq: int = 0) -> str:
        return await self.result(await self.submit(sampler, seq, "sample", {}, "p"))

    async def submit(
        self, scope: str, seq: int, kind: str, options: Header, body: str = "", *,
        table: Any = None, values: Header | None = None,
    ) -> Operation:  # fmt: skip
        def also(connection: Any) -> None:
            if table is not None:
                connection.execute(insert(table).values(**values))

        operation, new = await self.log.accept(
            "anna", scope, seq, kind, options, body.encode(), time.time(), also
        )
        return await self.runner.take_up(operation, new)

    async def ended(self, *promised: Operation) -> None:
        for one in promised:
            one = self.runner.live.get(one.id, one)
            await asyncio.wait_for(one.ended.wait(), 30)

    async def result(self, operation: Operation) -> str:
        """What came of it: its content, or its error."""
        await self.ended(operation)
        found = await self.log.by_id(operation.id)
        assert found is not None
        return found.error or (await self.log.result(found)).decode()

    async def states(self, scope: str = "run") -> dict[int, str]:
        c = operations.c
        rows = await self.database.read(
            lambda connection: connection.execute(
                select(c.seq, c.state).where(c.scope == scope).order_by(c.seq)
            ).all()
        )
        return {row.seq: row.state for row in rows}


async def trained(world: World) -> None:
    """A run of `a`, a step, and `b`."""
    await world.create()
    await world.learn(1, "a")
    await world.step(2)
    await world.ended(await world.learn(3, "b"))


async def settle() -> None:
    """Let everything go on that can."""
    for _ in range(20):
        await asyncio.sleep(0.01)


def in_world(folder: Path, work: Callable[[World], Coroutine[Any, Any, None]], **more: Any) -> None:
    """Do `work` with a world that is up, and put it away."""

    async def whole() -> None:
        world = World(folder, **more)
        world.open()
        values = {"id": "session", "owner": "anna", "about_json": "{}", "created_at": 0.0,
                  "seen_at": 0.0}  # fmt: skip
        await world.database.write(
            lambda connection: connection.execute(insert(sessions).values(**values))
        )
        world.engine.start()
        try:
            await work(world)
        finally:
            await world.close()

    asyncio.run(whole())

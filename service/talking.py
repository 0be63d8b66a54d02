"""Conversations with a model: answered at once or refused, so that they are no promises.

A model is named as the server offers it, by a run (its weights as they are now), or by the path of
a checkpoint.
"""

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from sqlalchemy import select

from plait.service import catalog
from plait.service.conversations import Asked
from plait.service.database.tables import checkpoints, runs
from plait.service.engine.frames import Header
from plait.service.engine.host import EngineDiedError, raise_error
from plait.service.errors import BusyError, ServiceError
from plait.service.keys import Caller
from plait.service.scopes import owner_folder

if TYPE_CHECKING:
    from plait.service.service import Service

_ATTEMPTS = 3
_WAIT_SECONDS = 120.0
"""For an engine that is being started."""

_MOST_AT_ONCE = 256
"""Conversations of one owner."""

_MOST_OPEN = 16
"""Checkpoints whose weights stay in the engine for the next conversation."""


class Talk:
    """One request for answers, under way."""

    def __init__(self, service: "Service", header: Header, body: bytes, drop: str | None) -> None:
        self._service, self._header, self._body, self._drop = service, header, body, drop
        self.begun_at = service.clock()
        self._texts: asyncio.Queue[tuple[int, str] | None] = asyncio.Queue()
        self._told = False
        self._task = asyncio.create_task(self._work())

    async def _work(self) -> dict[str, Any]:
        try:
            for left in reversed(range(_ATTEMPTS)):
                reply = self._service.host.send(self._header, self._body, self._listen)
                try:
                    said, _ = await reply
                except EngineDiedError:
                    if self._told or not left or self._drop is not None:
                        raise
                    await self._service.talks.ready(self._header["scope"])
                    continue
                raise_error(said)
                answer: dict[str, Any] = said["result"]
                return answer
            raise AssertionError("the last attempt raises")
        finally:
            self._texts.put_nowait(None)
            if self._drop is not None:
                self._service.talks.drop(self._drop)

    def _listen(self, event: Header) -> None:
        self._told = True
        self._texts.put_nowait((event["sequence"], event["text"]))

    async def texts(self) -> AsyncIterator[tuple[int, str]]:
        """More of each answer's text, as it comes."""
        while (one := await self._texts.get()) is not None:
            yield one

    async def answer(self) -> dict[str, Any]:
        """All of it.

        Raises:
            ServiceError: it could not be given.
        """
        try:
            return await asyncio.shield(self._task)
        except asyncio.CancelledError:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Nobody listens any more."""
        header = {"do": "cancel", "scope": "", "sampler": self._header["scope"],
                  "operation": self._header["operation"]}  # fmt: skip
        sent = self._service.host.send(header)
        sent.add_done_callback(lambda done: done.exception())


class Talks:
    """Conversations, and the weights that they need."""

    def __init__(self, service: "Service") -> None:
        self._service = service
        self._open: dict[str, int] = {}
        self._opening: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        """By the weights that are being opened."""

        self._recent: dict[str, None] = {}
        """Checkpoints that were opened, the one used last at the end."""

    async def names(self, caller: Caller) -> list[tuple[str, float, str]]:
        """(name, since when, whose) of all models that this caller may name."""

        def work(connection: Any) -> list[tuple[str, float, str]]:
            mine = connection.execute(
                select(runs.c.id, runs.c.created_at).where(runs.c.owner == caller.owner)
            ).all()
            saved = connection.execute(
                select(checkpoints.c.path, checkpoints.c.created_at).where(
                    checkpoints.c.owner == caller.owner
                )
            ).all()
            return [(name, at, caller.owner) for name, at in [*mine, *saved]]

        offered = [(name, 0.0, "plait") for name in self._service.settings.models]
        return offered + await self._service.database.read(work)

    async def begin(self, caller: Caller, model: str, prompt: Any, asked: Asked) -> Talk:
        """
        Raises:
            ServiceError: there is no such model, or the engine does not come back.
            BusyError: this owner has too many conversations at once.
        """
        self.enter(caller.owner)
        try:
            return await self._begun(caller, model, prompt, asked)
        except BaseException:
            self.leave(caller.owner)
            raise

    async def _begun(self, caller: Caller, model: str, prompt: Any, asked: Asked) -> Talk:
        await self._service.runner.rate.enter(caller.owner)
        scope, drop = await self._weights(caller, model)
        seed = asked.seed if asked.seed is not None else uuid.uuid4().int % 2**62
        header = {
            "do": "chat", "lane": self._lane(caller, scope), "scope": scope, "seed": seed,
            "operation": uuid.uuid4().hex, "owner_key": owner_folder(caller.owner),
        }  # fmt: skip
        body = {
            "prompt": prompt, "sampling_params": asked.sampling_params(), "n": asked.n,
            "stream": asked.stream,
        }  # fmt: skip
        talk = Talk(self._service, header, json.dumps(body).encode(), drop)
        talk._task.add_done_callback(lambda _: self.leave(caller.owner))
        return talk

    def enter(self, owner: str) -> None:
        """Count an answer that is given at once; `leave` ends it.

        Raises:
            BusyError: too many of this owner are being given.
        """
        if self._open.get(owner, 0) >= _MOST_AT_ONCE:
            raise BusyError(f"{_MOST_AT_ONCE} conversations of this owner are open; try later")
        self._open[owner] = self._open.get(owner, 0) + 1

    def leave(self, owner: str) -> None:
        self._open[owner] -= 1
        if not self._open[owner]:
            del self._open[owner]

    async def _weights(self, caller: Caller, model: str) -> tuple[str, str | None]:
        """The view that samples, and its name where it goes with the conversation."""
        service = self._service
        if model in service.settings.models:
            scope = f"talk:{model}"
            await self.ready(scope)
            return scope, None
        if model.startswith("tinker://"):
            saved = await service.checkpoint(caller, model)
            # Saved anew under its name, it is another one.
            scope = f"talk:{saved.path}@{saved.created_at}"
            await self.ready(scope)
            return scope, None
        try:
            run = await service.run(caller, model)
        except ServiceError:
            raise ServiceError(
                f"there is no model {model!r}; GET /v1/models lists them", 404
            ) from None
        view = f"talk:{run.id}:{uuid.uuid4().hex}"
        await self.engine_up()
        await service.runner.with_scope(run.id, {"do": "take_view", "sampler": view})
        return view, view

    async def ready(self, scope: str) -> None:
        """Have a base model's or a checkpoint's weights in the engine.

        Raises:
            ServiceError: they cannot be opened, or the engine does not come back.
        """
        await self.engine_up()
        name = scope.removeprefix("talk:")
        header: Header = {"do": "open_view", "scope": scope}
        if name in self._service.settings.models:
            header |= catalog.sampled(self._service.settings.models[name])
        else:
            header["path"] = name.rpartition("@")[0]
        lock = self._opening.setdefault(scope, asyncio.Lock())
        async with lock:
            await self._service.host.call(header)
            if "path" in header:
                self._recent.pop(scope, None)
                self._recent[scope] = None
                if len(self._recent) > _MOST_OPEN:  # what is being sampled is sampled to its end
                    oldest = next(iter(self._recent))
                    del self._recent[oldest]
                    self.drop(oldest)

    async def ask(
        self, caller: Caller, model: str, header: Header, body: bytes = b""
    ) -> tuple[Header, bytes]:
        """Ask what only a model's own tokenizer and encoders know.

        Raises:
            ServiceError: there is no such model, or the answer is an error.
        """
        header = {**header, "owner_key": owner_folder(caller.owner)}
        await self.engine_up()
        if model in self._service.settings.models:
            await self.ready(f"talk:{model}")
            scope = f"talk:{model}"
            lane = {"scope": scope, "lane": self._lane(caller, scope)}
            return await self._service.host.call({**header, **lane}, body)
        run = await self._service.run(caller, model)
        return await self._service.runner.with_scope(run.id, header, body)

    def _lane(self, caller: Caller, scope: str) -> str:
        """What is done in order: of a base model, which stays, an owner's own requests alone."""
        stays = scope.removeprefix("talk:") in self._service.settings.models
        return f"{scope} of {caller.owner}" if stays else scope

    async def engine_up(self) -> None:
        """Wait for an engine that is being started.

        Raises:
            EngineDiedError: it does not come.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_WAIT_SECONDS):
                while not self._service.host.up:
                    await asyncio.sleep(0.1)
                return
        raise EngineDiedError("the engine does not start; see the server's log")

    def drop(self, view: str) -> None:
        """Give a conversation's own weights back."""
        header = {"do": "drop", "scope": view, "what": "sampler"}
        self._service.host.send(header).add_done_callback(lambda done: done.exception())

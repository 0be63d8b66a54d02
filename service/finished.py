"""Which requests of a sampler are done, for clients that wait for many at once."""

import asyncio
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from plait.service.errors import ServiceError
from plait.service.operations import JobLog, Operation

CLONES = 1_000_000_000
"""Numbers that each client of a sampler has to itself."""

_UNASKED = 3600.0
"""Seconds after which a client that does not ask any more is forgotten; it may ask again."""


@dataclass(slots=True, eq=False)
class Finished:
    """Completions of one client of a sampler, numbered as they come.

    Numbers of a later process are larger than those of an earlier one, so that a client's cursor
    stays good; what it may have missed between them is told once more.
    """

    cursor: int = field(default_factory=time.time_ns)
    asked_at: float = 0.0
    _told: dict[str, tuple[int, dict[str, Any]]] = field(default_factory=dict)
    _event: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, operation: Operation) -> None:
        if operation.id in self._told:
            return
        self.cursor += 1
        told: dict[str, Any] = {"state": "finished", "request_id": operation.id}
        if operation.state == "failed":
            told["state"] = "failed"
        elif operation.result is not None:
            told["response_payload_uncompressed_size"] = operation.result.length
        self._told[operation.id] = self.cursor, told
        self._event.set()

    def after(self, cursor: int) -> list[tuple[int, dict[str, Any]]]:
        """Those that came later; earlier ones were seen, and are forgotten."""
        self._told = {name: pair for name, pair in self._told.items() if pair[0] > cursor}
        return list(self._told.values())

    def forget(self, names: Collection[str]) -> None:
        """A client has what came of these."""
        for name in names:
            self._told.pop(name, None)

    async def more(self) -> None:
        """Wait for another one."""
        self._event.clear()
        await self._event.wait()


class Completions:
    """Of all clients that ask; who never asks costs nothing."""

    def __init__(self, log: JobLog, clock: Callable[[], float]) -> None:
        self._log, self._clock = log, clock
        self._of: dict[tuple[str, int], Finished] = {}

    def ended(self, operation: Operation) -> None:
        asked = self._of.get((operation.scope, operation.seq // CLONES))
        if asked is not None and operation.kind == "sample":
            asked.add(operation)

    async def of(self, sampler: str, clone: int) -> Finished:
        """One client's; what was not delivered to it before it asked comes first."""
        key = sampler, clone
        if key not in self._of:
            self._of[key] = Finished(asked_at=self._clock())
            try:
                before = await self._log.undelivered(sampler, clone * CLONES, CLONES)
            except ServiceError:
                self._of.pop(key, None)
                raise
            for operation in before:
                self._of[key].add(operation)
        self._of[key].asked_at = self._clock()
        return self._of[key]

    def sweep(self) -> None:
        old = self._clock() - _UNASKED
        self._of = {key: one for key, one in self._of.items() if one.asked_at > old}

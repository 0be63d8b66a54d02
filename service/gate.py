"""Turns between owners: nobody's queue keeps another one waiting."""

import asyncio
import time
from collections import deque
from collections.abc import Callable


class FairGate:
    """Lets so many in at once; those who wait are let in by turns of their owners.

    Args:
        room: How many may be in.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        """By owner, the one whose turn is next first."""

    @property
    def full(self) -> bool:
        return self._room <= 0

    async def enter(self, owner: str) -> None:
        """Wait for one's turn; `leave` gives it back."""
        if self._room > 0 and not self._waiting:
            self._room -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.leave()
            raise

    def leave(self) -> None:
        self._room += 1
        while self._room > 0 and self._waiting:
            owner = next(iter(self._waiting))
            queue = self._waiting.pop(owner)
            turn = queue.popleft()
            if queue:  # to the end of the line
                self._waiting[owner] = queue
            if not turn.cancelled():
                self._room -= 1
                turn.set_result(None)


class Rate:
    """So many operations of an owner a minute; what is over waits for its turn.

    Args:
        per_minute: None is no limit.
        clock: Seconds, which only rise.
    """

    def __init__(self, per_minute: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute, self._clock = per_minute, clock
        self._free_at: dict[str, float] = {}

    async def enter(self, owner: str) -> None:
        if self._per_minute is None:
            return
        now, between = self._clock(), 60.0 / self._per_minute
        # Unused turns of the last minute may be taken at once.
        turn = max(self._free_at.get(owner, 0.0), now - 60.0) + between
        self._free_at[owner] = turn
        if turn > now:
            await asyncio.sleep(turn - now)

    def paused(self, owner: str) -> bool:
        return self._free_at.get(owner, 0.0) > self._clock()

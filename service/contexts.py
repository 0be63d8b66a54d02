"""How long the inputs are that the offered models were made for."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from plait.service.catalog import Offer
from plait.service.errors import ServiceError

_PATIENCE = 2.0
"""Seconds for the engine to look: weights may have to be fetched first, which takes long."""

Ask = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


class Contexts:
    """Asks the engine once for each model.

    Args:
        ask: Sends the engine a message; its answer.
    """

    def __init__(self, models: Mapping[str, Offer], ask: Ask) -> None:
        self._models, self._ask = models, ask
        self._known: dict[str, int | None] = {}
        self._asking: dict[str, asyncio.Task[None]] = {}

    async def of(self, name: str) -> int | None:
        """Positions of a model's input; None where its configuration says nothing, or the engine
        cannot say it yet."""
        if name not in self._known:
            if name not in self._asking:
                self._asking[name] = asyncio.create_task(self._find(name))
            await asyncio.wait([self._asking[name]], timeout=_PATIENCE)
        return self._known.get(name)

    async def _find(self, name: str) -> None:
        language = self._models[name].spec.language
        header = {"do": "context", "scope": f"context:{name}", "language": language}
        try:
            self._known[name] = (await self._ask(header))["result"]["context"]
        except ServiceError:  # it is asked again with the next request
            pass
        finally:
            del self._asking[name]

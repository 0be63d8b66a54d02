"""Calls that are waited for, awaited, given up, or refused because the client is closed."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Any

import pytest

from plait.client import TrainingClient
from plait.errors import ModelError
from plait.modalities import Text
from plait.stream import Sample
from plait.types import AdamParams, SamplingParams

Make = Callable[..., TrainingClient]


def test_a_stream_that_is_dropped_before_its_first_token_is_cancelled(make: Make) -> None:
    client = make()
    here = client.save_weights_and_get_sampling_client()
    params = SamplingParams(seed=1, max_tokens=200, stop=())
    for begun in (False, True):
        tokens = here.stream(client.prompt(Text("which: ")), 1, params)
        if begun:
            next(tokens)
        future = tokens._future
        del tokens
        with pytest.raises(CancelledError):
            future.result(60)
    tokens = here.stream(client.prompt(Text("which: ")), 1, params)
    tokens.close()
    assert list(tokens) == []


def test_a_sample_that_nobody_awaits_any_more_is_cancelled(make: Make) -> None:
    """As `asyncio.wait_for` leaves it after its time."""
    client = make()
    here = client.save_weights_and_get_sampling_client()

    async def main() -> Any:
        future = here.sample(client.prompt(Text("which: ")), 1, SamplingParams(seed=1))
        waiting = asyncio.ensure_future(_awaited(future))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        return future

    held = threading.Event()
    work = client._engine._work
    turn = work._turn

    def waits() -> None:
        assert held.wait(60)
        work._turn = turn  # type: ignore[method-assign]
        turn()

    work._turn = waits  # type: ignore[method-assign]
    future = asyncio.run(main())
    held.set()
    with pytest.raises(CancelledError):
        future.result(60)


async def _awaited(future: Any) -> Any:
    return await future


def test_futures_are_awaitable_and_resolve_in_order(make: Make, samples: list[Sample]) -> None:
    client = make()
    data = [client.datum(samples[0])]
    order: list[int] = []

    async def main() -> None:
        futures = []
        for number in range(4):
            future = client.forward(data)
            future._future.add_done_callback(lambda _, n=number: order.append(n))
            futures.append(future)
        await futures[3]
        assert all(future._future.done() for future in futures)
        assert (await futures[0]).metrics == futures[0].result(timeout=1).metrics
        assert (await client) is client

    asyncio.run(main())
    assert order == [0, 1, 2, 3]


def test_a_failed_command_does_not_stop_the_next(make: Make, samples: list[Sample]) -> None:
    client = make()
    bad = client.optim_step(AdamParams())
    good = client.forward([client.datum(samples[0])])
    assert good.result().metrics["loss:sum"] > 0
    with pytest.raises(ModelError):
        bad.result()


def test_a_closed_engine_refuses_but_finishes(make: Make, samples: list[Sample]) -> None:
    client = make()
    data = [client.datum(samples[0])]
    last = client.forward(data)
    client.close()
    client.close()
    assert last._future.done()
    with pytest.raises(ModelError, match="client is closed"):
        client.forward(data)

"""The engine's process, as the server sees it."""

import asyncio
import socket

import pytest
import uvloop

from plait.service.engine.host import EngineDiedError, EngineHost


def test_what_is_sent_to_an_engine_that_was_just_killed_waits_for_the_next() -> None:
    """uvloop refuses to write on a connection whose other end is gone; the server reads of the
    engine's end a moment later, and until then it does not know."""

    async def work() -> None:
        host = EngineHost({}, lambda _: None)
        mine, theirs = socket.socketpair()
        _, writer = await asyncio.open_connection(sock=mine)
        theirs.close()
        while not writer.is_closing():
            writer.write(b"x")
            await asyncio.sleep(0.01)
        host.up, host._writer = True, writer
        reply = host.send({"do": "optim_step", "scope": "run"})
        assert not reply.done(), "its end is told once, to all that wait"
        host._died()
        with pytest.raises(EngineDiedError):
            await reply

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work())

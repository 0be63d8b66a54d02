"""Numbers of a run's requests: one that is refused at once must not be waited for."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute

from plait.service.errors import ServiceError
from plait.service.keys import Caller
from plait.service.service import Service


class NumberedRoute(APIRoute):
    """A route whose request has a run's next number, which is used up even if its form is wrong:
    clients count it, and without this the requests behind it would wait for it.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handled(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                await _use_up(request, error.body)
                raise

        return handled


async def _use_up(request: Request, body: Any) -> None:
    caller: Caller | None = getattr(request.state, "caller", None)
    said = body if isinstance(body, dict) else {}
    run, seq = said.get("model_id"), said.get("seq_id")
    if caller is None or not isinstance(run, str) or type(seq) is not int or not 0 <= seq < 2**62:
        return
    if not run.isprintable():  # no database takes it
        return
    service: Service = request.app.state.service
    try:
        await service.run(caller, run)
        await service.refuse(run, seq)
    except ServiceError:  # it is no run of this caller: nothing waits
        return

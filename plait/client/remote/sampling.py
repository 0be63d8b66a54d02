"""The client that samples, over HTTP."""

import asyncio
import json
import queue
from collections.abc import Iterator
from concurrent.futures import Future
from itertools import count
from typing import Any, Self

from plait.client.futures import APIFuture, AsyncNames, Ready
from plait.client.remote.inputs import json_chunks
from plait.client.remote.rendering import Rendering
from plait.client.remote.transport import Transport
from plait.errors import ConfigError
from plait.ranges import check_number
from plait.service.wire import sampling as wire
from plait.types import ModelInput, SampledToken, SampleResponse, SamplingParams


class RemoteSamplingClient(AsyncNames, Ready, Rendering):
    """Fixed weights on a server; see `plait.SamplingClient`, whose methods these are.

    Args:
        sampler: The server's name for them.
        model: A run or a base model of the same tokenizer.
    """

    def __init__(self, transport: Transport, sampler: str, model: str) -> None:
        super().__init__(transport, model)
        self._sampler = sampler
        self._numbers = count()

    def sample(
        self,
        prompt: ModelInput,
        num_samples: int,
        sampling_params: SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
    ) -> APIFuture[SampleResponse]:
        """Continue a prompt `num_samples` times."""
        check_number("num_samples", num_samples, "[1, inf)", whole=True)
        more = {
            "prompt_logprobs": include_prompt_logprobs or topk_prompt_logprobs > 0,
            "topk_prompt_logprobs": topk_prompt_logprobs,
        }
        return self._asked(prompt, num_samples, sampling_params, more)

    def _asked(
        self, prompt: ModelInput, samples: int, params: SamplingParams, more: dict[str, Any]
    ) -> APIFuture[SampleResponse]:
        number, promised = next(self._numbers), dict[str, Any]()

        async def ask() -> SampleResponse:
            body = await self._body(prompt, samples, params, number, more)
            promised.update(await self._transport.ask("POST", "/api/v1/asample", json=body))
            response = await self._transport.result(promised)
            return await asyncio.to_thread(wire.answer_of, response.content)

        future = self._transport.run(ask())

        def cancel() -> None:
            if promised:
                body = {"request_id": promised["request_id"]}
                self._transport.run(self._transport.ask("POST", "/api/v1/cancel_future", json=body))
            future.cancel()

        return APIFuture(future, lambda response: response, cancel)

    async def _body(
        self,
        prompt: ModelInput,
        samples: int,
        params: SamplingParams,
        number: int,
        more: dict[str, Any],
    ) -> dict[str, Any]:
        if not isinstance(prompt, ModelInput):
            raise ConfigError(
                f"a prompt is a ModelInput; it was given as {type(prompt).__name__}: "
                "client.prompt(...) makes one of texts and media"
            )
        chunks = await json_chunks(self._transport, prompt)
        return {
            "sampling_session_id": self._sampler,
            "seq_id": number,
            "num_samples": samples,
            "prompt": {"chunks": chunks},
            "sampling_params": _said(params),
            **more,
        }

    async def sample_async(self, *args: Any, **options: Any) -> SampleResponse:
        """`sample`, and its result, as the Tinker API has it."""
        return await self.sample(*args, **options)

    def compute_logprobs(self, prompt: ModelInput) -> APIFuture[list[float | None]]:
        """The logprob of each of a prompt's tokens, given those before it."""
        params = SamplingParams(max_tokens=1)
        asked = self._asked(prompt, 1, params, {"prompt_logprobs": True})
        return asked.then(lambda response: response.prompt_logprobs or [])

    async def compute_logprobs_async(self, prompt: ModelInput) -> list[float | None]:
        """`compute_logprobs`, and its result, as the Tinker API has it."""
        return await self.compute_logprobs(prompt)

    def stream(
        self, prompt: ModelInput, num_samples: int, sampling_params: SamplingParams
    ) -> Iterator[SampledToken]:
        """The tokens of `sample` as they come, those of several sequences by turns."""
        arrived: queue.SimpleQueue[SampledToken | None] = queue.SimpleQueue()
        future = self._transport.run(self._streaming(prompt, num_samples, sampling_params, arrived))
        future.add_done_callback(lambda _: arrived.put(None))
        return _tokens(arrived, future)

    async def _streaming(
        self,
        prompt: ModelInput,
        samples: int,
        params: SamplingParams,
        arrived: "queue.SimpleQueue[SampledToken | None]",
    ) -> None:
        body = await self._body(prompt, samples, params, next(self._numbers), {})
        async for line in self._transport.lines("POST", "/api/v1/stream", json=body):
            said = json.loads(line)
            arrived.put(SampledToken(said["sequence"], said["token"], said["logprob"]))

    def close(self) -> None:
        """Give the weights back."""
        if not self._transport.end.alive:
            return
        path = f"/api/v1/samplers/{self._sampler}"
        self._transport.call("DELETE", path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()


def _tokens(
    arrived: "queue.SimpleQueue[SampledToken | None]", future: "Future[None]"
) -> Iterator[SampledToken]:
    try:
        while (token := arrived.get()) is not None:
            yield token
        future.result()  # raises what ended it early
    finally:
        future.cancel()


def _said(params: SamplingParams) -> dict[str, Any]:
    given = {
        "max_tokens": params.max_tokens, "seed": params.seed, "temperature": params.temperature,
        "top_k": params.top_k, "top_p": params.top_p, "min_p": params.min_p,
        "stop": None if params.stop is None else list(params.stop),
    }  # fmt: skip
    return {name: value for name, value in given.items() if value is not None}

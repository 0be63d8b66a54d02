"""The client that samples."""

import asyncio
import queue
import uuid
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np

from plait.client.base import Client
from plait.client.futures import APIFuture
from plait.errors import ModelError
from plait.primitives.documents import prompt_of, vocabulary_of
from plait.primitives.sampling import sample_response, settings_of
from plait.ranges import check_number
from plait.stream import Document
from plait.trainer.build import Built
from plait.trainer.engine import commands
from plait.trainer.engine.controller import Engine
from plait.trainer.sampling.settings import SamplerSettings
from plait.types import (
    ModelInput,
    SampledToken,
    SampleResponse,
    SamplingParams,
)


class SamplingClient(Client):
    """Samples from fixed weights, beside whatever trains or samples on the same engine.

    Args:
        view: The engine's name for these weights, which go when the client is closed or dropped.
    """

    def __init__(self, engine: Engine, built: Built, view: str) -> None:
        super().__init__(engine, built)
        self._view = view
        self._release = weakref.finalize(self, engine.discard, commands.DropView(view))
        self._release.atexit = False
        self._seeds = np.random.default_rng()

    def sample(
        self,
        prompt: ModelInput,
        num_samples: int,
        sampling_params: SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
    ) -> APIFuture[SampleResponse]:
        """Continue a prompt `num_samples` times.

        Logprobs are those of the raw distribution: temperature 1, nothing excluded.

        Args:
            include_prompt_logprobs: Also those of the prompt's own tokens.
            topk_prompt_logprobs: Also so many likeliest tokens in each of their places.

        Raises:
            ConfigError: no sample is asked for, or a stop token is none of this model's.
            ModelError: the client is closed.
        """
        check_number("num_samples", num_samples, "[1, inf)", whole=True)
        most = f"[0, {vocabulary_of(self._built) + 1})"
        check_number("topk_prompt_logprobs", topk_prompt_logprobs, most, whole=True)
        command = commands.Sample(
            self._view,
            self._prompt(prompt),
            self._settings(sampling_params),
            num_samples,
            include_prompt_logprobs or topk_prompt_logprobs > 0,
            topk_prompt_logprobs,
        )
        return self._submit(command)

    async def sample_async(self, *args: Any, **options: Any) -> SampleResponse:
        """`sample`, and its result, as the Tinker API has it."""
        future: APIFuture[SampleResponse] = await asyncio.to_thread(self.sample, *args, **options)
        return await future

    def compute_logprobs(self, prompt: ModelInput) -> APIFuture[list[float | None]]:
        """The logprob of each of a prompt's tokens, given those before it.

        None stands for the first, which nothing precedes, and for media.
        """
        command = commands.Sample(
            self._view, self._prompt(prompt), SamplerSettings(), samples=0, prompt_logprobs=True
        )
        return APIFuture(self._queued(command), lambda sampled: sampled.scores.logprobs)

    async def compute_logprobs_async(self, prompt: ModelInput) -> list[float | None]:
        """`compute_logprobs`, and its result, as the Tinker API has it."""
        return await (await asyncio.to_thread(self.compute_logprobs, prompt))

    def stream(
        self, prompt: ModelInput, num_samples: int, sampling_params: SamplingParams
    ) -> "TokenStream":
        """The tokens of `sample` as they come, those of several sequences by turns.

        An iterator that is closed or dropped before its end cancels the rest.
        """
        arrived: queue.SimpleQueue[SampledToken | None] = queue.SimpleQueue()
        check_number("num_samples", num_samples, "[1, inf)", whole=True)
        command = commands.Sample(
            self._view,
            self._prompt(prompt),
            self._settings(sampling_params),
            num_samples,
            on_token=lambda *token: arrived.put(SampledToken(*token)),
        )
        future = self._submit(command)
        future._future.add_done_callback(lambda _: arrived.put(None))
        return TokenStream(arrived, future)

    def _submit(self, command: commands.Sample) -> APIFuture[SampleResponse]:
        name = uuid.uuid4().hex
        named = commands.named(command, name)
        # Of the engine, not of this client: a result that is kept must not keep its weights.
        cancel = partial(self._engine.discard, commands.CancelSample(self._view, name))
        told = partial(sample_response, top=command.top_prompt_logprobs > 0)
        return APIFuture(self._queued(named), told, cancel)

    def _queued(self, command: commands.Sample) -> "Future[Any]":
        if not self._release.alive:
            raise ModelError("this client is closed; create a new one")
        return self._engine.submit(command)

    def _prompt(self, prompt: ModelInput) -> Document:
        return prompt_of(prompt, self._built)

    def close(self) -> None:
        """Give the weights back, once what is queued is sampled."""
        if self._release.detach():
            self._engine.finish(commands.DropView(self._view))

    def _settings(self, params: SamplingParams) -> SamplerSettings:
        return settings_of(params, int(self._seeds.integers(2**62)), self._built)


class TokenStream(Iterator[SampledToken]):
    """Tokens as they come; closed or dropped before its end, begun or not, it cancels the rest."""

    def __init__(
        self,
        arrived: "queue.SimpleQueue[SampledToken | None]",
        future: APIFuture[SampleResponse],
    ) -> None:
        self._arrived, self._future = arrived, future
        self._cancel = weakref.finalize(self, future.cancel)
        self._cancel.atexit = False

    def __next__(self) -> SampledToken:
        if not self._cancel.alive:
            raise StopIteration
        token = self._arrived.get()
        if token is None:
            self._cancel.detach()
            self._future.result()  # raises what ended it early
            raise StopIteration
        return token

    def close(self) -> None:
        """Cancel what has not come yet; idempotent."""
        self._cancel()

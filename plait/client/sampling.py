"""The client that samples."""

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from plait.client.base import Client
from plait.client.futures import APIFuture
from plait.errors import ModelError
from plait.ranges import check_number
from plait.trainer.engine import commands
from plait.trainer.engine.controller import Engine
from plait.trainer.sampling.settings import SamplerSettings
from plait.types import ModelInput, SampledSequence, SampleResponse, SamplingParams


class SamplingClient(Client):
    """Samples from fixed weights.

    Args:
        snapshot: Of an engine that somebody else trains with; None has the engine to itself.
    """

    def __init__(self, engine: Engine, snapshot: int | None) -> None:
        super().__init__(engine)
        self._snapshot, self._closed = snapshot, False
        self._release: Callable[[], object] = engine.close
        if snapshot is not None:  # the weights go with the client, the engine stays
            finalizer = weakref.finalize(self, engine.discard, snapshot)
            finalizer.atexit = False
            self._release = finalizer
        self._seeds = np.random.default_rng()

    def sample(
        self, prompt: ModelInput, num_samples: int, sampling_params: SamplingParams
    ) -> APIFuture[SampleResponse]:
        """Continue a prompt `num_samples` times.

        Logprobs are those of the raw distribution: temperature 1, nothing excluded.

        Raises:
            ConfigError: no sample is asked for, or a stop token is none of this model's.
            ModelError: the client, or the one whose weights it samples from, is closed.
        """
        if self._closed:
            raise ModelError("this client is closed; create a new one")
        check_number("num_samples", num_samples, "[1, inf)", whole=True)
        document = self._document(prompt, {})
        settings = self._settings(sampling_params)
        command = commands.Sample(document, settings, num_samples, self._snapshot)
        return APIFuture(self._engine.submit(command), _sample_response)

    def close(self) -> None:
        """Give the weights back: those of a snapshot, or a whole engine of one's own."""
        self._closed = True
        self._release()

    def _settings(self, params: SamplingParams) -> SamplerSettings:
        stop: tuple[int | str, ...] | None = None if params.stop is None else tuple(params.stop)
        for token in stop or ():
            if isinstance(token, int):
                check_number("a stop token", token, f"[0, {self._vocabulary})", whole=True)
        return SamplerSettings(
            max_tokens=params.max_tokens,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            seed=int(self._seeds.integers(2**62)) if params.seed is None else params.seed,
            stop=stop,
        )


def _sample_response(rows: list[Any]) -> SampleResponse:
    return SampleResponse(
        [
            SampledSequence("stop" if row.stopped else "length", row.tokens, row.logprobs)
            for row in rows
        ]
    )

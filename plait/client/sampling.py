"""The client that samples."""

from typing import Any

from plait.client.base import Client
from plait.client.futures import APIFuture
from plait.errors import ConfigError
from plait.trainer.engine import commands
from plait.trainer.engine.controller import Engine
from plait.trainer.sampling.sampler import SamplerSettings
from plait.types import ModelInput, SampledSequence, SampleResponse, SamplingParams


class SamplingClient(Client):
    """Samples from fixed weights."""

    def __init__(self, engine: Engine, snapshot: int | None) -> None:
        super().__init__(engine)
        self._snapshot = snapshot

    def sample(
        self, prompt: ModelInput, num_samples: int, sampling_params: SamplingParams
    ) -> APIFuture[SampleResponse]:
        """Continue a prompt `num_samples` times.

        Logprobs are those of the raw distribution: temperature 1, nothing excluded.
        """
        if num_samples < 1:
            raise ConfigError(f"num_samples must be at least 1; it is {num_samples}")
        stop = None if sampling_params.stop is None else tuple(sampling_params.stop)
        settings = SamplerSettings(
            max_tokens=sampling_params.max_tokens,
            temperature=sampling_params.temperature,
            seed=sampling_params.seed,
            stop=stop,
        )
        document = self._document(prompt, {})
        command = commands.Sample(document, settings, num_samples, self._snapshot)
        return APIFuture(self._engine.submit(command), _sample_response)


def _sample_response(rows: list[Any]) -> SampleResponse:
    return SampleResponse(
        [
            SampledSequence("stop" if row.stopped else "length", row.tokens, row.logprobs)
            for row in rows
        ]
    )

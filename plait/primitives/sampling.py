"""How to sample, from a user's words to the sampler's, and what it answers."""

from plait.errors import ConfigError
from plait.primitives.documents import vocabulary_of
from plait.ranges import check_number
from plait.trainer.build import Built
from plait.trainer.engine import commands
from plait.trainer.sampling.settings import SamplerSettings
from plait.types import SampledSequence, SampleResponse, SamplingParams


def settings_of(params: SamplingParams, seed: int, built: Built) -> SamplerSettings:
    """
    Args:
        seed: Where the parameters have none.

    Raises:
        ConfigError: a stop token is none of this model's.
    """
    if not isinstance(params, SamplingParams):
        raise ConfigError(f"how to sample is told by SamplingParams; it was given {params!r}")
    stop: tuple[int | str, ...] | None = None if params.stop is None else tuple(params.stop)
    for token in stop or ():
        if isinstance(token, int):
            check_number("a stop token", token, f"[0, {vocabulary_of(built)})", whole=True)
    return SamplerSettings(
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        seed=seed if params.seed is None else params.seed,
        stop=stop,
    )


def sample_response(sampled: commands.Sampled, top: bool = False) -> SampleResponse:
    """
    Args:
        top: The likeliest tokens of the prompt's places were asked for.
    """
    scores = sampled.scores
    return SampleResponse(
        [
            SampledSequence("stop" if row.stopped else "length", row.tokens, row.logprobs)
            for row in sampled.samples
        ],
        None if scores is None else scores.logprobs,
        None if scores is None or not top else scores.top,
    )

"""Learning rates over a run."""

import math

from plait.trainer.config import TrainConfig
from plait.trainer.optimiser import StepSettings


def settings_at(step: int, config: TrainConfig) -> StepSettings:
    """The settings of optimiser step `step`, from 0: a linear rise, then a cosine fall."""
    factor = _factor(step, config)
    return StepSettings(
        learning_rate=config.learning_rate * factor,
        part_learning_rates={
            part: rate * factor for part, rate in config.part_learning_rates.items()
        },
        weight_decay=config.weight_decay,
        grad_clip_norm=config.grad_clip_norm,
        eps=1e-8,
    )


def _factor(step: int, config: TrainConfig) -> float:
    if step < config.warmup:
        return (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return config.final_share + (1 - config.final_share) * cosine

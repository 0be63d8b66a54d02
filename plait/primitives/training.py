"""What a forward_backward answers."""

from plait.trainer.engine import commands
from plait.trainer.engine.controller import facts_of
from plait.types import ForwardBackwardOutput, TensorData


def forward_backward_output(results: list[commands.DocumentResult]) -> ForwardBackwardOutput:
    """Outputs per datum, in the order of submission."""
    return ForwardBackwardOutput(
        loss_fn_outputs=[{"logprobs": TensorData(result.logprobs)} for result in results],
        metrics=dict(facts_of(results)),
    )

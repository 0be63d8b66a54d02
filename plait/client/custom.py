"""A loss of one's own over all data of a call, computed where the client is."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

from plait.client.futures import APIFuture
from plait.primitives.custom import LossOfLogprobs, unweighted, weighted_data
from plait.primitives.inputs import check_data
from plait.types import Datum, ForwardBackwardOutput


class CustomLosses(ABC):
    """For clients that compute cross entropies, in this process or elsewhere."""

    @abstractmethod
    def forward(self, data: Sequence[Datum]) -> APIFuture[ForwardBackwardOutput]:
        """The logprobs of every target."""

    @abstractmethod
    def forward_backward(self, data: Sequence[Datum]) -> APIFuture[ForwardBackwardOutput]:
        """Add the gradient of the summed cross entropy."""

    def forward_backward_custom(
        self, data: Sequence[Datum], loss_fn: LossOfLogprobs
    ) -> APIFuture[ForwardBackwardOutput]:
        """Add the gradient of a function of all data's logprobs, which may compare them.

        It waits for a forward pass, calls `loss_fn(data, logprobs)` here with tensors that have
        gradients, and queues a cross entropy whose weights are the loss's negative derivatives.
        What is submitted meanwhile from another thread may come between the two.

        Args:
            loss_fn: Returns the loss, a scalar tensor, and metrics by name.

        Raises:
            ConfigError: it returns something else, or a derivative is not finite.
        """
        data = check_data(data)
        output = self.forward(unweighted(data)).result()
        logprobs = [row["logprobs"].to_torch() for row in output.loss_fn_outputs]
        weighted, metrics = weighted_data(data, logprobs, loss_fn)
        return self.forward_backward(weighted).then(
            lambda made: replace(made, metrics={**made.metrics, **metrics})
        )

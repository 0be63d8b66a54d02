"""Token logprobs as their definition says, in float64 on the whole logits matrix."""

from torch import Tensor


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None
) -> Tensor:
    """hidden (T, H), weight (V, H), targets (T,) -> logprobs (T,), float64."""
    logits = hidden.double() @ weight.double().T
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]

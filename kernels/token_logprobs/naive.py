"""Token logprobs as their definition says, in float64 on the whole logits matrix."""

from torch import Tensor


def logits(
    hidden: Tensor,
    weight: Tensor,
    softcap: float | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """hidden (T, H), weight (V, H) -> (T, V) float64: capped first, then divided by temperature."""
    raw = hidden.double() @ weight.double().T
    if bias is not None:
        raw = raw + bias.double()
    if softcap is not None:
        raw = softcap * (raw / softcap).tanh()
    return raw / temperature


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """hidden (T, H), weight (V, H), targets (T,) or (T, K) -> logprobs of that shape, float64."""
    ids = targets[:, None] if targets.ndim == 1 else targets
    logprobs = logits(hidden, weight, softcap, bias, temperature).log_softmax(-1)
    return logprobs.gather(-1, ids).reshape(targets.shape)


def entropy(
    hidden: Tensor,
    weight: Tensor,
    softcap: float | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """(T,) float64, in nats."""
    logprobs = logits(hidden, weight, softcap, bias, temperature).log_softmax(-1)
    return -(logprobs.exp() * logprobs.clamp(min=-1e300)).sum(-1)  # 0 log 0 is 0, not NaN


def top_logprobs(
    hidden: Tensor,
    weight: Tensor,
    top_k: int,
    softcap: float | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The `top_k` likeliest tokens: logprobs (T, top_k) float64, likeliest first, and their ids."""
    found = logits(hidden, weight, softcap, bias, temperature).log_softmax(-1).topk(top_k)
    return found.values, found.indices


def weighted_nll(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_weights: Tensor,
    softcap: float | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """-sum(loss_weights * logprobs), a float64 scalar."""
    logprobs = token_logprobs(hidden, weight, targets, softcap, bias, temperature)
    return -(loss_weights.double() * logprobs).sum()

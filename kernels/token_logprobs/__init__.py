"""Log-probabilities of target tokens without ever holding the logits of a row."""

from plait.kernels.token_logprobs.cpu import token_logprobs

__all__ = ["token_logprobs"]

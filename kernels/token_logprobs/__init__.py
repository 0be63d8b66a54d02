"""Log-probabilities of target tokens without ever holding the logits of a row."""

from plait.kernels.token_logprobs.scoring import Scored, token_logprobs, weighted_nll

__all__ = ["Scored", "token_logprobs", "weighted_nll"]

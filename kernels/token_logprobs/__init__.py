"""Log-probabilities of target tokens without ever holding the logits of a row."""

from plait.kernels.token_logprobs.logits import output_logits
from plait.kernels.token_logprobs.scoring import Scored, token_logprobs, weighted_nll

__all__ = ["Scored", "output_logits", "token_logprobs", "weighted_nll"]

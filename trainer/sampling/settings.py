"""How tokens are chosen."""

from dataclasses import dataclass

from plait.ranges import SAMPLING, check_number, check_numbers

MOST_TOKENS = 1024
"""Tokens of a sequence whose length nobody bounds, in a model with room for more."""


MOST_RANKS = 2**31


@dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """How the tokens of a sequence are chosen, and when it ends."""

    max_tokens: int | None = 64
    """Tokens generated at most, the stop token included; None is what the model's context has room
    for after the prompt, and never over `MOST_TOKENS`."""

    temperature: float = 1.0
    """0 takes the most probable token; otherwise logits are divided by it before drawing."""

    top_k: int = -1
    """Draw from this many of the most probable tokens; -1 is no limit."""

    top_p: float = 1.0
    """Draw from the fewest tokens that hold this share of what `top_k` left; 1 is no limit."""

    min_p: float = 0.0
    """Draw from tokens at least this many times as probable as the most probable one."""

    seed: int = 0
    """Each sequence draws numbers of its own, made of the seed and of its number among the samples
    of its prompt, so that what is sampled beside it changes nothing."""

    stop: tuple[int | str, ...] | None = None
    """Token ids or texts that end a sequence; None is the tokenizer's end token, () stops at
    nothing. Ids take the end token's place, texts come beside it."""

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            check_number("max_tokens", self.max_tokens, "[1, inf)", whole=True)
        if self.top_k != -1:
            check_number("top_k, where it is not -1,", self.top_k, "[1, inf)", whole=True)
        check_number("seed", self.seed, "[0, inf)", whole=True)
        check_numbers(self, SAMPLING)
        for name in SAMPLING:  # fractions and the like are numbers, too, but none that torch knows
            object.__setattr__(self, name, float(getattr(self, name)))
        # More tokens than any model has are no limit; further numbers torch could not hold.
        object.__setattr__(self, "top_k", int(self.top_k) if self.top_k < MOST_RANKS else -1)

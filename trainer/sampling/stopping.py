"""When a sequence ends."""

from collections.abc import Sequence
from typing import Any


class Stops:
    """The ends that a sequence may come to.

    Args:
        stop: As in `SamplerSettings`.
        ends: Tokens that end a text besides the tokenizer's end token.
    """

    def __init__(
        self, tokenizer: Any, stop: tuple[int | str, ...] | None, ends: Sequence[int] = ()
    ) -> None:
        self.tokenizer = tokenizer
        self.texts = tuple(entry for entry in stop or () if isinstance(entry, str))
        self.tokens = {entry for entry in stop or () if isinstance(entry, int)}
        self._looked_at = 8 + max((len(text.encode()) for text in self.texts), default=0)
        if stop is None or self.texts:
            self.tokens |= {tokenizer.eos_token_id, *ends} - {None}

    def reached(self, tokens: Sequence[int]) -> bool:
        """Whether the last of these generated tokens is the sequence's end.

        As many tokens are decoded as the longest text has bytes, and some: a token may be part of
        a character, a text may begin in any token before, and a decoder may strip the space that
        its first token begins with.
        """
        if tokens[-1] in self.tokens:
            return True
        if not self.texts:
            return False
        text = self.tokenizer.decode(
            tokens[-self._looked_at :],
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        return any(stop in text for stop in self.texts)

"""Word error rate of transcripts."""

import re
import unicodedata
from collections.abc import Sequence

_NOT_SPOKEN = re.compile(r"[^\w']+")


def normalised(text: str) -> str:
    """Lower case, words with a space between: punctuation is not spoken."""
    return " ".join(_NOT_SPOKEN.sub(" ", unicodedata.normalize("NFKC", text).lower()).split())


def word_error_rate(references: Sequence[str], answers: Sequence[str]) -> float:
    """Words to substitute, delete and insert, by the words of all references (jiwer).

    Answers longer than their references can make it more than 1.
    """
    import jiwer

    told = [normalised(text) for text in references]
    return float(jiwer.wer(told, [normalised(text) for text in answers]))

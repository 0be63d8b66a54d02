"""Speech: the prompts of the Asterisk telephone exchange, one speaker, and what each says.

The text file says `key: text` a line; `digits/1` is `digits/1.g722` below the speaker's folder.
"""

import gzip
import re
from collections.abc import Iterator
from pathlib import Path

from plait.datasets.fetch.prepare.base import Folders, Prepared, row
from plait.errors import FetchError

SOUNDS, TEXTS = "asterisk-core-sounds-en-g722", "asterisk-core-sounds-en"

MAX_SECONDS = 30.0
"""What a Whisper encoder hears at once."""

_BYTES_A_SECOND = 8000  # G.722 has no header: 64 kbit/s
_ASIDE = re.compile(r"\[[^\]]*\]|\([^)]*\)|<[^>]*>")  # what is heard or meant, not said


def asterisk(folders: Folders) -> Prepared:
    """A row a prompt: user `<audio>`, assistant what is said; the id is the prompt's key."""
    sounds = folders[SOUNDS]
    made = Prepared(links={"prompts": sounds})
    for key, text in _texts(folders[TEXTS]):
        file = sounds / f"{key}.g722"
        said = spoken(text)
        if not file.is_file():
            made.skipped["a text without a recording"] += 1
        elif not said or key.startswith("silence/"):
            made.skipped["no speech"] += 1
        elif file.stat().st_size > MAX_SECONDS * _BYTES_A_SECOND:
            made.skipped[f"longer than {MAX_SECONDS:.0f} s"] += 1
        else:
            made.rows.append(row(key, "<audio>", said, audios=[f"prompts/{key}.g722"]))
    return made


def spoken(text: str) -> str:
    """A text without asides in brackets, dots where a sentence goes on elsewhere, and quotes."""
    words = _ASIDE.sub(" ", text).replace('"', "").replace("...", " ")
    return " ".join(words.split())


def _texts(folder: Path) -> Iterator[tuple[str, str]]:
    """(key, text) in the order of the file."""
    file = folder / "core-sounds-en.txt.gz"
    try:
        lines = gzip.decompress(file.read_bytes()).decode("utf-8").splitlines()
    except (OSError, EOFError, ValueError) as error:
        raise FetchError(
            f"{file} must be the texts of the recordings; it cannot be read: {error}"
        ) from error
    for line in lines:
        key, colon, text = line.partition(":")
        if colon and not key.startswith(";"):
            yield key.strip(), text.strip()

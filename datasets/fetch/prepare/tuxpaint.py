"""The Tux Paint stamps as rows: sounds with names, pictures with their sounds, translations.

A stamp is a text file `X.txt`, its first line English, then `fr.utf8=…` a line; beside it may lie
a picture `X.png`, a sound effect `X.ogg` or `X.wav`, and spoken descriptions that are not used.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from plait.datasets.fetch.prepare.base import Folders, Prepared, row
from plait.datasets.records import CaptionOptions
from plait.errors import DataError, FetchError, MediaError
from plait.modalities import Audio, Limits

PACKAGE = "tuxpaint-stamps-default"

LANGUAGES = {"fr": "French", "de": "German", "es": "Spanish"}

MAX_WORDS = 8
"""A longer text beside a sound explains something else than what is heard."""

CAPTIONS = CaptionOptions(strip_final_stop=True, lower_first=True)

_TRANSLATION = re.compile(r"([\w@]+)\.utf8=(.*)")


@dataclass(frozen=True, slots=True)
class Stamp:
    """One stamp. `key` is its path below the stamps' folder without an ending.

    `picture` and `sound` are the endings of its files; empty where it has none.
    """

    key: str
    text: str
    translations: dict[str, str]
    picture: str
    sound: str

    @property
    def label(self) -> str:
        """The class: its first folder."""
        return self.key.partition("/")[0]

    @property
    def answer(self) -> str:
        """Class and name, as the stamps recipe learns them: "animals: a frog"."""
        return f"{self.label}: {self.text}"


def stamps(folder: Path) -> Iterator[Stamp]:
    """The stamps that have a text, by path."""
    for file in sorted(folder.rglob("*.txt")):
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
            text = CAPTIONS.caption(lines[0] if lines else "", "")
        except (UnicodeDecodeError, DataError):
            continue
        except OSError as error:
            raise FetchError(f"{file} cannot be read: {error}; fetch it again") from error
        found = (match.groups() for match in map(_TRANSLATION.match, lines[1:]) if match)
        yield Stamp(
            key=file.relative_to(folder).with_suffix("").as_posix(),
            text=text,
            translations={language: said.strip() for language, said in found},
            picture=_beside(file, ".png"),
            sound=_beside(file, ".ogg", ".wav"),
        )


def effects(folder: Path, link: str, made: Prepared) -> None:
    """Add a row for each distinct sound effect: user `<audio>`, assistant class and name."""
    heard: set[bytes] = set()
    for stamp in stamps(folder):
        if not stamp.sound:
            continue
        file = folder / (stamp.key + stamp.sound)
        content = sha256(file.read_bytes()).digest()
        if content in heard:
            made.skipped["the same sound as another stamp's"] += 1
        elif len(stamp.text.split()) > MAX_WORDS:
            made.skipped[f"a text of more than {MAX_WORDS} words"] += 1
        elif silent(file):
            made.skipped["a silent sound"] += 1
        else:
            heard.add(content)
            sound = f"{link}/{stamp.key}{stamp.sound}"
            made.rows.append(
                row(stamp.key, "<audio>", stamp.answer, label=stamp.label, audios=[sound])
            )


def together(folders: Folders) -> Prepared:
    """A row a stamp with picture and sound: both are shown in one prompt of words."""
    folder = folders[PACKAGE]
    made = Prepared(links={"stamps": folder})
    for stamp in stamps(folder):
        if not (stamp.picture and stamp.sound):
            made.skipped["a stamp without picture or without sound"] += 1
        elif silent(folder / (stamp.key + stamp.sound)):
            made.skipped["a silent sound"] += 1
        else:
            made.rows.append(
                row(
                    stamp.key,
                    "The picture <image> and its sound <audio>\n",
                    stamp.answer,
                    label=stamp.label,
                    images=[f"stamps/{stamp.key}{stamp.picture}"],
                    audios=[f"stamps/{stamp.key}{stamp.sound}"],
                )
            )
    return made


def translations(folders: Folders) -> Prepared:
    """Rows of text alone: a stamp's English text, to be said in another language."""
    made = Prepared(links={})
    seen: set[tuple[str, str]] = set()
    for stamp in stamps(folders[PACKAGE]):
        for code, language in LANGUAGES.items():
            said = stamp.translations.get(code, "")
            if not said or said.rstrip(".").casefold() == stamp.text.casefold():
                made.skipped["not translated"] += 1
            elif (code, stamp.text) in seen:
                made.skipped["a text that another stamp has too"] += 1
            else:
                seen.add((code, stamp.text))
                asked, answer = f"In {language}: {stamp.text}\n", CAPTIONS.caption(said, "")
                made.rows.append(row(f"{code}/{stamp.key}", asked, answer, label=language))
    return made


def silent(file: Path) -> bool:
    """Whether every sample of a sound file is zero; some effects are placeholders."""
    try:
        return not Audio(file).load(Limits()).samples.any()
    except MediaError as error:
        raise FetchError(f"{file} must be a sound: {error.message}") from error


def _beside(file: Path, *endings: str) -> str:
    return next((ending for ending in endings if file.with_suffix(ending).is_file()), "")

"""Named sounds: the Tux Paint effects, and the samples that come with Sonic Pi.

A Sonic Pi sample says its class and name in its file's name: `drum_tom_hi_hard.flac`.
"""

from collections import Counter
from pathlib import Path

from plait.datasets.fetch.prepare import tuxpaint
from plait.datasets.fetch.prepare.base import Folders, Prepared, row

SAMPLES = "sonic-pi-samples"

CLASSES = {
    "ambi": "ambient",
    "bd": "bass drum",
    "elec": "electric",
    "guit": "guitar",
    "perc": "percussion",
    "sn": "snare",
}
"""What the short forms at the front of names stand for; the others are words."""

_WORDS = {"hi": "high", "lo": "low", "filt": "filtered", "perc": "percussion"}


def sounds(folders: Folders) -> Prepared:
    """A row a sound: user `<audio>`, assistant "class: name", the label its class."""
    effects, samples = folders[tuxpaint.PACKAGE], folders[SAMPLES]
    made = Prepared(links={"effects": effects, "samples": samples})
    tuxpaint.effects(effects, "effects", made)
    for file, (label, name) in named(sorted(samples.glob("*.flac"))).items():
        made.rows.append(
            row(file.stem, "<audio>", f"{label}: {name}", label=label,
                audios=[f"samples/{file.name}"])
        )  # fmt: skip
    return made


def named(files: list[Path]) -> dict[Path, tuple[str, str]]:
    """The class and the name that each file's name says.

    A final number that only counts takes is left out: `tabla_ke1`, `tabla_ke2` are both "ke".
    """
    takes = Counter(file.stem.rstrip("0123456789") for file in files)
    found = {}
    for file in files:
        stem = file.stem.rstrip("0123456789")
        prefix, _, rest = (stem if takes[stem] > 1 else file.stem).partition("_")
        words = " ".join(_WORDS.get(word, word) for word in rest.split("_"))
        found[file] = (CLASSES.get(prefix, prefix), words)
    return found

"""From fetched packages to rows: on small packages made here, and on the real ones."""

import gzip
import json
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import yaml

from plait.datasets.fetch import Progress, dataset_folder, everything, fetch, packages
from plait.datasets.fetch.apt import apt_folder
from plait.datasets.fetch.prepare import PREPARERS, Prepared
from plait.datasets.fetch.prepare.asterisk import MAX_SECONDS, spoken
from plait.datasets.fetch.prepare.sounds import named
from plait.datasets.fetch.sources import load_source, source_names
from plait.datasets.records import open_records
from plait.datasets.splits import KEYS, SplitOptions, split
from plait.encoders.weights.packages import WEIGHTS_PACKAGES
from plait.errors import FetchError
from plait.modalities import Audio, AudioHeader, Image, Limits, Video, VideoHeader
from plait.modalities.audio import Sound
from plait.modalities.part import MediaPart

STAMPS = "tuxpaint-stamps-default"


class Heard(Progress):
    """Keeps what was said."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


def no_weights(name: str, _: Progress) -> Path:
    return Path(name)


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        held = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(held)
    return folder


def sound(file: Path, samples: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(file), "wb") as wav:
        wav.setnchannels(1)
        wav.setsampwidth(2)
        wav.setframerate(8000)
        wav.writeframes(samples.astype("<i2").tobytes())


def tone(pitch: float) -> np.ndarray:
    return 9000 * np.sin(np.arange(800) * pitch)


def turns(row: dict[str, Any]) -> tuple[str, str]:
    user, assistant = row["messages"]
    assert (user["role"], assistant["role"]) == ("user", "assistant")
    return user["content"], assistant["content"]


def test_prompts_become_rows_and_what_is_no_speech_is_counted(tmp_path: Path) -> None:
    texts = (
        "; Core Asterisk Sounds in English\n\n"
        "activated: Activated.\n"
        "at-tone: At the tone,  the time will be:  exactly...\n"
        "letters/at: at [@]\n"
        "beep: [this is a simple beep tone]\n"
        "silence/1: (1 second of silence)\n"
        "long: Too long.\n"
        "edge: Just so long.\n"
        "missing: Never recorded.\n"
    )
    second = bytes(8000)
    keys = ("activated", "at-tone", "letters/at", "beep", "silence/1")
    write(tmp_path / "sounds", {f"{key}.g722": second for key in keys})
    write(tmp_path / "sounds", {"long.g722": second * 30 + b"\0", "edge.g722": second * 30})
    write(tmp_path / "texts", {"core-sounds-en.txt.gz": gzip.compress(texts.encode())})
    folders = {
        "asterisk-core-sounds-en-g722": tmp_path / "sounds",
        "asterisk-core-sounds-en": tmp_path / "texts",
    }
    made = PREPARERS["asterisk"](folders)
    assert [(row["id"], turns(row), row["audios"]) for row in made.rows] == [
        ("activated", ("<audio>", "Activated."), ["prompts/activated.g722"]),
        (
            "at-tone",
            ("<audio>", "At the tone, the time will be: exactly"),
            ["prompts/at-tone.g722"],
        ),
        ("letters/at", ("<audio>", "at"), ["prompts/letters/at.g722"]),
        ("edge", ("<audio>", "Just so long."), ["prompts/edge.g722"]),
    ]
    assert made.skipped == {
        "no speech": 2,
        "longer than 30 s": 1,
        "a text without a recording": 1,
    }
    (tmp_path / "texts" / "core-sounds-en.txt.gz").write_bytes(b"no gzip")
    with pytest.raises(FetchError, match=r"core-sounds-en\.txt\.gz must be the texts"):
        PREPARERS["asterisk"](folders)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('IAX (note: does not say "2")', "IAX"),
        ('a polite "don\'t call" menu', "a polite don't call menu"),
        ("... for ...", "for"),
        ("<beep ascending>", ""),
    ],
)
def test_only_what_is_said_stays_of_a_text(text: str, said: str) -> None:
    assert spoken(text) == said


@pytest.fixture
def stamps(tmp_path: Path) -> Path:
    """Stamps with and without pictures and sounds."""
    folder = tmp_path / "stamps"
    texts = {
        "animals/frog.txt": "A frog.\nfr.utf8=Une grenouille.\nde.utf8=Ein Frosch.\n",
        "animals/toad.txt": "A toad.\nfr.utf8=\n",
        "animals/giraffe.txt": "A giraffe.\nfr.utf8=Une girafe.\n",
        "symbols/happy.txt": "Happy!\nes.utf8=Happy!\n",
        "town/sign.txt": "One two three four five six seven eight nine.\n",
        "town/again/frog.txt": "A frog.\nfr.utf8=Une autre grenouille.\n",
        "town/empty.txt": "",
        "town/latin.txt": b"caf\xe9",
    }
    write(folder, texts)
    for name in ("animals/frog", "animals/giraffe", "symbols/happy", "town/sign"):
        write(folder, {f"{name}.png": b"picture"})
    sound(folder / "animals/frog.wav", tone(0.1))
    sound(folder / "animals/toad.wav", tone(0.1))
    sound(folder / "animals/giraffe.wav", np.zeros(800))
    sound(folder / "symbols/happy.wav", tone(0.2))
    sound(folder / "town/sign.wav", tone(0.3))
    sound(folder / "animals/frog_desc_fr.wav", tone(0.4))
    return folder


def test_sounds_become_rows_with_their_class_and_name(tmp_path: Path, stamps: Path) -> None:
    samples = write(
        tmp_path / "samples",
        {f"{n}.flac": b"x" for n in ("drum_tom_hi_hard", "tabla_ke1", "tabla_ke2", "bd_808")},
    )
    made = PREPARERS["sounds"]({STAMPS: stamps, "sonic-pi-samples": samples})
    assert [(row["id"], turns(row)[1], row["label"], *row["audios"]) for row in made.rows] == [
        ("animals/frog", "animals: a frog", "animals", "effects/animals/frog.wav"),
        ("symbols/happy", "symbols: happy!", "symbols", "effects/symbols/happy.wav"),
        ("bd_808", "bass drum: 808", "bass drum", "samples/bd_808.flac"),
        ("drum_tom_hi_hard", "drum: tom high hard", "drum", "samples/drum_tom_hi_hard.flac"),
        ("tabla_ke1", "tabla: ke", "tabla", "samples/tabla_ke1.flac"),
        ("tabla_ke2", "tabla: ke", "tabla", "samples/tabla_ke2.flac"),
    ]
    assert made.skipped == {
        "the same sound as another stamp's": 1,
        "a silent sound": 1,
        "a text of more than 8 words": 1,
    }


def test_a_sound_that_is_none_is_an_error_that_names_it(stamps: Path) -> None:
    (stamps / "animals" / "frog.wav").write_bytes(b"RIFF, but no more")
    with pytest.raises(FetchError, match=r"frog\.wav must be a sound"):
        PREPARERS["together"]({STAMPS: stamps})


def test_names_of_samples_are_words_and_takes_lose_their_numbers() -> None:
    names = ["elec_blip", "elec_blip2", "guit_em9", "loop_drone_g_97", "sn_dub", "ambi_filt_x"]
    files = [Path(f"{name}.flac") for name in names]
    assert list(named(files).values()) == [
        ("electric", "blip"),
        ("electric", "blip"),
        ("guitar", "em9"),
        ("loop", "drone g 97"),
        ("snare", "dub"),
        ("ambient", "filtered x"),
    ]


def test_a_picture_and_its_sound_stand_in_one_prompt(stamps: Path) -> None:
    made = PREPARERS["together"]({STAMPS: stamps})
    assert [(row["id"], *row["images"], *row["audios"]) for row in made.rows] == [
        ("animals/frog", "stamps/animals/frog.png", "stamps/animals/frog.wav"),
        ("symbols/happy", "stamps/symbols/happy.png", "stamps/symbols/happy.wav"),
        ("town/sign", "stamps/town/sign.png", "stamps/town/sign.wav"),
    ]
    asked = "The picture <image> and its sound <audio>\n"
    assert turns(made.rows[0]) == (asked, "animals: a frog")
    assert made.skipped == {"a stamp without picture or without sound": 2, "a silent sound": 1}


def test_translations_are_rows_of_text_alone(stamps: Path) -> None:
    made = PREPARERS["translations"]({STAMPS: stamps})
    assert [(row["id"], *turns(row), row["label"]) for row in made.rows] == [
        ("fr/animals/frog", "In French: a frog\n", "une grenouille", "French"),
        ("de/animals/frog", "In German: a frog\n", "ein Frosch", "German"),
        ("fr/animals/giraffe", "In French: a giraffe\n", "une girafe", "French"),
    ]
    assert made.skipped["a text that another stamp has too"] == 1
    assert made.skipped["not translated"] == 14, "18 of six stamps, less 4"


def film(file: Path, frames: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pictures = [PIL.Image.new("RGB", (8, 8), (60 * n, 0, 0)) for n in range(frames)]
    pictures[0].save(file, save_all=frames > 1, append_images=pictures[1:], lossless=True)


def test_animations_get_the_names_of_their_emoji_without_skin_tones(tmp_path: Path) -> None:
    files = {"1f44b": 3, "1f44b-1f3fb": 2, "0023-fe0f-20e3": 2, "1f600": 1, "1f4a9": 2}
    for stem, frames in files.items():
        film(tmp_path / "assets" / f"{stem}.webp", frames)
    write(tmp_path / "assets", {"empty.webp": b"", "noise.webp": b"RIFF1234WEBPVP8X"})
    for stem in ("empty", "noise"):  # names are code points
        (tmp_path / "assets" / f"{stem}.webp").rename(
            tmp_path / "assets" / f"{ord(stem[0]):x}.webp"
        )
    names = {
        "\U0001f44b": {"name": "waving hand", "group": "People & Body"},
        "#\ufe0f\u20e3": {"name": "keycap #", "group": "Symbols"},
        "\U0001f600": {"name": "grinning face", "group": "Smileys & Emotion"},
    }
    write(tmp_path / "names", {"data-by-emoji.json": json.dumps(names)})
    folders = {
        "@lobehub/fluent-emoji-anim-1": tmp_path / "assets",
        "unicode-emoji-json": tmp_path / "names",
    }
    made = PREPARERS["films"](folders)
    assert [(row["id"], turns(row), row["label"], *row["videos"]) for row in made.rows] == [
        ("0023-fe0f-20e3", ("<video>", "keycap #"), "Symbols", "films/0023-fe0f-20e3.webp"),
        ("1f44b-1f3fb", ("<video>", "waving hand"), "People & Body", "films/1f44b-1f3fb.webp"),
        ("1f44b", ("<video>", "waving hand"), "People & Body", "films/1f44b.webp"),
    ]
    assert made.skipped == {"not animated": 3, "without a name": 1}
    (tmp_path / "names" / "data-by-emoji.json").write_text("[]")
    with pytest.raises(FetchError, match="must hold the names of emoji"):
        PREPARERS["films"](folders)


@pytest.fixture
def own_source(
    stamps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], str]:
    """Makes a source file that names the stamps under a kind of rows."""

    def fake_apt(name: str, *, progress: Progress, **_: object) -> None:
        progress.say(f"bringing {name}")
        if not apt_folder(name).exists():
            apt_folder(name).parent.mkdir(parents=True, exist_ok=True)
            stamps.rename(apt_folder(name))
            (apt_folder(name) / "fetched.json").write_text('{"sha256": "1"}')

    monkeypatch.setattr(packages, "apt_package", fake_apt)

    def make(rows: str, name: str = "mine", include: tuple[str, ...] = ()) -> str:
        data = {"package": "apt", "name": STAMPS, "license": "GPL-2"}
        file = tmp_path / f"{name}.yaml"
        values = {"data": data, "rows": rows, "include": list(include), "weights": ["w", name]}
        file.write_text(yaml.safe_dump(values))
        return str(file)

    return make


def test_a_source_is_made_into_rows_once_and_says_what_it_skipped(
    own_source: Callable[[str], str], private_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, heard = own_source("together"), Heard()
    folder = fetch(name, heard, no_weights).data
    assert folder == private_home / "data" / "mine" == dataset_folder(name)
    assert heard.lines == [
        f"bringing {STAMPS}",
        f"mine: 3 rows in {folder} (GPL-2)",
        "mine: 2 skipped: a stamp without picture or without sound",
        "mine: 1 skipped: a silent sound",
    ]
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert all((folder / file).is_file() for row in rows for file in row["images"] + row["audios"])
    moved = private_home.rename(private_home.with_name("moved"))
    there = moved / "data" / "mine" / rows[0]["audios"][0]
    assert there.is_file(), "a home that is copied elsewhere still holds its media"
    moved.rename(private_home)
    monkeypatch.setitem(PREPARERS, "together", lambda _: pytest.fail("made twice"))
    again = Heard()
    assert fetch(name, again, no_weights).data == folder
    assert again.lines == heard.lines


@pytest.mark.parametrize("change", ["package", "revision"])
def test_rows_of_other_packages_or_of_an_older_maker_are_made_anew(
    own_source: Callable[[str], str], change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = own_source("together")
    folder = fetch(name, Progress(), no_weights).data
    assert folder is not None
    (folder / "rows.jsonl").write_text("old")
    if change == "package":
        (apt_folder(STAMPS) / "fetched.json").write_text('{"sha256": "2"}')
    else:
        monkeypatch.setattr(everything, "REVISION", everything.REVISION + 1)
    with pytest.raises(FetchError, match="are not made yet: run `plait fetch"):
        dataset_folder(name)
    fetch(name, Progress(), no_weights)
    assert (dataset_folder(name) / "rows.jsonl").read_text() != "old"


def test_rows_that_fail_half_way_leave_nothing(
    own_source: Callable[[str], str], private_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = own_source("together")
    bad = Prepared(links={}, rows=[{"id": "a"}, {"id": object()}])
    monkeypatch.setitem(PREPARERS, "together", lambda _: bad)
    with pytest.raises(TypeError):
        fetch(name, Progress(), no_weights)
    monkeypatch.setitem(PREPARERS, "together", lambda _: Prepared(links={}))
    with pytest.raises(FetchError, match=r"mine must have rows and its packages gave none"):
        fetch(name, Progress(), no_weights)
    assert sorted(p.name for p in (private_home / "data").iterdir() if p.suffix != ".lock") == [
        STAMPS
    ]


def test_a_source_brings_what_it_includes_each_thing_once(
    own_source: Callable[..., str], private_home: Path
) -> None:
    inner = own_source("translations", "inner")
    outer = own_source("together", "outer", (inner,))
    own_source("translations", "inner", (outer,))  # a circle is gone round once
    asked: list[str] = []

    def resolve(name: str, _: Progress) -> Path:
        asked.append(name)
        return Path(name)

    heard = Heard()
    got = fetch(outer, heard, resolve)
    assert heard.lines.count(f"bringing {STAMPS}") == 1
    assert got.data == private_home / "data" / "outer"
    assert (private_home / "data" / "inner" / "rows.jsonl").is_file()
    assert asked == ["w", "inner", "outer"]
    assert sorted(got.weights) == ["inner", "outer", "w"]


def test_every_source_names_weights_that_can_be_had() -> None:
    for name in source_names():
        for weights in load_source(name).weights:
            assert weights.removeprefix("pip:") in WEIGHTS_PACKAGES, f"{weights} of {name}"


def real(name: str) -> tuple[Path, list[dict[str, Any]]]:
    """A real source's folder and rows, fetched if need be, without its weights."""
    try:
        folder = fetch(name, Progress(), no_weights).data
    except FetchError as error:
        if any(why in str(error) for why in ("no apt", "no npm", "cannot download", "cannot upd")):
            pytest.skip(f"the packages of {name} cannot be had here: {error}")
        raise
    assert folder is not None
    return folder, [json.loads(line) for line in (folder / "rows.jsonl").open(encoding="utf-8")]


REAL = {  # the fewest rows, different answers and labels: Debian's packages are not pinned
    "speech": (540, 520, 0),
    "sounds": (275, 240, 25),
    "films": (477, 187, 7),
    "words": (2400, 2300, 3),
    "plaited": (125, 115, 11),
}


@pytest.mark.weights
@pytest.mark.parametrize("name", REAL)
def test_real_sources_have_their_rows_and_every_file(name: str) -> None:
    folder, rows = real(name)
    answers = {turns(row)[1] for row in rows}
    labels = {row["label"] for row in rows if "label" in row}
    found = (len(rows), len(answers), len(labels))
    assert all(has >= fewest for has, fewest in zip(found, REAL[name], strict=True)), found
    assert len({row["id"] for row in rows}) == len(rows)
    media = [
        file for row in rows for key in ("images", "audios", "videos") for file in row.get(key, [])
    ]
    assert all((folder / file).stat().st_size for file in media)
    for row in rows:
        asked, answer = turns(row)
        for key in ("image", "audio", "video"):
            assert asked.count(f"<{key}>") == len(row.get(f"{key}s", []))
        assert answer == answer.strip() != ""


@pytest.mark.weights
@pytest.mark.parametrize("name", ["speech", "sounds", "films", "plaited"])
def test_every_header_of_real_media_is_read_and_some_are_decoded(name: str) -> None:
    folder, rows = real(name)
    kinds: dict[str, Callable[[Path], MediaPart]] = {
        "images": Image,
        "audios": Audio,
        "videos": Video,
    }
    shown = [
        kind(folder / file)
        for row in rows
        for key, kind in kinds.items()
        for file in row.get(key, [])
    ]
    for number, part in enumerate(shown):
        header = part.header(Limits())
        if isinstance(header, AudioHeader):
            assert 0.01 < header.seconds <= MAX_SECONDS
        if isinstance(header, VideoHeader):
            assert 1 < header.seconds < 5, "it moves"
        if number % 25 == 0:
            loaded = part.load(Limits())
            assert not isinstance(loaded, Sound) or len(loaded.samples) == header.samples


@pytest.mark.weights
def test_a_prepared_source_is_opened_as_rows_of_messages() -> None:
    _, rows = real("words")
    records = open_records(dataset_folder("words"))
    assert (records.dialect, len(records)) == ("messages", len(rows))
    assert (records[-1].id, records[-1].label) == (rows[-1]["id"], rows[-1]["label"])
    answers = SplitOptions(by="answer", test=0.1)
    sides = split(records, answers)
    held = {KEYS["answer"](records[row]) for row in sides.test}
    assert held and not held & {KEYS["answer"](records[row]) for row in sides.train}

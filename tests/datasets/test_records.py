"""The folder and CSV dialects, and how a dialect is chosen."""

import os
import pickle
from contextlib import closing
from pathlib import Path

import PIL.Image
import pytest

from plait.datasets.ledger import Ledger, count
from plait.datasets.records import CaptionOptions, LeftOut, open_records
from plait.datasets.splits import SplitOptions, split
from plait.errors import ConfigError, DataError, MediaError, UnknownNameError
from plait.modalities import Image, Text
from plait.stream import Message, Sample


def picture(file: Path, colour: str = "red") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (4, 3), colour).save(file)
    return file


def captioned(folder: Path, captions: dict[str, str]) -> Path:
    """A folder of pictures with text files: relative path without ending -> text."""
    for name, text in captions.items():
        picture(folder / f"{name}.png").with_suffix(".txt").write_text(text, encoding="utf-8")
    return folder


def answer(sample: Sample) -> str:
    part = sample.messages[-1].parts[0]
    assert isinstance(part, Text)
    return part.text


def test_folder_rows_are_sorted_pictures_with_texts(tmp_path: Path) -> None:
    captioned(tmp_path, {"b/z": "Last.", "b/c/y": "Middle", "top": "Ünï\nsecond"})
    records = open_records(tmp_path, name="mine")
    assert (records.dialect, len(records)) == ("folder", 3)
    assert [s.id for s in records] == ["b/c/y.png", "b/z.png", "top.png"]
    assert [s.label for s in records] == ["b", "b", ""]
    first = records[0]
    image = Image(tmp_path / "b/c/y.png")
    assert first.messages == (
        Message("user", (image,)),
        Message("assistant", (Text("Middle"),)),
    )
    assert (first.origin.dataset, first.origin.row) == ("mine", 0)
    assert first.origin.file == str(tmp_path / "b/c/y.png")
    assert answer(records[-1]) == "Ünï\nsecond"
    assert records[1:] == list(records)[1:]
    assert pickle.loads(pickle.dumps(records))[0] == first
    with pytest.raises(IndexError):
        records[3]


def test_a_text_is_its_picture_s_and_else_its_sound_s(tmp_path: Path) -> None:
    captioned(tmp_path, {"a/frog": "A frog"})
    for name in ("frog.ogg", "croak.ogg"):
        (tmp_path / "a" / name).write_bytes(b"not read here")
    (tmp_path / "a/croak.txt").write_text("A croak")
    records = open_records(tmp_path)
    assert [sample.id for sample in records] == ["a/croak.ogg", "a/frog.png"]
    assert [sample.media()[0].medium for sample in records] == ["audio", "image"]
    reason = "its .txt is that of the picture of the same name"
    assert records.left_out == (LeftOut("a/frog.ogg", reason),)


def test_a_text_is_its_drawing_s_even_where_drawings_are_not_read(tmp_path: Path) -> None:
    captioned(tmp_path, {"frog": "A frog"})
    for name, content in {"bell.svg": "<svg/>", "bell.ogg": "sound", "bell.txt": "A bell"}.items():
        (tmp_path / name).write_text(content)
    records = open_records(tmp_path)
    assert [sample.id for sample in records] == ["frog.png"]
    assert records.left_out == (
        LeftOut("bell.ogg", "its .txt is that of the picture of the same name"),
    )


def test_captions_of_some_media_alone(tmp_path: Path) -> None:
    captioned(tmp_path, {"frog": "A frog"})
    (tmp_path / "croak.ogg").write_bytes(b"not read here")
    (tmp_path / "croak.txt").write_text("A croak")
    assert len(open_records(tmp_path)) == 2
    records = open_records(tmp_path, captions=CaptionOptions(media=("image",)))
    assert [sample.id for sample in records] == ["frog.png"]
    assert records.left_out == (LeftOut("croak.ogg", "captions.media does not name audio"),)
    (tmp_path / "rows.csv").write_text("file,text\ncroak.ogg,A croak\nfrog.png,A frog\n")
    rows = open_records(tmp_path / "rows.csv", captions=CaptionOptions(media=("image",)))
    with pytest.raises(DataError, match=r"captions\.media names, image; this is of audio.*row 0"):
        rows[0]
    with pytest.raises(UnknownNameError, match="did you mean 'image'"):
        CaptionOptions(media=("images",))


def test_folder_accounts_for_what_it_leaves_out(tmp_path: Path) -> None:
    captioned(tmp_path, {"a/x": "x"})
    picture(tmp_path / "a/alone.png")
    (tmp_path / "a/drawn.svg").write_text("<svg/>")
    (tmp_path / "a/drawn.txt").write_text("A drawing")
    (tmp_path / "a/x.svg").write_text("<svg/>")  # x.png is read
    (tmp_path / "a/new.jxl").write_bytes(b"")
    (tmp_path / "a/new.txt").write_text("A format of tomorrow")
    (tmp_path / "a/old").write_bytes(b"")
    (tmp_path / "a/old.txt").write_text("No ending")
    (tmp_path / "readme.txt").write_text("no picture of this name")
    picture(tmp_path / ".hidden/x.png")
    records = open_records(tmp_path)
    assert records.left_out == (
        LeftOut("a/alone.png", "no .txt of the same name"),
        LeftOut("a/drawn.svg", ".svg is not read as a medium"),
        LeftOut("a/new.jxl", ".jxl is not read as a medium"),
        LeftOut("a/old", "a file without an ending is not read as a medium"),
    )
    assert len(records) == 1


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    """A link to elsewhere, a second name for a folder inside, and a link that goes in a circle."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    captioned(home, {"b/one": "One"})
    captioned(elsewhere, {"two": "Two", "deep/three": "Three"})
    (home / "c").symlink_to(elsewhere)
    (home / "a").symlink_to(home / "b")
    (home / "b/up").symlink_to(home)
    (home / "gone").symlink_to(tmp_path / "nowhere")
    records = open_records(home)
    assert [s.id for s in records] == ["b/one.png", "c/deep/three.png", "c/two.png"]
    assert [s.label for s in records] == ["b", "c", "c"]
    assert records[1].media()[0].header().format == "PNG"


def test_names_that_are_not_utf8_are_spelt_out(tmp_path: Path) -> None:
    """File systems hold any bytes; ids, messages, splits and the ledger need text."""
    captioned(tmp_path, {os.fsdecode(b"caf\xe9/a\xff"): "One", "b": "Two"})
    picture(tmp_path / os.fsdecode(b"c\xfe.png"))
    records = open_records(tmp_path, captions=CaptionOptions(template="{class}: {text}"))
    spelt = records[1]
    assert (spelt.id, spelt.label) == (r"caf\xe9/a\xff.png", r"caf\xe9")
    assert answer(spelt) == r"caf\xe9: One"
    assert spelt.origin.file == rf"{tmp_path}/caf\xe9/a\xff.png"
    assert spelt.media()[0].header().format == "PNG"
    assert records.left_out == (LeftOut(r"c\xfe.png", "no .txt of the same name"),)
    parts = split(records, SplitOptions(test=1, near_duplicate_bits=None))
    assert sorted(parts.train + parts.test) == [0, 1]
    (tmp_path / os.fsdecode(b"caf\xe9/a\xff.png")).write_bytes(b"broken")
    with closing(Ledger(tmp_path / "ledger")) as ledger:
        with pytest.raises(MediaError) as caught:
            spelt.media()[0].header()
        ledger.record(0, "broken", caught.value.origin, str(caught.value))
        ledger.record(0, "used", records[0].origin, "half a pair: \udcff")
    assert count(ledger.path).counts == {"broken": 1, "used": 1}


def test_a_broken_row_raises_only_when_read(tmp_path: Path) -> None:
    captioned(tmp_path, {"a": "fine", "b": "", "c": " \nsecond", "e": "."})
    picture(tmp_path / "d.png").with_suffix(".txt").write_bytes(b"caf\xe9")
    captions = CaptionOptions(line=1, strip_final_stop=True)
    records = open_records(tmp_path, name="mine", captions=captions)
    assert len(records) == 5
    assert answer(records[0]) == "fine"
    for row, rule, file in (
        (1, "must not be empty", "b.png"),
        (2, "must not be empty", "c.png"),
        (3, "must be UTF-8", "d.txt"),
        (4, "must not be empty", "e.png"),
    ):
        with pytest.raises(DataError, match=rule) as caught:
            records[row]
        origin = caught.value.origin
        assert (origin.dataset, origin.row) == ("mine", row)
        assert origin.file == str(tmp_path / file)


@pytest.mark.parametrize(
    ("options", "text", "label", "caption"),
    [
        ({}, "A frog.", "animals", "A frog."),
        ({"strip_final_stop": True}, "A frog. ", "", "A frog"),
        ({"strip_final_stop": True}, "Well...", "", "Well..."),
        ({"lower_first": True}, "A Frog", "", "a Frog"),
        ({}, " one \r\ntwo\n", "", "one \ntwo"),
        ({"strip_final_stop": True}, "One.\nTwo.\n", "", "One.\nTwo"),
        ({"line": 2}, "one\ntwo\r\n", "", "two"),
        ({"line": 1}, "one\u2028and\x0btwo\nthree", "", "one\u2028and\x0btwo"),
        ({"template": "{class}: {text}"}, "a frog", "animals", "animals: a frog"),
        ({"template": "{class}: {text}"}, "a frog", "", "a frog"),
        ({"template": "Say {{{text}}}"}, "{class}", "c", "Say {{class}}"),
    ],
)
def test_captions(options: dict[str, object], text: str, label: str, caption: str) -> None:
    assert CaptionOptions(**options).caption(text, label) == caption  # type: ignore[arg-type]


def test_lines_that_are_not_used_are_counted(tmp_path: Path) -> None:
    captioned(tmp_path, {"a": "one\r\ntwo", "b": "one\n\n", "c": "one\u2028still one"})
    picture(tmp_path / "d.png").with_suffix(".txt").write_bytes(b"caf\xe9\n\xe9")
    (note,) = open_records(tmp_path, captions=CaptionOptions(line=1)).notes()
    assert note.startswith("1 captions have several lines, of which line 1 alone is learned")
    assert open_records(tmp_path).notes() == []
    table = tmp_path / "t.csv"
    table.write_text('file,text\na.png,"one\ntwo"\nb.png,"one\n"\nshort\n')
    said = open_records(table, captions=CaptionOptions(line=1)).notes()
    assert said == ["t: 3 rows of csv, recognised as dialect captions", note]


def test_a_caption_without_the_line_is_refused() -> None:
    with pytest.raises(DataError, match=r"must have line 2; this text has 1 lines"):
        CaptionOptions(line=2).caption("one\u2028two\n", "")


@pytest.mark.parametrize(
    "options",
    [
        {"line": 0},
        {"template": "no field"},
        {"template": "{class}"},
        {"template": "{text} {name}"},
        {"template": "{text!r}"},
        {"template": "{text:>9}"},
        {"template": "{text"},
        {"prompt": "no picture"},
        {"prompt": "<image><image>"},
    ],
)
def test_caption_options_that_cannot_be_used(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="captions"):
        CaptionOptions(**options)  # type: ignore[arg-type]


def test_prompt_stands_around_the_picture(tmp_path: Path) -> None:
    captioned(tmp_path, {"a": "fine"})
    (sample,) = open_records(tmp_path, captions=CaptionOptions(prompt="See <image> now"))
    image = Image(tmp_path / "a.png")
    assert sample.messages[0].parts == (Text("See "), image, Text(" now"))


def test_csv_folder_file_and_media_dir(tmp_path: Path) -> None:
    table = tmp_path / "any name.csv"
    table.write_bytes(
        b"\xef\xbb\xbfFilename, Caption ,label\n"
        b'animals/a.png,"A frog, green.\nmore",\n\nb.png,B,cars\n'
    )
    captions = CaptionOptions(template="{class}: {text}")
    records = open_records(tmp_path, captions=captions)
    assert (records.dialect, len(records)) == ("captions", 2)
    assert [answer(s) for s in records] == ["A frog, green.\nmore", "cars: B"]
    assert [s.id for s in records] == ["animals/a.png", "b.png"]
    assert records[0].media() == (Image(tmp_path / "animals/a.png"),)
    elsewhere = open_records(table, media_dir=tmp_path / "media")
    assert elsewhere[1].media() == (Image(tmp_path / "media/b.png"),)
    assert [s.label for s in elsewhere] == ["", "cars"]


@pytest.mark.parametrize(("ending", "sign"), [("csv", ";"), ("csv", "\t"), ("tsv", "\t")])
def test_a_spreadsheet_of_any_country_is_read(tmp_path: Path, ending: str, sign: str) -> None:
    lines = [["File name", "Caption", "Class"], ["a.png", f'"one{sign} two, three"', "x"]]
    text = "".join(f"{sign.join(line)}\r\n" for line in lines)
    (tmp_path / f"Pictures.{ending}").write_text(text, encoding="utf-8-sig")
    (row,) = open_records(tmp_path / f"Pictures.{ending}")
    assert row.messages[1].parts == (Text(f"one{sign} two, three"),)
    assert (row.id, row.label) == ("a.png", "x")
    (tmp_path / f"Pictures.{ending}").write_text(text + f"b.png{sign}too{sign}many{sign}cells\n")
    with pytest.raises(DataError, match="contains a " + {";": "semicolon", "\t": "tab"}[sign]):
        open_records(tmp_path / f"Pictures.{ending}")[1]


def test_csv_without_a_class_column_takes_the_first_folder(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image,text\nanimals/x/a.png,one\nb.png,two\n")
    assert [s.label for s in open_records(tmp_path)] == ["animals", ""]


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ("", "a file and its caption; it has no keys"),
        ("file,image,text\n", "one file column"),
        ("file\na.png\n", "one text column"),
        ("file,text,clas\na,b,c\n", "did you mean 'class'"),
        ("file,text\n", "must have rows"),
        ('file,text\n"a"b,c\n', "well formed"),
    ],
)
def test_csv_that_cannot_be_used(tmp_path: Path, content: str, rule: str) -> None:
    file = tmp_path / "t.csv"
    file.write_text(content)
    with pytest.raises(DataError, match=rule) as caught:
        open_records(file, name="mine")
    assert caught.value.origin.dataset == "mine"
    assert caught.value.origin.file == str(file)


def test_csv_rows_that_cannot_be_used(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("file,text\na.png,fine\nb.png\n,no name\nc.png,\nd.png,one,two\n")
    records = open_records(file)
    assert answer(records[0]) == "fine"
    for row, rule in ((1, "2 cells"), (2, "name its file"), (3, "empty"), (4, "quote")):
        with pytest.raises(DataError, match=rule) as caught:
            records[row]
        assert caught.value.origin.row == row
    file.write_bytes(b"file,text\na.png,caf\xe9\n")
    with pytest.raises(DataError, match="UTF-8"):
        open_records(file)


def test_empty_and_missing_datasets_are_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"must have rows.*\.txt of the same name"):
        open_records(tmp_path, name="mine")
    with pytest.raises(DataError, match=r"must exist.*mend the path"):
        open_records(tmp_path / "no")
    picture(tmp_path / "a.png")
    with pytest.raises(DataError, match="1 files there have none"):
        open_records(tmp_path)
    with pytest.raises(DataError, match="needs a folder"):
        open_records(tmp_path / "a.png", dialect="folder")


def test_dialect_is_recognised_forced_and_refused(tmp_path: Path) -> None:
    captioned(tmp_path, {"a": "fine"})
    table = tmp_path / "notes.csv"
    table.write_text("file,text\na.png,from the table\n")
    assert open_records(tmp_path).dialect == "captions"
    assert answer(open_records(tmp_path, dialect="folder")[0]) == "fine"
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"several tables \(notes\.csv, rows\.jsonl\)"):
        open_records(tmp_path)
    assert open_records(table, dialect="captions").dialect == "captions"
    with pytest.raises(DataError, match="must be of the dialect 'messages', which was asked for"):
        open_records(table, dialect="messages")[0]
    with pytest.raises(UnknownNameError, match="did you mean 'folder'"):
        open_records(tmp_path, dialect="foldr")
    with pytest.raises(ConfigError, match=r"ending in \.jsonl, \.ndjson, \.csv"):
        open_records(tmp_path / "a.png")
    with pytest.raises(ConfigError, match="takes no 'media_dir'"):
        open_records(tmp_path, dialect="folder", media_dir=tmp_path)

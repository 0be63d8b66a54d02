"""Shards that are cut off, damaged or hostile: an account of every sample, nothing else."""

import io
import json
import os
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import plait.datasets
from plait.datasets.policy import FailurePolicy
from plait.datasets.records.shards.index import index_of
from plait.errors import DataError, FailureBudgetError
from plait.modalities import Limits, Text
from plait.stream import Sample

WriteTar = Callable[..., Path]
PICTURE = bytes(range(256)) * 4


def said(sample: Sample) -> tuple[str, list[str], list[str]]:
    texts = [str(part) for message in sample.messages for part in message.parts[-1:]]
    return sample.id, [part.digest() for part in sample.media()], texts[1:]


@pytest.mark.parametrize("members", [
    [("../0.png", PICTURE), ("../0.txt", b"a")],
    [("/etc/0.png", PICTURE), ("/etc/0.txt", b"a")],
    [("a/../../0.png", PICTURE), ("a/../../0.txt", b"a")],
])  # fmt: skip
def test_names_that_leave_the_shard_are_refused(
    tmp_path: Path, write_tar: WriteTar, members: list[tuple[str, bytes]]
) -> None:
    shard = write_tar(tmp_path / "a.tar", *members, ("good.txt", b"kept"))
    records = plait.datasets.open(shard)
    assert len(records) == 2 and records[1].parts == (Text("kept"),)
    with pytest.raises(DataError, match=r"must stay inside it.*row 0.*a\.tar"):
        records[0]
    with pytest.raises(DataError, match="must stay inside it"):
        list(plait.datasets.stream(shard))


@pytest.mark.parametrize("kind", [
    tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE
])  # fmt: skip
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w") as archive:
        link = tarfile.TarInfo("0.png")
        link.type, link.linkname = kind, "/etc/passwd"
        archive.addfile(link)
        text = tarfile.TarInfo("0.txt")
        text.size = 1
        archive.addfile(text, io.BytesIO(b"a"))
    with pytest.raises(DataError, match=r"plain files.*0\.png"):
        plait.datasets.open(shard)[0]
    skipped = FailurePolicy(on_error="skip")
    assert list(plait.datasets.stream(shard, policy=skipped)) == [] and skipped.total == 1


def cut_at(file: Path, size: int) -> Path:
    shorter = file.with_name(f"cut-{size}.tar")
    shorter.write_bytes(file.read_bytes()[:size])
    return shorter


def test_a_shard_cut_anywhere_gives_its_whole_samples_and_says_what_is_missing(
    tmp_path: Path,
    write_tar: WriteTar,
) -> None:
    members = [
        (f"{n}.{suffix}", content)
        for n in range(3)
        for suffix, content in (("png", PICTURE), ("txt", b"text %d" % n))
    ]
    whole = write_tar(tmp_path / "whole.tar", *members)
    wanted = [said(row) for row in plait.datasets.open(whole)]
    size = whole.stat().st_size
    found = index_of(whole)
    in_texts = {found.entry(number).members[-1].offset + 3 for number in range(3)}
    for at in sorted({513, *in_texts, *range(512, size - 8192, 512), *range(100, size, 977)}):
        shard = cut_at(whole, at)
        skip = FailurePolicy(on_error="skip", max_total=None, max_consecutive=None)
        try:
            records = plait.datasets.open(shard)
        except DataError as error:
            assert "cut-" in str(error)
            with pytest.raises(DataError):
                list(plait.datasets.stream(shard))
            continue
        good = []
        broken = 0
        for row in range(len(records)):
            try:
                good.append(said(records[row]))
            except DataError as error:
                broken += 1
                assert error.origin.row == row and "cut-" in str(error)
        assert good == wanted[: len(good)], at
        assert broken or records.left_out or len(good) == 3, at
        assert [said(row) for row in plait.datasets.stream(shard, policy=skip)] == good
        assert bool(skip.total) == bool(broken or records.left_out), at
        shard.unlink()


def test_damage_in_the_middle_is_told(tmp_path: Path, write_tar: WriteTar) -> None:
    shard = write_tar(tmp_path / "a.tar", ("0.txt", b"a"), ("1.txt", b"b"), ("2.txt", b"c"))
    content = bytearray(shard.read_bytes())
    content[1024:1040] = b"\xff" * 16  # the header of 1.txt
    shard.write_bytes(content)
    records = plait.datasets.open(shard)
    assert [row.id for row in records] == ["0"]
    (left,) = records.left_out
    assert left.file == str(shard) and "bad checksum" in left.reason
    with pytest.raises(DataError, match="bad checksum"):
        list(plait.datasets.stream(shard))


def test_joined_archives_are_told(tmp_path: Path, write_tar: WriteTar) -> None:
    one = write_tar(tmp_path / "a.tar", ("0.txt", b"a"))
    two = write_tar(tmp_path / "b.tar", ("1.txt", b"b"))
    one.write_bytes(one.read_bytes() + two.read_bytes())
    assert "joined" in plait.datasets.open(one).left_out[0].reason


def test_a_header_may_not_promise_gigabytes(tmp_path: Path, write_tar: WriteTar) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 3_000_000_000
    shard = tmp_path / "a.tar"
    good = write_tar(tmp_path / "b.tar", ("0.txt", b"a")).read_bytes()[:1024]
    with shard.open("wb") as file:
        file.write(good + info.tobuf(tarfile.USTAR_FORMAT))
        file.truncate(3_000_010_000)  # holes, so that no disk is filled
    started = time.monotonic()
    records = plait.datasets.open(shard)
    assert len(records) == 1 and "3,000,000,000" in records.left_out[0].reason
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "empty"), (b"no tar at all" * 100, "truncated|header"), (b"\0" * 10240, "no row|none")],
)
def test_what_is_no_shard_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DataError, match=reason):
        plait.datasets.open(tmp_path / "a.tar")


def test_odd_samples_break_their_row_alone(tmp_path: Path, write_tar: WriteTar) -> None:
    shard = write_tar(
        tmp_path / "a.tar",
        ("0.png", PICTURE), ("0.png", PICTURE), ("0.txt", b"twice"),
        ("1.png", PICTURE),
        ("2.json", b"{"), ("2.png", PICTURE),
        ("3.txt", b"\xff"),
        ("4.json", b'{"messages": [{"role": "user", "content": "<image>"}], "images": ["x.png"]}'),
        ("5.json", b" " * 70_000 + b'{"text": "long"}'),
        ("6.TXT", b"fine"),
        ("__meta__/index.json", b"{}"), ("README", b"no ending"),
    )  # fmt: skip
    records = plait.datasets.open(shard, max_row_bytes=65_536)
    reasons = ["two", r"json or a \.txt|\.json", "JSON", "UTF-8", "sample's files", "at most"]
    for row, reason in enumerate(reasons):
        with pytest.raises(DataError, match=reason):
            records[row]
    assert records[6].parts == (Text("fine"),)
    assert {left.file.rpartition(":")[2] for left in records.left_out} == {
        "__meta__/index.json", "README",
    }  # fmt: skip


def test_a_stream_passes_over_what_is_too_large_and_keeps_its_budget(
    tmp_path: Path, write_tar: WriteTar
) -> None:
    members = [(f"{n}.{s}", c) for n in range(4) for s, c in (("png", PICTURE), ("txt", b"a"))]
    shard = write_tar(tmp_path / "a.tar", *members)
    small = Limits(max_image_bytes=100)
    with pytest.raises(DataError, match=r"at most 100 bytes.*row 0"):
        next(plait.datasets.stream(shard, limits=small))
    budget = FailurePolicy(on_error="skip", max_total=2)
    with pytest.raises(FailureBudgetError):
        list(plait.datasets.stream(shard, limits=small, policy=budget))


def damaged(content: bytes, chance: np.random.Generator) -> bytes:
    """Bytes changed, a stretch taken out, put in or set to nothing, or the end cut off."""
    held = bytearray(content)
    # Half of the damage falls into headers, which begin at every 512th byte.
    at = int(chance.integers(0, len(held) - 600))
    at = at // 512 * 512 + int(chance.integers(0, 160)) if chance.random() < 0.5 else at
    kind, length = chance.integers(0, 5), int(chance.integers(1, 40))
    if kind == 0:
        held[at : at + length] = chance.integers(0, 256, length, dtype=np.uint8).tobytes()
    elif kind == 1:
        del held[at : at + 512 * length // 8]
    elif kind == 2:
        held[at:at] = chance.integers(0, 256, length, dtype=np.uint8).tobytes()
    elif kind == 3:
        held[at : at + 512] = bytes(512)
    else:
        del held[at:]
    return bytes(held)


def outcome(read: Callable[[], list[tuple[str, list[str], list[str]]]]) -> str:
    """Whether a damaged shard was refused; anything but a DataError escapes and fails the test."""
    try:
        return "read" if read() else "read, and no row is whole"
    except DataError as error:
        assert len(str(error)) < 1000 and "\n" not in str(error)
        return "refused"


def check_damaged(tmp_path: Path, write_tar: WriteTar, count: int) -> Counter[str]:
    members = []
    for number in range(6):
        row = {"messages": [{"role": "assistant", "content": f"<image>{number}"}]}
        members += [(f"a/{number}.json", json.dumps(row).encode()), (f"a/{number}.jpg", PICTURE)]
        members += [(f"b/{number}.png", PICTURE), (f"b/{number}.txt", b"A caption")]
    whole = write_tar(tmp_path / "whole.tar", *members).read_bytes()
    chance, found = np.random.default_rng(5), Counter[str]()
    shard = tmp_path / "damaged.tar"

    def by_number() -> list[tuple[str, list[str], list[str]]]:
        good, records = [], plait.datasets.open(shard)
        for row in range(len(records)):
            with suppress(DataError):
                good.append(said(records[row]))
        return good

    def in_order() -> list[tuple[str, list[str], list[str]]]:
        skip = FailurePolicy(on_error="skip", max_total=None, max_consecutive=None)
        return [said(row) for row in plait.datasets.stream(shard, policy=skip)]

    for number in range(count):
        shard.write_bytes(damaged(whole, chance))
        os.utime(shard, ns=(number, number))  # so that no index of the last one is taken for it
        found[f"by number: {outcome(by_number)}"] += 1
        found[f"in order: {outcome(in_order)}"] += 1
    print(dict(sorted(found.items())))
    assert found["by number: read"] > count / 2 and found["in order: read"] > count / 2
    return found


def test_damaged_shards_are_read_as_far_as_they_are_whole(
    tmp_path: Path, write_tar: WriteTar
) -> None:
    check_damaged(tmp_path, write_tar, 200)


@pytest.mark.fuzz
def test_thousands_of_damaged_shards_are_read_as_far_as_they_are_whole(
    tmp_path: Path, write_tar: WriteTar
) -> None:
    check_damaged(tmp_path, write_tar, 3000)

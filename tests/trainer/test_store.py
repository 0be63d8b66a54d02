"""The store of checkpoints: names, objects, lifetimes, and what is left when something fails."""

import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plait.errors import CheckpointError, ConfigError, DamagedCheckpointError
from plait.trainer import files, objects, store
from plait.trainer.lifetime import Lifetime
from plait.trainer.locks import alone, held, is_held, shared
from plait.trainer.manifest import FORMAT, read_sealed, sha256_of, verify, write_sealed
from plait.trainer.objects import SMALLEST, Objects
from plait.trainer.places import Place
from plait.trainer.source import Source
from plait.trainer.store import Store

ONE, TWO = Place("run", "weights", "one"), Place("run", "weights", "two")
LARGE = b"w" * (SMALLEST + 1)

Write = Callable[[Path], None]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def kept(tmp_path: Path, clock: Clock) -> Store:
    return Store(tmp_path / "root", clock)


def holding(**contents: bytes) -> Write:
    """Writes these files, and a manifest of them."""

    def write(folder: Path) -> None:
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        sums = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
        facts = {"spec": {"language": "none"}, "step": 3, "user_metadata": {}}
        write_sealed(folder / "manifest.json", {"format": FORMAT, "files": sums, **facts})

    return write


def content(store: Store, place: Place, name: str = "weights") -> bytes:
    with store.reading(place) as folder:
        verify(folder)
        return (folder / name).read_bytes()


def left(store: Store) -> list[str]:
    """Everything in the root but the lock, by relative path."""
    paths = [path.relative_to(store.root).as_posix() for path in store.root.rglob("*")]
    return sorted(path for path in paths if path != ".lock" and not (store.root / path).is_dir())


def test_equal_files_lie_in_one_place(kept: Store) -> None:
    first = kept.save(ONE, holding(weights=LARGE, frozen=LARGE * 2, small=b"s"))
    second = kept.save(TWO, holding(weights=LARGE + b"!", frozen=LARGE * 2, small=b"s"))
    assert first != second
    paths = [place.under(kept.root) for place in (ONE, TWO)]

    def places(name: str) -> int:
        return len({(path / name).stat().st_ino for path in paths})

    assert [places(name) for name in ("weights", "frozen", "small")] == [2, 1, 2]
    assert len(list(Objects(kept.root / "objects"))) == 3
    assert kept.save(Place("other", "weights", "one"), holding(
        weights=LARGE, frozen=LARGE * 2, small=b"s"
    )) == first, "equal content has an equal digest"  # fmt: skip
    assert len(list(Objects(kept.root / "objects"))) == 3


def test_objects_go_with_the_last_checkpoint_that_has_them(kept: Store) -> None:
    kept.save(ONE, holding(weights=LARGE, frozen=LARGE * 2))
    kept.save(TWO, holding(weights=LARGE + b"!", frozen=LARGE * 2))
    kept.delete(ONE)
    assert content(kept, TWO, "frozen") == LARGE * 2
    assert len(list(Objects(kept.root / "objects"))) == 2
    kept.save(TWO, holding(weights=LARGE + b"?"), overwrite=True)
    assert len(list(Objects(kept.root / "objects"))) == 1
    kept.delete(TWO)
    assert left(kept) == []


def test_a_damaged_object_is_not_used_again(kept: Store) -> None:
    """What is saved after the damage is whole; what shared the damaged place is refused."""
    kept.save(ONE, holding(weights=LARGE))
    (kept_object,) = Objects(kept.root / "objects")
    with kept_object.open("r+b") as file:
        file.write(b"X")
    kept.save(TWO, holding(weights=LARGE))
    assert content(kept, TWO) == LARGE
    with pytest.raises(DamagedCheckpointError, match="weights is missing or not what was saved"):
        content(kept, ONE)
    kept.save(Place("run", "weights", "three"), holding(weights=LARGE))
    assert len({(Place("run", "weights", n).under(kept.root) / "weights").stat().st_ino
                for n in ("two", "three")}) == 1  # fmt: skip


def test_a_file_system_without_links_costs_space_only(
    kept: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(objects.errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(objects.os, "link", refuse)
    kept.save(ONE, holding(weights=LARGE))
    assert content(kept, ONE) == LARGE
    assert list(Objects(kept.root / "objects")) == []

    def full(*_: Any) -> None:
        raise OSError(objects.errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(objects.os, "link", full)
    with pytest.raises(CheckpointError, match=r"cannot be saved in .*No space left"):
        kept.save(TWO, holding(weights=LARGE))
    assert [entry.place for entry in kept.entries()] == [ONE]


def test_a_name_is_taken_until_it_may_be_overwritten(kept: Store) -> None:
    kept.save(ONE, holding(weights=b"first"))
    written: list[Path] = []
    with pytest.raises(CheckpointError, match="tinker://run/weights/one is there already"):
        kept.save(ONE, written.append)
    assert written == [], "it is refused before anything is written"
    assert content(kept, ONE) == b"first"
    kept.save(ONE, holding(weights=b"second"), overwrite=True)
    assert content(kept, ONE) == b"second"


def test_of_two_that_save_under_one_name_the_later_is_refused(kept: Store) -> None:
    def meanwhile(folder: Path) -> None:
        kept.save(ONE, holding(weights=b"other"))
        holding(weights=b"mine")(folder)

    with pytest.raises(CheckpointError, match="is there already"):
        kept.save(ONE, meanwhile)
    assert content(kept, ONE) == b"other"
    assert left(kept) == [f"run/weights/one/{name}"
                          for name in ("lifetime.json", "manifest.json", "weights")]  # fmt: skip


def test_a_save_does_not_fail_for_what_others_left(
    kept: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something that cannot be removed is no reason to deny what is on the disk."""

    def denied(self: Store) -> None:
        raise PermissionError(13, "Permission denied", "other")

    monkeypatch.setattr(Store, "_sweep", denied)
    digest = kept.save(ONE, holding(weights=b"1"))
    assert [(entry.place, entry.digest) for entry in kept.entries()] == [(ONE, digest)]
    kept.delete(ONE)
    assert kept.entries() == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_what_was_there(kept: Store, error: BaseException) -> None:
    kept.save(ONE, holding(weights=b"first"))
    before = left(kept)

    def fail(folder: Path) -> None:
        (folder / "weights").write_bytes(LARGE)
        raise error

    kind = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(kind):
        kept.save(ONE, fail, overwrite=True)
    assert left(kept) == before
    assert content(kept, ONE) == b"first"


def test_any_flipped_bit_is_refused_by_name_and_the_previous_one_stays(kept: Store) -> None:
    kept.save(ONE, holding(weights=LARGE, small=b"same"), ttl_seconds=50)
    kept.save(TWO, holding(weights=LARGE + b"!", small=b"same"), ttl_seconds=60)
    for file in sorted(TWO.under(kept.root).iterdir()):
        whole = file.read_bytes()
        places = range(len(whole)) if len(whole) < 1000 else (0, 7, SMALLEST, len(whole) - 1)
        for place in places:
            for bit in (1 << place % 8, 0x20):
                file.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
                with pytest.raises(CheckpointError, match=re.escape(file.name)):
                    content(kept, TWO)
        file.write_bytes(whole)
        assert content(kept, ONE) == LARGE
    assert content(kept, TWO) == LARGE + b"!"


def test_json_of_the_same_value_but_another_text_is_refused(tmp_path: Path) -> None:
    """One bit makes 1E-05 of 1e-05, which any reader takes for the same number."""
    write_sealed(tmp_path / "values.json", {"rate": 1e-05})
    assert read_sealed(tmp_path / "values.json") == {"rate": 1e-05}
    text = (tmp_path / "values.json").read_text()
    (tmp_path / "values.json").write_text(text.replace("1e-05", "1E-05"))
    with pytest.raises(DamagedCheckpointError, match=r"values\.json is not what was saved"):
        read_sealed(tmp_path / "values.json")


def test_damage_does_not_lead_to_deletion_but_by_name(kept: Store, clock: Clock) -> None:
    kept.save(ONE, holding(weights=b"first"), ttl_seconds=10)
    kept.save(TWO, holding(weights=b"second"))
    (ONE.under(kept.root) / "lifetime.json").write_text("{}")
    (TWO.under(kept.root) / "manifest.json").unlink()
    clock.now += 1000
    kept.open()
    problems = {entry.place.name: entry.problem for entry in kept.entries()}
    assert "lifetime.json" in problems["one"] and "manifest.json" in problems["two"]
    with pytest.raises(DamagedCheckpointError, match=r"lifetime\.json is not what was saved"):
        kept.set_ttl(ONE, 5)
    for place in (ONE, TWO):
        kept.delete(place)
    assert kept.entries() == [] and left(kept) == []


def test_what_expires_is_refused_and_removed(kept: Store, clock: Clock) -> None:
    kept.save(ONE, holding(weights=LARGE), ttl_seconds=10)
    kept.save(TWO, holding(weights=b"second"))
    assert [e.lifetime for e in kept.entries()] == [Lifetime(1000, 1010), Lifetime(1000, None)]
    clock.now = 1009.9
    assert content(kept, ONE) == LARGE
    clock.now = 1010.0
    with pytest.raises(ConfigError, match="tinker://run/weights/one has expired"):
        content(kept, ONE)
    with pytest.raises(ConfigError, match="has expired"):
        kept.set_ttl(ONE, 100)
    assert ONE.under(kept.root).is_dir()
    kept.open()
    assert not ONE.under(kept.root).exists()
    assert list(Objects(kept.root / "objects")) == []
    with pytest.raises(ConfigError, match="it was deleted, it expired or it was never saved"):
        content(kept, ONE)
    assert content(kept, TWO) == b"second"


def test_the_name_of_what_expired_is_free(kept: Store, clock: Clock) -> None:
    kept.save(ONE, holding(weights=b"first"), ttl_seconds=10)
    clock.now += 10
    kept.save(ONE, holding(weights=b"second"))
    assert content(kept, ONE) == b"second"


def test_a_lifetime_may_change_and_nothing_else_does(kept: Store, clock: Clock) -> None:
    digest = kept.save(ONE, holding(weights=b"first"), ttl_seconds=10)
    clock.now += 5
    kept.set_ttl(ONE, 100)
    (entry,) = kept.entries()
    assert (entry.lifetime, entry.digest) == (Lifetime(1000, 1105), digest)
    kept.set_ttl(ONE, None)
    clock.now = 1e12
    assert content(kept, ONE) == b"first"
    for wrong in (0, -1, float("nan"), float("inf"), "1"):
        with pytest.raises(ConfigError, match="ttl_seconds must be a number above 0"):
            kept.set_ttl(ONE, wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="neither a checkpoint nor a run"):
        kept.set_ttl(TWO, 5)
    with pytest.raises(ConfigError, match="neither a checkpoint nor a run"):
        kept.delete(TWO)


def test_a_sweep_spares_what_lives_and_what_is_not_its_own(kept: Store) -> None:
    """A save in the middle, files of others under the root, and what a dead process left."""
    kept.save(ONE, holding(weights=b"first"))
    (kept.root / "notes").mkdir()
    (kept.root / "notes" / "mine.txt").write_text("mine")
    dead = kept.root / ".writing-dead"
    dead.mkdir()
    (dead / "weights").write_bytes(LARGE)
    Objects(kept.root / "objects").share(dead / "weights", sha256_of(dead / "weights"))

    def slow(folder: Path) -> None:
        holding(weights=LARGE + b"!")(folder)
        os.link(folder / "weights", kept.root / "objects" / "of-mine")
        Store(kept.root, kept.clock).open()
        assert (folder / "weights").read_bytes() == LARGE + b"!"

    kept.save(TWO, slow)
    assert content(kept, TWO) == LARGE + b"!"
    assert not dead.exists()
    assert (kept.root / "notes" / "mine.txt").read_text() == "mine"
    assert len(list(Objects(kept.root / "objects"))) == 1


@pytest.mark.parametrize("moment", ["old one renamed", "new one renamed", "deleting"])
def test_a_kill_between_renames_is_mended_by_whoever_comes_next(
    kept: Store, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept.save(ONE, holding(weights=b"first"))
    pid = os.fork()
    if pid == 0:
        rename, calls = Path.rename, {"old one renamed": 1, "new one renamed": 2, "deleting": 1}

        def dying(path: Path, to: Path) -> Path:
            result = rename(path, to)
            calls[moment] -= 1
            if calls[moment] == 0:
                os._exit(9)
            return result

        monkeypatch.setattr(Path, "rename", dying)
        if moment == "deleting":
            kept.delete(ONE)
        kept.save(ONE, holding(weights=b"second"), overwrite=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    if moment == "deleting":
        with pytest.raises(ConfigError, match="neither"):
            content(kept, ONE)
    else:
        expected = b"first" if moment == "old one renamed" else b"second"
        assert content(kept, ONE) == expected, "reading alone puts it back"
    kept.open()
    assert not [name for name in left(kept) if ".writing-" in name]


def test_nobody_overwrites_what_is_being_read(kept: Store) -> None:
    kept.save(ONE, holding(weights=b"first"))
    done = threading.Event()

    def overwrite() -> None:
        kept.save(ONE, holding(weights=b"second"), overwrite=True)
        done.set()

    with kept.reading(ONE) as folder:
        writer = threading.Thread(target=overwrite)
        writer.start()
        assert not done.wait(0.3)
        assert (folder / "weights").read_bytes() == b"first"
    writer.join()
    assert content(kept, ONE) == b"second"


def test_locks(tmp_path: Path) -> None:
    with shared(tmp_path):
        assert not (tmp_path / ".lock").exists(), "reading writes nothing"
    with alone(tmp_path):
        pass
    with shared(tmp_path), shared(tmp_path):
        pass
    with held(tmp_path):
        assert is_held(tmp_path)
    assert not is_held(tmp_path)
    assert not is_held(tmp_path / "gone")


def test_everything_is_synced_before_it_has_its_name(
    kept: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync, replace = files.sync, files.replace_folder

    def named(path: Path) -> str:
        return "aside" if path.name.startswith(".writing-") else path.name

    monkeypatch.setattr(store, "sync", lambda path: (done.append(named(path)), sync(path)))
    monkeypatch.setattr(
        store, "replace_folder", lambda *paths: (done.append("replace"), replace(*paths))
    )
    kept.save(ONE, holding(weights=LARGE))
    assert done == ["lifetime.json", "manifest.json", "weights", "aside", "run", "root", "replace"]


@pytest.mark.parametrize("path", [
    "tinker://run/weights", "tinker://run/weights/a/b", "tinker://run/other/a", "tinker://",
    "tinker://../weights/a", "tinker://run/weights/..", "tinker://run/weights/.lock",
    "tinker://run/weights/", "plait://run/weights/a", "http://run/weights/a",
])  # fmt: skip
def test_a_path_has_one_form(kept: Store, path: str) -> None:
    with pytest.raises(ConfigError, match="a path has the form"), Source(kept, path).reading():
        pass


@pytest.mark.parametrize("name", ["", ".", "..", ".a", "a/b", "a\0", "a\n"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="a checkpoint's name has"):
        Place("run", "weights", name)

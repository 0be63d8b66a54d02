"""Folders and files appear whole or not at all."""

import json
import os
from pathlib import Path

import pytest

from plait.errors import CheckpointError
from plait.trainer import files
from plait.trainer.files import new_folder, put_back, remove_leftovers, write_json, writing


def fill(target: Path, text: str) -> None:
    with new_folder(target) as aside:
        (aside / "file").write_text(text)


def test_a_folder_appears_whole_and_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "folder"
    fill(target, "one")
    fill(target, "two")
    assert (target / "file").read_text() == "two"
    assert [path.name for path in target.parent.iterdir()] == ["folder"]


def test_everything_is_synced_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync, replace = files.sync, files.replace_folder
    monkeypatch.setattr(files, "sync", lambda path: (done.append(path.name), sync(path)))
    monkeypatch.setattr(
        files, "replace_folder", lambda *paths: (done.append("replace"), replace(*paths))
    )
    fill(tmp_path / "target", "one")
    assert done == ["file", ".writing-target", "replace", tmp_path.name]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_folder(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "folder"
    fill(target, "one")
    kind = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(kind), new_folder(target) as aside:
        (aside / "file").write_text("two")
        raise error
    assert (target / "file").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_errors_that_are_no_write_failures_stay_themselves(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "folder"):
        _ = 1 // 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_a_kill_while_replacing_leaves_the_old_or_the_new(
    tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill runs no handler: what lies there at each of its moments is made by a child."""
    target = tmp_path / "folder"
    fill(target, "one")
    pid = os.fork()
    if pid == 0:
        rename = Path.rename
        calls = {"before": 0, "between": 1, "after": 2}[moment]

        def dying(path: Path, to: Path) -> Path:
            nonlocal calls
            if calls == 0:
                os._exit(9)
            result = rename(path, to)
            calls -= 1
            if calls == 0 and moment != "before":
                os._exit(9)
            return result

        monkeypatch.setattr(Path, "rename", dying)
        fill(target, "two")
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 9
    remove_leftovers(tmp_path)
    assert (target / "file").read_text() == ("two" if moment == "after" else "one")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    fill(target, "three")
    assert (target / "file").read_text() == "three"


def test_put_back_changes_nothing_that_is_whole(tmp_path: Path) -> None:
    fill(tmp_path / "folder", "one")
    put_back(tmp_path / "folder")
    put_back(tmp_path / "nothing")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "sub" / "values.json"
    write_json(file, {"é": 1})
    write_json(file, {"é": 2})
    assert json.loads(file.read_text()) == {"é": 2}
    assert [path.name for path in file.parent.iterdir()] == ["values.json"]


def test_json_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_json(tmp_path / "file" / "values.json", {})
    (tmp_path / "taken.json").mkdir()
    with pytest.raises(CheckpointError, match="free some space"):
        write_json(tmp_path / "taken.json", {})
    assert not list(tmp_path.glob(".writing-*"))


def test_others_write_failures_become_ours(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match=r"logs cannot be written: .*No space left"),
        writing(tmp_path / "logs"),
    ):
        raise OSError(28, "No space left on device")


def test_a_measure_that_is_not_finite_is_said_to_be(tmp_path: Path) -> None:
    write_json(tmp_path / "metrics.json", {"nll": 1.0})
    with pytest.raises(CheckpointError, match="training diverged: lower the learning rate"):
        write_json(tmp_path / "metrics.json", {"nll": float("nan")})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"nll": 1.0}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]

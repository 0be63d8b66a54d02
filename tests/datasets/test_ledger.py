"""The ledger: each row once, and a kill never over-counts."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from plait.datasets.ledger import Ledger, NullLedger, count, empty_state
from plait.errors import CheckpointError, ConfigError, Origin


def write(ledger: Ledger, epoch: int, rows: range) -> None:
    for row in rows:
        ledger.record(epoch, "used", Origin("d", row))


def test_lines_are_json_and_add_up(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "run" / "ledger.jsonl")
    ledger.record(0, "used", Origin("stamps", 3, "ä.png"))
    ledger.record(0, "broken", Origin("stamps", 4), "cut short")
    ledger.record(0, "left_out", Origin("stamps", None, "b.png"), "no text")
    ledger.record(1, "used", Origin("stamps", 3))
    ledger.close()
    lines = [json.loads(t) for t in ledger.path.read_text(encoding="utf-8").splitlines()]
    assert lines[0] == {
        "epoch": 0, "status": "used", "dataset": "stamps", "row": 3, "file": "ä.png", "reason": "",
    }  # fmt: skip
    summary = count(ledger.path)
    assert summary.epochs == {0: {"used": 1, "broken": 1, "left_out": 1}, 1: {"used": 1}}
    assert summary.reasons["broken"] == {"cut short": 1}
    assert summary.counts == {"used": 2, "broken": 1, "left_out": 1}
    assert summary.twice == []


def test_a_row_counts_once_an_epoch_also_after_reopening(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l")
    ledger.record(0, "used", Origin("d", 1, "a"))
    with pytest.raises(CheckpointError, match="once an epoch"):
        ledger.record(0, "broken", Origin("d", 1, "b"))
    ledger.record(1, "used", Origin("d", 1))
    with pytest.raises(CheckpointError, match="once an epoch"):
        ledger.record(0, "used", Origin("d", 1))
    ledger.close()
    with pytest.raises(CheckpointError, match="once an epoch"):
        Ledger(tmp_path / "l").record(1, "used", Origin("d", 1))


def test_an_unknown_status_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lost"):
        Ledger(tmp_path / "l").record(0, "lost", Origin("d", 1))  # type: ignore[arg-type]


def test_restore_cuts_to_what_the_checkpoint_saw(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l")
    write(ledger, 0, range(5))
    state = json.loads(json.dumps(ledger.state()))
    assert state == {"bytes": (tmp_path / "l").stat().st_size, "counts": {"used": 5}}
    saved = (tmp_path / "l").read_bytes()
    write(ledger, 0, range(5, 9))
    ledger.close()
    again = Ledger(tmp_path / "l")
    again.restore(state)
    write(again, 0, range(5, 7))
    again.close()
    assert (tmp_path / "l").read_bytes().startswith(saved)
    assert count(tmp_path / "l").epochs == {0: {"used": 7}}


def test_every_tear_of_the_last_line_is_cut(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l")
    write(ledger, 0, range(3))
    state = ledger.state()
    write(ledger, 0, range(3, 4))
    ledger.close()
    whole = (tmp_path / "l").read_bytes()
    for size in range(state["bytes"], len(whole)):
        torn = tmp_path / "torn"
        torn.write_bytes(whole[:size])
        assert count(torn).counts == {"used": 3}
        again = Ledger(torn)
        again.restore(state)
        write(again, 0, range(3, 4))
        again.close()
        assert torn.read_bytes() == whole


def test_a_ledger_of_another_run_is_refused(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l")
    write(ledger, 0, range(3))
    state = ledger.state()
    for wrong, message in [
        (state | {"bytes": state["bytes"] + 1}, "lost lines"),
        (state | {"bytes": state["bytes"] - 1}, "no line ends"),
        (state | {"counts": {"used": 2}}, "does not belong"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            ledger.restore(wrong)
    ledger.restore(state)
    ledger.restore(empty_state())
    write(ledger, 0, range(3))
    assert ledger.state() == state


@pytest.mark.parametrize("text", ["my notes\n", "my notes", '{"a": 1}\n', "1\n"])
def test_a_file_that_is_no_ledger_is_refused_and_kept(tmp_path: Path, text: str) -> None:
    (tmp_path / "notes").write_text(text)
    with pytest.raises(CheckpointError, match="not a ledger"):
        Ledger(tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == text


def test_a_tail_of_zeros_after_a_power_cut_is_cut(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l")
    write(ledger, 0, range(2))
    ledger.close()
    whole = (tmp_path / "l").read_bytes()
    (tmp_path / "l").write_bytes(whole + b'{"ep' + bytes(100))
    Ledger(tmp_path / "l").close()
    assert (tmp_path / "l").read_bytes() == whole


def test_a_failed_write_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(tmp_path / "l")
    write(ledger, 0, range(3))
    state = ledger.state()
    write(ledger, 0, range(3, 6))

    class FullDisk:
        closed = False

        def write(self, data: memoryview) -> int:
            if len(data) > 20:
                return real.write(data[:20])
            raise OSError(28, "No space left on device")

        def fileno(self) -> int:
            return real.fileno()

    real = ledger._file
    with monkeypatch.context() as patched:
        patched.setattr(ledger, "_file", FullDisk())
        with pytest.raises(CheckpointError, match="No space left"):
            ledger.state()
    assert (tmp_path / "l").stat().st_size == state["bytes"]
    assert ledger.state()["counts"] == {"used": 6}
    assert count(tmp_path / "l").epochs == {0: {"used": 6}}


_KILLED = """
import os, signal, sys
import plait
from plait.datasets.ledger import Ledger
from plait.errors import Origin
ledger = Ledger(sys.argv[1])
for row in range(5000):
    ledger.record(0, "used", Origin("d", row))
    if row == 1999:
        print(ledger.state()["bytes"], flush=True)
    if row == 3700:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_never_over_counts(tmp_path: Path) -> None:
    path = tmp_path / "l"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    found = subprocess.run(
        [sys.executable, "-c", _KILLED, str(path)],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert found.returncode == -signal.SIGKILL, found.stderr
    ledger = Ledger(path)
    ledger.restore({"bytes": int(found.stdout), "counts": {"used": 2000}})
    write(ledger, 0, range(2000, 5000))
    ledger.close()
    summary = count(path)
    assert summary.epochs == {0: {"used": 5000}}
    assert not summary.twice


def test_the_independent_count_sees_a_row_that_stands_twice(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l")
    write(ledger, 0, range(1))
    ledger.close()
    (tmp_path / "l").write_bytes((tmp_path / "l").read_bytes() * 2)
    assert count(tmp_path / "l").twice == [(0, ("d", 0))]


def test_the_null_ledger_keeps_nothing() -> None:
    ledger = NullLedger()
    ledger.record(0, "used", Origin("d", 1))
    ledger.record(0, "used", Origin("d", 1))
    assert ledger.state() == empty_state()
    ledger.restore(ledger.state())
    ledger.close()

"""Running a program of the system, watching it, and saying in one line why it failed."""

import os
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from plait.datasets.fetch.progress import ignore
from plait.errors import FetchError

_POLL_SECONDS = 0.2


def run(
    command: Sequence[str | Path],
    *,
    doing: str,
    remedy: str,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    watch: Callable[[], None] = lambda: None,
    hear: Callable[[str], None] = ignore,
) -> list[str]:
    """Run a command to its end and return the lines it wrote (errors among them).

    Args:
        doing: What it is for, to begin the message of a failure.
        remedy: What the user can do, to end it.
        watch: Called several times a second while the command runs.
        hear: Called with each line, from another thread.

    Raises:
        FetchError: the program is missing, or it failed.
    """
    try:
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=folder,
            env={**os.environ, "LC_ALL": "C.UTF-8", "PYTHONUNBUFFERED": "1", **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:
        why = f"{command[0]} does not run here ({error.strerror})"
        raise FetchError(f"{doing}: {why}; {remedy}") from error
    lines: list[str] = []
    reader = threading.Thread(target=_read, args=(process, lines, hear), daemon=True)
    reader.start()
    try:
        code = _wait(process, watch)
    finally:
        if process.poll() is None:  # Ctrl-C, or watch() failed
            process.kill()
            process.wait()
        reader.join()
    if code:
        raise FetchError(f"{doing}: {useful_line(lines) or f'exit status {code}'}; {remedy}")
    return lines


def _wait(process: "subprocess.Popen[str]", watch: Callable[[], None]) -> int:
    while True:
        try:
            return process.wait(_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            watch()


def _read(process: "subprocess.Popen[str]", lines: list[str], hear: Callable[[str], None]) -> None:
    assert process.stdout is not None
    with process.stdout as pipe:
        for line in pipe:
            lines.append(line.rstrip())
            hear(lines[-1])


def useful_line(lines: Sequence[str]) -> str:
    """The last line that says what went wrong: an error line if there is one, else the last."""
    written = [line.strip() for line in lines if line.strip() and "[notice]" not in line]
    errors = [line for line in written if line.startswith(("ERROR:", "E:", "error:"))]
    return (errors or written or [""])[-1].rstrip(".;")

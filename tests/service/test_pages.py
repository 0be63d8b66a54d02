"""What the README shows of a server runs as it stands, on real weights."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.weights
def test_the_remote_loop_captions_its_picture(
    new_server: Callable[..., Any], real_home: Path, picture_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    home = {"PLAIT_HOME": str(real_home)}
    server = new_server(models=[str(ROOT / "configs" / "stamps.yaml")], environment=home).start()
    (tmp_path / "cat.png").write_bytes((picture_folder / "disc" / "00.png").read_bytes())
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if "http://127.0.0.1:8000" in block]
    assert len([line for line in block.splitlines() if line.strip()]) <= 12
    here = block.replace("http://127.0.0.1:8000", server.url)
    exec(compile(here, "README.md", "exec"), {})
    assert "A cat.\n" in capsys.readouterr().out

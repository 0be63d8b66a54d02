"""What tests of datasets share."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def write_tar() -> Callable[..., Path]:
    """Writes a tar of plain files: `write_tar(path, (name, bytes), ...)`, which gives the path."""

    def write(file: Path, *members: tuple[str, bytes]) -> Path:
        with tarfile.open(file, "w") as archive:
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return file

    return write

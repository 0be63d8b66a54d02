"""Media at addresses (http, s3 and whatever else fsspec reads), fetched once into `$PLAIT_HOME`."""

import hashlib
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from plait.errors import DataError
from plait.home import home
from plait.modalities import Limits

_BLOCK = 1 << 20


@dataclass(frozen=True)
class RemoteFiles:
    """Calling it with an address gives the local copy, which is brought the first time.

    What lies at an address is taken not to change. A copy appears whole or not at all.
    """

    limits: Limits = field(default_factory=Limits)

    def __call__(self, address: str, medium: str) -> Path:
        """The file.

        Raises:
            DataError: it cannot be fetched, or is larger than the limits allow.
        """
        ending = PurePosixPath(urlsplit(address).path).suffix[:10]
        name = hashlib.sha256(address.encode()).hexdigest()
        file = home() / "remote" / name[:2] / f"{name}{ending if ending.isprintable() else ''}"
        if not file.is_file():
            self._bring(address, file, getattr(self.limits, f"max_{medium}_bytes"))
        return file

    def _bring(self, address: str, file: Path, most: int) -> None:
        import fsspec

        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".part-", dir=file.parent)
        try:
            with os.fdopen(handle, "wb") as copy, fsspec.open(address, "rb") as content:
                size = 0
                while block := content.read(_BLOCK):
                    size += len(block)
                    if size > most:
                        raise DataError(
                            f"what is fetched must have at most {most:,} bytes; {address[:200]!r} "
                            "has more; shrink it or raise the limit"
                        )
                    copy.write(block)
            Path(name).replace(file)
        except DataError:
            raise
        except Exception as error:  # each of fsspec's file systems has errors of its own
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise DataError(
                f"an address must be readable; {address[:200]!r} is not: {reason}; mend it, or see "
                "that the package which fsspec needs for it is installed"
            ) from error
        finally:
            Path(name).unlink(missing_ok=True)

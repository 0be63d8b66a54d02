"""Features of frozen towers, kept on disk and in a bounded part of memory.

One safetensors file per item and view. A file that cannot be read is a miss and is written again.
"""

import hashlib
import os
import threading
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from plait.stream import Encoded
from plait.stream.types import bytes_of

LIBRARIES = ("av", "numpy", "pillow", "torch", "torchaudio", "torchvision", "transformers")
"""Their versions may change the features' last bits, so they stand in every key."""


@dataclass(frozen=True, slots=True)
class CacheSize:
    """How much a cache holds."""

    entries: int
    disk_bytes: int
    memory_bytes: int


class FeatureCache:
    """A cache for the features of one encoder; safe for threads and processes.

    Entries are shared, not copied: their tensors must not be changed in place.

    Args:
        folder: Where the files lie; made at the first entry. Several encoders may share it.
        fingerprint: All that decides the features besides the pixels (weights, processing, dtype,
            pool): `MediaEncoder.fingerprint()`.
        memory_bytes: Bound of what is also kept in memory; the longest unused goes first.
    """

    def __init__(self, folder: Path, fingerprint: str, memory_bytes: int) -> None:
        self.folder, self.fingerprint, self.memory_bytes = Path(folder), fingerprint, memory_bytes
        self._held: OrderedDict[str, Encoded] = OrderedDict()
        self._held_bytes = 0
        self._lock = threading.Lock()

    def key(self, digest: str, view: str = "") -> str:
        """The key of an item: the digest of its file, and the name of its view."""
        facts = [self.fingerprint, digest, view, *_versions()]
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()

    def get(self, key: str) -> Encoded | None:
        """The features of an item, on the CPU, or None."""
        with self._lock:
            held = self._held.get(key)
            if held is not None:
                self._held.move_to_end(key)
                return held
        encoded = _read(self.path(key))
        if encoded is not None:
            self._hold(key, encoded)
        return encoded

    def put(self, key: str, encoded: Encoded) -> None:
        """Keep features. Where the disk refuses, they are kept in memory only, with a warning."""
        plain = Encoded(
            _plain(encoded.embeddings),
            tuple(_plain(layer) for layer in encoded.layers),
            encoded.grid,
            encoded.seconds,
        )
        self._hold(key, plain)
        try:
            _write(self.path(key), plain)
        except OSError as error:
            warnings.warn(
                f"features cannot be cached in {self.folder} ({error}); they will be computed "
                "again in the next run: free some space or set another folder",
                stacklevel=2,
            )

    def size(self) -> CacheSize:
        """The entries in the folder, of every encoder, and their bytes; reads the folder."""
        sizes = [path.stat().st_size for path in self.folder.glob("??/*.safetensors")]
        return CacheSize(len(sizes), sum(sizes), self._held_bytes)

    def path(self, key: str) -> Path:
        """The file of an item's features."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def _hold(self, key: str, encoded: Encoded) -> None:
        with self._lock:
            if key in self._held:
                self._held_bytes -= _bytes(self._held.pop(key))
            self._held[key] = encoded
            self._held_bytes += _bytes(encoded)
            while self._held_bytes > self.memory_bytes:
                _, dropped = self._held.popitem(last=False)
                self._held_bytes -= _bytes(dropped)


@cache
def _versions() -> tuple[str, ...]:
    """Of the libraries; looking them up takes a millisecond, and a key is made of every item."""
    return tuple(f"{library} {version(library)}" for library in LIBRARIES)


def _plain(tensor: Tensor) -> Tensor:
    """A CPU copy with storage of its own, so that a slice does not keep a whole batch alive."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _bytes(encoded: Encoded) -> int:
    return sum(tensor.nbytes for tensor in (encoded.embeddings, *encoded.layers))


def _write(path: Path, encoded: Encoded) -> None:
    tensors = {
        "embeddings": encoded.embeddings,
        "grid": torch.tensor(encoded.grid),
        "seconds": torch.tensor(encoded.seconds, dtype=torch.float64),
    }
    tensors |= {f"layer.{number}": layer for number, layer in enumerate(encoded.layers)}
    tensors["checksum"] = _checksum(tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not synced to the disk before the rename: after a crash an incomplete file is a miss.
    with NamedTemporaryFile(dir=path.parent, prefix="writing-", delete=False) as file:
        try:
            file.write(save(tensors))
            file.close()
            Path(file.name).replace(path)
        except BaseException:
            os.unlink(file.name)  # noqa: PTH108  (the name is a string)
            raise


def _read(path: Path) -> Encoded | None:
    try:
        tensors = load(path.read_bytes())
        checksum = tensors.pop("checksum")
        if not torch.equal(checksum, _checksum(tensors)):
            return None
        layers = [tensors[f"layer.{number}"] for number in range(len(tensors) - 3)]
        time, height, width = tensors["grid"].tolist()
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    seconds = tuple(tensors["seconds"].tolist())
    return Encoded(tensors["embeddings"], tuple(layers), (time, height, width), seconds)


def _checksum(tensors: dict[str, Tensor]) -> Tensor:
    """(32,) bytes: safetensors finds a file cut short, but not a changed bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(bytes_of(tensor))
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)

"""The feature cache: exact, bounded, and safe against broken files and other processes."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch

from plait.encoders.feature_cache import FeatureCache
from plait.stream import Encoded


def features(seed: int = 0, rows: int = 9, dtype: torch.dtype = torch.float32) -> Encoded:
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(rows, 4, generator=generator).to(dtype)
    return Encoded(made, (made * 2, made[:, :2]), (rows, 1, 1), tuple(map(float, range(rows))))


def assert_equal(a: Encoded | None, b: Encoded) -> None:
    assert a is not None
    assert torch.equal(a.embeddings, b.embeddings) and a.embeddings.dtype == b.embeddings.dtype
    assert len(a.layers) == len(b.layers)
    assert all(torch.equal(x, y) for x, y in zip(a.layers, b.layers, strict=True))
    assert (a.grid, a.seconds) == (b.grid, b.seconds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_put_is_got_by_another_run(tmp_path: Path, dtype: torch.dtype) -> None:
    made = features(dtype=dtype)
    cache = FeatureCache(tmp_path / "new", "f", 1 << 20)
    key = cache.key("digest", "view 1")
    assert cache.get(key) is None
    cache.put(key, made)
    assert_equal(cache.get(key), made)
    assert_equal(FeatureCache(tmp_path / "new", "f", 0).get(key), made)
    (file,) = (tmp_path / "new").rglob("*.*")
    assert file.parent.name == key[:2] and file.suffix == ".safetensors"


def test_every_fact_is_in_the_key(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, "f", 0)
    keys = {cache.key("a"), cache.key("b"), cache.key("a", "1")}
    keys |= {FeatureCache(tmp_path, "g", 0).key("a")}
    assert len(keys) == 4 and cache.key("a", "1") == cache.key("a", "1")


def test_memory_is_bounded_and_drops_the_longest_unused(tmp_path: Path) -> None:
    one = sum(t.nbytes for t in (features().embeddings, *features().layers))
    cache = FeatureCache(tmp_path, "f", 2 * one)
    for name in "abc":
        cache.put(cache.key(name), features())
        cache.get(cache.key("a"))
        assert cache.size().memory_bytes <= 2 * one
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    held = [name for name in "abc" if cache.get(cache.key(name)) is not None]
    assert held == ["a", "c"]
    cache.put(cache.key("large"), features(rows=100))
    assert cache.size().memory_bytes <= 2 * one


def test_a_slice_does_not_keep_its_batch(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, "f", 1 << 20)
    batch = torch.zeros(1000, 4, requires_grad=True)
    cache.put(cache.key("a"), Encoded(batch[:2], grid=(1, 1, 2)))
    held = cache.get(cache.key("a"))
    assert held is not None and held.embeddings.untyped_storage().nbytes() == 2 * 4 * 4
    assert not held.embeddings.requires_grad


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def turn_a_bit(content: bytes) -> bytes:
    return content[:-20] + bytes([content[-20] ^ 1]) + content[-19:]


@pytest.mark.parametrize("broken", [cut, turn_a_bit, lambda _: b"", lambda _: b"x" * 100])
def test_a_broken_file_is_a_miss_and_is_replaced(tmp_path: Path, broken: Any) -> None:
    cache = FeatureCache(tmp_path, "f", 0)
    key = cache.key("a")
    cache.put(key, features())
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(broken(file.read_bytes()))
    assert cache.get(key) is None
    cache.put(key, features())
    assert_equal(cache.get(key), features())


def test_a_disk_that_refuses_costs_only_the_disk(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = FeatureCache(tmp_path / "file", "f", 1 << 20)
    with pytest.warns(UserWarning, match="free some space"):
        cache.put(cache.key("a"), features())
    assert_equal(cache.get(cache.key("a")), features())


def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    cache = FeatureCache(tmp_path, "f", 0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", interrupt)
        cache.put(cache.key("a"), features())
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert cache.size().entries == 0


def write_and_read(folder: Path, start: Any, results: Any) -> None:
    cache = FeatureCache(folder, "f", 0)
    rows = torch.arange(4000.0).view(1000, 4)
    start.wait()
    for _ in range(100):
        cache.put(cache.key("a"), Encoded(rows, grid=(1, 10, 100)))
        held = cache.get(cache.key("a"))
        if held is None or not torch.equal(held.embeddings, rows):
            results.put("torn")
            return
    results.put("whole")


def test_two_processes_write_the_same_key(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(2), context.Queue()
    writers = [
        context.Process(target=write_and_read, args=(tmp_path, start, results)) for _ in range(2)
    ]
    for writer in writers:
        writer.start()
    assert [results.get(timeout=60) for _ in writers] == ["whole", "whole"]
    for writer in writers:
        writer.join(timeout=60)
        assert writer.exitcode == 0
    assert FeatureCache(tmp_path, "f", 0).size().entries == 1
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1

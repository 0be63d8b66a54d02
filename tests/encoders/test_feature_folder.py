"""The folder of all runs' features: bounded, longest unused first, never emptied under a run."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from plait.encoders.feature_cache import FeatureCache
from plait.encoders.feature_folder import FeatureFolder
from plait.stream import Encoded


def filled(folder: Path, count: int) -> tuple[FeatureCache, list[str]]:
    """A cache with files of 10 kB and more, the first the longest unused."""
    cache = FeatureCache(folder, "f", memory_bytes=0)
    keys = [cache.key(str(number)) for number in range(count)]
    for number, key in enumerate(keys):
        cache.put(key, Encoded(torch.zeros(1, 2500)))
        os.utime(cache.path(key), ns=(number, number))
    return cache, keys


def there(cache: FeatureCache, keys: list[str]) -> list[int]:
    return [number for number, key in enumerate(keys) if cache.get(key) is not None]


def test_the_longest_unused_go_first_and_only_as_many_as_must(tmp_path: Path) -> None:
    cache, keys = filled(tmp_path, 5)
    with FeatureFolder(tmp_path, 60_000) as folder:
        assert folder.make_room(1_000, keep=())
        assert there(cache, keys) == [0, 1, 2, 3, 4]
        folder.touch(cache, [keys[0]])
        assert folder.make_room(25_000, keep=())
        assert there(cache, keys) == [0, 3, 4]


def test_what_a_run_needs_itself_never_goes(tmp_path: Path) -> None:
    cache, keys = filled(tmp_path, 5)
    with FeatureFolder(tmp_path, 60_000) as folder:
        assert folder.make_room(15_000, keep=keys[:4])
        assert there(cache, keys) == [0, 1, 2, 3]
        assert not folder.make_room(45_000, keep=keys[:2]), "even without the others"
        assert there(cache, keys) == [0, 1, 2, 3], "so nothing goes"


HOLDER = (
    "import sys, time; from pathlib import Path; "
    "from plait.encoders.feature_folder import FeatureFolder\n"
    "with FeatureFolder(Path(sys.argv[1]), 60_000):\n"
    "    print('held', flush=True); time.sleep(600)"
)


def test_nothing_goes_under_another_run_until_it_ends_however_it_does(tmp_path: Path) -> None:
    cache, keys = filled(tmp_path, 5)
    words = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == "held\n"
            with FeatureFolder(tmp_path, 60_000) as folder:
                assert not folder.make_room(25_000, keep=())
                assert there(cache, keys) == [0, 1, 2, 3, 4]
                other.kill()
                other.wait()
                assert folder.make_room(25_000, keep=())
                assert there(cache, keys) == [2, 3, 4]
        finally:
            other.kill()

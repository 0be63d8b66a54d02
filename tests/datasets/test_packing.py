"""Packing: every sample once, nothing over a limit, nothing read too far ahead."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from plait.datasets.packing import Unit, best_fit, fill_of, make_units
from plait.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[2]


def random_rows(seed: int) -> tuple[list[int], list[int | None], int, int | None, int]:
    r = np.random.default_rng(seed)
    rows = int(r.integers(0, 300))
    lengths = r.integers(1, 40, rows).tolist()
    groups = [int(g) if g < 40 else None for g in r.integers(0, 90, rows)]
    capacity = int(r.integers(400, 700))
    return lengths, groups, capacity, [None, 12, 30][int(r.integers(3))], int(r.integers(1, 80))


@pytest.mark.parametrize("seed", range(40))
def test_random_lists_with_groups_keep_every_rule(seed: int) -> None:
    lengths, groups, capacity, most, window = random_rows(seed)
    units = make_units(range(len(lengths)), lengths, groups)
    packs = list(best_fit(units, capacity=capacity, max_documents=most, window=window))
    assert sorted(key for pack in packs for key in pack) == list(range(len(lengths)))
    place = {key: number for number, pack in enumerate(packs) for key in pack}
    for pack in packs:
        assert sum(lengths[key] for key in pack) <= capacity
        assert most is None or len(pack) <= most
    for unit in units:
        assert len({place[key] for key in unit.keys}) == 1, "a group stays in one pack"
    again = list(best_fit(units, capacity=capacity, max_documents=most, window=window))
    assert again == packs


@pytest.mark.parametrize("window", [1, 2, 17, 1024])
def test_no_more_than_the_window_is_held_back(window: int) -> None:
    r = np.random.default_rng(window)
    read = 0

    def stream() -> Iterator[Unit[int]]:
        nonlocal read
        for key, length in enumerate(r.integers(1, 90, 3000).tolist()):
            read += 1
            yield Unit((key,), length)

    given, most = 0, 0
    for pack in best_fit(stream(), capacity=100, window=window):
        most = max(most, read - given)
        given += len(pack)
    assert most == window


def test_the_oldest_held_sample_goes_first() -> None:
    r = np.random.default_rng(0)
    units = make_units(range(2000), r.integers(1, 90, 2000).tolist())
    left = set(range(2000))
    for pack in best_fit(units, capacity=100, window=64):
        assert pack[0] == min(left)
        left -= set(pack)


def test_best_fit_closes_the_gap_with_the_longest_that_fits() -> None:
    units = make_units("abcde", [80, 5, 15, 19, 21])
    assert list(best_fit(units, capacity=100)) == [["a", "d"], ["b", "c", "e"]]


def test_a_small_dataset_is_not_sorted_by_length() -> None:
    lengths = np.random.default_rng(1).integers(14, 30, 565)
    packs = list(best_fit(make_units(range(565), lengths.tolist()), capacity=512))
    means = [float(lengths[pack].mean()) for pack in packs[:-2]]
    assert max(means) - min(means) < 6.0
    assert fill_of([int(lengths[p].sum()) for p in packs], 512) > 0.93


def test_an_item_longer_than_the_pack_is_named() -> None:
    with pytest.raises(DataError, match=r"an item longer than the pack: 101 .*row 1") as caught:
        list(best_fit(make_units(range(2), [100, 101]), capacity=100))
    assert caught.value.origin.row == 1
    with pytest.raises(DataError, match="a group of 2 items longer than the pack"):
        list(best_fit(make_units(range(2), [60, 60], ["g", "g"]), capacity=100))
    with pytest.raises(DataError, match="at most 2 documents"):
        list(best_fit(make_units(range(3), [1, 1, 1], [7, 7, 7]), capacity=9, max_documents=2))
    with pytest.raises(DataError, match="at least one position"):
        list(best_fit(make_units(range(1), [0]), capacity=9))


def test_limits_below_one_are_refused() -> None:
    for name in ("capacity", "max_documents", "window"):
        settings = {"capacity": 10, name: 0}
        with pytest.raises(ConfigError, match=name):
            list(best_fit(make_units(range(1), [1]), **settings))


def test_a_group_and_a_row_of_one_name_stay_apart() -> None:
    assert [u.keys for u in make_units([0, 1, 2], [1, 1, 1], [None, 0, 0])] == [(0,), (1, 2)]


def test_fill_counts_the_last_pack_in_full() -> None:
    assert fill_of([10, 5], 10) == 0.75
    assert fill_of([], 10) == 0.0


def test_the_benchmark_reaches_its_fills() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.packing", "--json"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    facts = json.loads(found.stdout.splitlines()[-1])
    for mix, least in {"chat": 0.99, "vlm": 0.99, "video": 0.98}.items():
        assert facts["fill"][mix] >= least
        assert facts["held_back"][mix] <= 1024
    for mix, padded in {"chat": 0.246, "vlm": 0.309, "video": 0.597}.items():
        assert facts["padded_fill"][mix] == pytest.approx(padded, abs=0.003)

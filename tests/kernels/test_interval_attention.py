"""Interval attention against float64, on every mask that a stream needs."""

import pytest
import torch
from torch import Tensor

from plait.kernels.interval_attention import Intervals, interval_attention, naive


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def causal_documents(lengths: list[int]) -> tuple[Tensor, Tensor]:
    starts = torch.tensor([0, *lengths]).cumsum(0)
    lo = torch.cat([torch.full((n,), int(s)) for n, s in zip(lengths, starts, strict=False)])
    return lo, torch.arange(1, sum(lengths) + 1)


def with_group(lo: Tensor, hi: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    hi = hi.clone()
    hi[start:stop] = stop
    return lo, hi


CASES = {
    "one document": causal_documents([7]),
    "one position": causal_documents([1]),
    "many short documents": causal_documents([3, 1, 5, 2, 9, 1, 1, 4]),
    "longer than a tile": causal_documents([300, 5, 270]),
    "group at the start": with_group(*causal_documents([20, 11]), 0, 9),
    "group at the end": with_group(*causal_documents([20, 11]), 25, 31),
    "adjacent groups": with_group(*with_group(*causal_documents([40]), 3, 12), 12, 21),
    "group over a tile's border": with_group(*causal_documents([400]), 200, 330),
    "nothing but a group": with_group(*causal_documents([24]), 0, 24),
}


def random_inputs(length: int, keys: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = [(6, length, 16), (2, keys, 16), (2, keys, 16)]
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("window", [None, 4])
def test_output_and_gradients_equal_the_definition(name: str, window: int | None) -> None:
    intervals = Intervals(*CASES[name])
    q, k, v = random_inputs(len(intervals.lo), len(intervals.lo))
    lo, hi = intervals.bounds(window)
    expected, expected_lse = naive.interval_attention(q, k, v, lo, hi, 0.3)
    out, lse = interval_attention(q, k, v, intervals, scale=0.3, window=window, with_lse=True)
    assert lse is not None
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)

    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    want = torch.autograd.grad((expected * seed).sum() + expected_lse.sum(), [q, k, v])
    have = torch.autograd.grad((out * seed).sum() + lse.sum(), [q, k, v])
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_decoding_over_a_cache_with_a_stretch_per_sequence() -> None:
    intervals = Intervals(torch.tensor([0, 10, 25]), torch.tensor([8, 11, 33]))
    q, k, v = random_inputs(3, 40)
    expected, _ = naive.interval_attention(q, k, v, *intervals.bounds(), 0.25)
    out, _ = interval_attention(q, k, v, intervals)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_document_does_not_see_its_neighbours() -> None:
    intervals = Intervals(*CASES["many short documents"])
    q, k, v = random_inputs(len(intervals.lo), len(intervals.lo))
    out, _ = interval_attention(q, k, v, intervals)
    with torch.no_grad():
        k[:, 4:9] += 3
        v[:, 4:9] += 3
    changed, _ = interval_attention(q, k, v, intervals)
    same = (out == changed).all(-1).all(0)
    assert same[:4].all() and same[9:].all() and not same[4:9].any()


def test_tiles_cover_every_query_once_and_stay_small() -> None:
    for lo, hi in CASES.values():
        tiles = Intervals(lo, hi).tiles()
        assert [t.start for t in tiles[1:]] == [t.stop for t in tiles[:-1]]
        assert tiles[0].start == 0 and tiles[-1].stop == len(lo)
        assert all(t.stop - t.start <= 256 for t in tiles)


def test_one_causal_document_needs_no_mask() -> None:
    (tile,) = Intervals(*causal_documents([200])).tiles()
    assert tile.causal and tile.mask is None


@pytest.mark.parametrize(
    ("lo", "hi"), [([0, 0], [2, 1]), ([1, 0], [2, 2]), ([0, 1], [1, 1]), ([-1, 0], [1, 2])]
)
def test_intervals_that_break_the_rule_are_refused(lo: list[int], hi: list[int]) -> None:
    with pytest.raises(ValueError, match="never decrease"):
        Intervals(torch.tensor(lo), torch.tensor(hi))

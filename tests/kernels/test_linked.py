"""Queries that see a shared stretch besides their own interval, against one long interval."""

import importlib.util

import numpy as np
import pytest
import torch

from plait.kernels.interval_attention import Intervals, Linked, interval_attention

H, G, D = 6, 2, 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUTES = ["naive", "cpu"] if DEVICE == "cpu" else ["naive"]
if importlib.util.find_spec("triton") is not None:
    from plait.kernels.interval_attention import triton as launches

    ROUTES += ["triton"] if DEVICE == "cuda" or launches.INTERPRETED else []


def rows(length: int, seed: int, heads: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(heads, length, D, generator=generator, dtype=torch.float32)


@pytest.mark.parametrize("route", ["cpu", "naive"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_links_equal_copies_of_the_stretch_and_so_do_gradients(
    route: str, softcap: float | None
) -> None:
    """Three sequences of 3, 1 and 2 queries begin with keys 0..7, 0..7 and 0..4 of one prompt."""
    shared, owned, used = 7, [3, 1, 2], [7, 7, 4]
    total = sum(owned)
    q = rows(total, 1, H).requires_grad_()
    k, v = (rows(shared + total, seed, G).requires_grad_() for seed in (2, 3))
    starts = [shared + sum(owned[:i]) for i in range(3)]
    lo = torch.tensor([s for s, n in zip(starts, owned, strict=True) for _ in range(n)])
    hi = torch.arange(shared + 1, shared + total + 1)
    # In the order of their ends, which is not that of the queries.
    order = torch.tensor([4, 5, 0, 1, 2, 3])
    ends = torch.tensor([4, 4, 7, 7, 7, 7])
    linked = Linked(order, Intervals(torch.zeros(6, dtype=torch.long), ends))
    intervals = Intervals(lo, hi, links=(linked,))
    out, lse = interval_attention(q, k, v, intervals, softcap=softcap, route=route)
    seeds = rows(total, 4, H)
    grads = torch.autograd.grad((out * seeds).sum() + lse.sin().sum(), (q, k, v))

    parts, sums, at = [], [], 0
    for start, count, length in zip(starts, owned, used, strict=True):
        keys = torch.cat([torch.arange(length), torch.arange(start, start + count)])
        bounds = Intervals(
            torch.zeros(count, dtype=torch.long), torch.arange(length + 1, length + count + 1)
        )
        made, mine = interval_attention(
            q[:, at : at + count], k[:, keys], v[:, keys], bounds, softcap=softcap, route="naive"
        )
        parts.append(made)
        sums.append(mine)
        at += count
    expected, expected_lse = torch.cat(parts, 1), torch.cat(sums, 1)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)
    loss = (expected * seeds).sum() + expected_lse.sin().sum()
    for mine, right in zip(grads, torch.autograd.grad(loss, (q, k, v)), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("seed", range(4))
def test_any_chain_of_stretches_is_one_long_interval(route: str, seed: int) -> None:
    """Sequences that begin with nothing, one stretch or a stretch of a stretch, in any order; some
    own no key that they see, and some links are empty."""
    generator = np.random.default_rng(seed)
    stops = np.cumsum(generator.integers(4, 20, 5))
    stretches = list(zip([0, *stops[:-1].tolist()], stops.tolist(), strict=True))
    lo, hi, seen, keys = [], [], ([], []), []
    for _ in range(7):
        own, count = int(stops[-1]) + len(lo), int(generator.integers(1, 5))
        chain = generator.permutation(5)[: int(generator.integers(0, 3))]
        for level, number in enumerate(chain):
            start, stop = stretches[number]
            length = int(generator.integers(0, stop - start + 1))
            seen[level].extend((start, start + length, len(lo) + i) for i in range(count))
        before = [torch.arange(a, b) for level in seen for a, b, q in level if q == len(lo)]
        sees = int(generator.integers(0, 2))  # its own positions, or only those before them
        for i in range(count):
            keys.append(torch.cat([*before, torch.arange(own, own + i + sees)]))
        lo += [own] * count
        hi += [own + i + sees for i in range(count)]
    links = []
    for level in seen:
        level.sort()
        first, last, queries = torch.tensor(level).T.contiguous()
        links.append(Linked(queries, Intervals(first, last)))
    q = rows(len(lo), seed, H).to(DEVICE)
    k, v = (rows(int(stops[-1]) + len(lo) + 4, seed + n, G).to(DEVICE) for n in (10, 20))
    intervals = Intervals(torch.tensor(lo), torch.tensor(hi), links=tuple(links))
    out, lse = interval_attention(q, k, v, intervals, route=route)
    for number, mine in enumerate(keys):
        one = Intervals(torch.tensor([0]), torch.tensor([len(mine)]))
        query = q[:, number : number + 1]
        expected = interval_attention(query, k[:, mine], v[:, mine], one, route="naive")
        for made, right in zip((out[:, number], lse[:, number]), expected, strict=True):
            torch.testing.assert_close(made, right[:, 0], rtol=1e-5, atol=1e-5)


def test_links_go_where_their_intervals_go() -> None:
    linked = Linked(torch.tensor([0]), Intervals(torch.tensor([0]), torch.tensor([4])))
    intervals = Intervals(torch.tensor([5]), torch.tensor([6]), route="naive", links=(linked,))
    moved = intervals.to(torch.device("meta"))
    ((queries, more),) = moved.links
    assert {t.device.type for t in (queries, more.lo, more.hi, moved.lo)} == {"meta"}
    assert (moved.route, moved.stop, more.stop) == ("naive", 6, 4)


def test_as_many_queries_as_intervals_are_linked() -> None:
    q, k = rows(2, 0, H), rows(8, 1, G)
    linked = Linked(torch.tensor([0, 1]), Intervals(torch.tensor([0]), torch.tensor([4])))
    own = torch.tensor([5, 6])
    with pytest.raises(ValueError, match="and 1 intervals"):
        interval_attention(q, k, k, Intervals(own, own + 1, links=(linked,)))


def test_a_window_over_links_is_refused() -> None:
    q, k = rows(2, 0, H), rows(4, 1, G)
    linked = Linked(torch.tensor([0]), Intervals(torch.tensor([0]), torch.tensor([2])))
    own = torch.tensor([2, 3])
    intervals = Intervals(own, own + 1, own, links=(linked,))
    with pytest.raises(ValueError, match="a window counts keys in one stretch"):
        interval_attention(q, k, k, intervals, window=2)


def test_keys_of_a_link_must_be_there() -> None:
    q, k = rows(1, 0, H), rows(3, 1, G)
    linked = Linked(torch.tensor([0]), Intervals(torch.tensor([0]), torch.tensor([4])))
    intervals = Intervals(torch.tensor([2]), torch.tensor([3]), links=(linked,))
    with pytest.raises(ValueError, match="end where the keys do"):
        interval_attention(q, k, k, intervals)

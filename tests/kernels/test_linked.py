"""Queries that see a shared stretch besides their own interval, against one long interval."""

import pytest
import torch

from plait.kernels.interval_attention import Intervals, Linked, interval_attention

H, G, D = 6, 2, 16


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

"""Interval attention against float64, on every mask that a stream needs, by every route here."""

from typing import Any

import pytest
import torch
from torch import Tensor

from plait.kernels.interval_attention import Intervals, interval_attention, merge, naive

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUTE = "triton" if DEVICE == "cuda" else "cpu"


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
    "documents of one token": causal_documents([1] * 9),
    "many short documents": causal_documents([3, 1, 5, 2, 9, 1, 1, 4]),
    "longer than a tile": causal_documents([300, 5, 270]),
    "group at the start": with_group(*causal_documents([20, 11]), 0, 9),
    "group at the end": with_group(*causal_documents([20, 11]), 25, 31),
    "adjacent groups": with_group(*with_group(*causal_documents([40]), 3, 12), 12, 21),
    "groups at both ends": with_group(*with_group(*causal_documents([70]), 0, 5), 61, 70),
    "group over a tile's border": with_group(*causal_documents([400]), 200, 330),
    "nothing but a group": with_group(*causal_documents([24]), 0, 24),
    "some see nothing": (torch.tensor([0, 0, 2, 2, 3]), torch.tensor([1, 2, 2, 3, 5])),
    "none sees anything": (torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.long)),
}


def random_inputs(
    length: int, keys: int, dtype: torch.dtype = torch.float32, size: int = 16
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = [(6, length, size), (2, keys, size), (2, keys, size)]
    made = [torch.randn(s, generator=generator) for s in shapes]
    return [t.to(DEVICE, dtype).requires_grad_() for t in made]


def check_against_the_definition(
    bounds: tuple[Tensor, Tensor],
    inputs: list[Tensor],
    route: str,
    *,
    window: int | None = None,
    softcap: float | None = None,
    with_lse: bool = True,
    own: Tensor | None = None,
) -> None:
    """Outputs and all gradients beside float64, to what the dtype holds."""
    intervals = Intervals(*bounds, own=own)
    q, k, v = inputs
    options: dict[str, Any] = {"scale": 0.3, "softcap": softcap}
    lo, hi = (t.to(DEVICE) for t in intervals.bounds(window))
    expected, expected_lse = naive.interval_attention(q, k, v, lo, hi, **options)
    out, lse = interval_attention(q, k, v, intervals, window=window, route=route, **options)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    near = {"rtol": 1e-5, "atol": 1e-5} if q.dtype == torch.float32 else {"rtol": 0, "atol": 0.05}
    torch.testing.assert_close(out.double(), expected, **near)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=2e-3)

    generator = torch.Generator().manual_seed(1)
    above = torch.randn(out.shape, generator=generator).to(DEVICE)
    above_lse = torch.randn(lse.shape, generator=generator).to(DEVICE)
    seen = expected_lse.isfinite()
    loss, made = (expected * above).sum(), (out.float() * above).sum()
    if with_lse:
        loss = loss + (expected_lse[seen] * above_lse[seen]).sum()
        made = made + (lse[seen] * above_lse[seen]).sum()
    want = torch.autograd.grad(loss, inputs)
    have = torch.autograd.grad(made, inputs)
    allowed = 1e-5 if q.dtype == torch.float32 else 1e-2
    for a, b in zip(have, want, strict=True):
        assert a.dtype == b.dtype and (a - b).norm() <= allowed * max(1.0, float(b.norm()))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_output_and_gradients_equal_the_definition(
    name: str, window: int | None, softcap: float | None
) -> None:
    bounds = CASES[name]
    inputs = random_inputs(len(bounds[0]), len(bounds[0]))
    for with_lse in (False, True):
        check_against_the_definition(
            bounds, inputs, ROUTE, window=window, softcap=softcap, with_lse=with_lse
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
def test_halves_and_head_sizes(dtype: torch.dtype, size: int) -> None:
    bounds = CASES["adjacent groups"]
    inputs = random_inputs(40, 40, dtype, size)
    check_against_the_definition(bounds, inputs, ROUTE)
    check_against_the_definition(bounds, inputs, ROUTE, softcap=4.0, with_lse=False)


def test_decoding_over_a_cache_with_a_stretch_per_sequence() -> None:
    bounds = torch.tensor([0, 10, 25]), torch.tensor([8, 11, 33])
    inputs = random_inputs(3, 40)
    check_against_the_definition(bounds, inputs, ROUTE)
    own = torch.tensor([7, 10, 32])
    assert [t.tolist() for t in Intervals(*bounds, own=own).bounds(4)] == [
        [4, 10, 29], [8, 11, 33]
    ]  # fmt: skip
    check_against_the_definition(bounds, inputs, ROUTE, own=own, window=4)


def test_more_queries_than_keys_and_the_reverse() -> None:
    everything = torch.zeros(300, dtype=torch.long), torch.full((300,), 5)
    check_against_the_definition(everything, random_inputs(300, 5), ROUTE)
    few = torch.tensor([0, 100, 300]), torch.tensor([290, 301, 700])
    check_against_the_definition(few, random_inputs(3, 700), ROUTE)


@pytest.mark.parametrize("name", ["longer than a tile", "adjacent groups", "some see nothing"])
def test_every_repetition_gives_the_same_bits(name: str) -> None:
    intervals = Intervals(*CASES[name])
    inputs = random_inputs(intervals.length, intervals.length)

    def run() -> list[Tensor]:
        out, lse = interval_attention(*inputs, intervals, softcap=3.0)  # type: ignore[misc]
        total = out.square().sum() + lse.masked_fill(lse.isinf(), 0).sum()
        return [out, lse, *torch.autograd.grad(total, inputs)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_a_document_does_not_see_its_neighbours() -> None:
    intervals = Intervals(*CASES["many short documents"])
    q, k, v = random_inputs(intervals.length, intervals.length)
    out, _ = interval_attention(q, k, v, intervals)
    with torch.no_grad():
        k[:, 4:9] += 3
        v[:, 4:9] += 3
    changed, _ = interval_attention(q, k, v, intervals)
    same = (out == changed).all(-1).all(0)
    assert same[:4].all() and same[9:].all() and not same[4:9].any()


def two_halves(inputs: list[Tensor], lo: Tensor, hi: Tensor, cut: int) -> tuple[Tensor, Tensor]:
    """The keys before and from `cut` apart, then joined."""
    q, k, v = inputs
    before = Intervals(lo.clamp(max=cut), hi.clamp(max=cut))
    after = Intervals((lo - cut).clamp(min=0), (hi - cut).clamp(min=0))
    first = interval_attention(q, k[:, :cut], v[:, :cut], before)
    second = interval_attention(q, k[:, cut:], v[:, cut:], after)
    return merge(*first, *second)


@pytest.mark.parametrize("name", ["longer than a tile", "some see nothing", "adjacent groups"])
def test_keys_split_in_two_and_merged_are_the_whole(name: str) -> None:
    """Rows that see nothing in one half, in the other and in both are among them."""
    lo, hi = CASES[name]
    inputs = random_inputs(len(lo), len(lo))
    whole, lse = interval_attention(*inputs, Intervals(lo, hi))  # type: ignore[misc]
    made, made_lse = two_halves(inputs, lo, hi, len(lo) // 2)
    torch.testing.assert_close(made, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(made_lse, lse, rtol=1e-5, atol=1e-6)
    above = torch.randn(whole.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    seen = lse.isfinite()
    want = torch.autograd.grad((whole * above).sum() + lse[seen].square().sum(), inputs)
    have = torch.autograd.grad((made * above).sum() + made_lse[seen].square().sum(), inputs)
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_an_attention_sink_is_a_merge() -> None:
    q, k, v = random_inputs(9, 9)
    sink = torch.randn(6, generator=torch.Generator().manual_seed(3)).to(DEVICE).requires_grad_()
    out, lse = interval_attention(q, k, v, Intervals(*causal_documents([9])))
    made, _ = merge(out, lse, torch.zeros_like(out), sink[:, None].expand(6, 9))
    hidden = torch.ones(9, 9, dtype=torch.bool, device=DEVICE).triu(1)
    scores = (q @ k.repeat_interleave(3, 0).transpose(1, 2) / 4).masked_fill(hidden, -torch.inf)
    with_sink = torch.cat([scores, sink[:, None, None].expand(6, 9, 1)], -1).softmax(-1)
    expected = with_sink[..., :-1] @ v.repeat_interleave(3, 0)
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-6)
    inputs = [q, k, v, sink]
    have = torch.autograd.grad(made.square().sum(), inputs)
    want = torch.autograd.grad(expected.square().sum(), inputs)
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_tiles_cover_every_query_once_and_stay_small() -> None:
    for lo, hi in CASES.values():
        for window in (None, 4):
            tiles = Intervals(lo, hi).tiles(window)
            assert [t.start for t in tiles[1:]] == [t.stop for t in tiles[:-1]]
            assert tiles[0].start == 0 and tiles[-1].stop == len(lo)
            assert all(t.stop - t.start <= 256 for t in tiles)


def test_one_causal_document_needs_no_mask() -> None:
    (tile,) = Intervals(*causal_documents([200])).tiles()
    assert tile.causal
    (tile,) = Intervals(*CASES["nothing but a group"]).tiles()
    assert tile.full and not tile.causal


def test_nothing_to_attend() -> None:
    nothing = torch.zeros(0, dtype=torch.long)
    out, lse = interval_attention(*random_inputs(0, 0), Intervals(nothing, nothing))  # type: ignore[misc]
    assert out.shape == (6, 0, 16) and lse.shape == (6, 0)


@pytest.mark.parametrize(
    ("lo", "hi"), [([0, 0], [2, 1]), ([1, 0], [2, 2]), ([0, 2], [1, 1]), ([-1, 0], [1, 2])]
)
def test_intervals_that_break_the_rule_are_refused(lo: list[int], hi: list[int]) -> None:
    with pytest.raises(ValueError, match="never decrease"):
        Intervals(torch.tensor(lo), torch.tensor(hi))


def test_shapes_that_do_not_fit_are_refused() -> None:
    q, k, v = random_inputs(7, 7)
    intervals = Intervals(*CASES["one document"])
    for wrong in ((q[:, :5], k, v), (q[:5], k, v), (q, k[..., :8], v), (q, k, v[:, :3])):
        with pytest.raises(ValueError, match=r"attention needs q \(H, T, D\)"):
            interval_attention(*wrong, intervals)
    with pytest.raises(ValueError, match="of one type on one device"):
        interval_attention(q, k, v.double(), intervals)
    with pytest.raises(ValueError, match="they end at 7, and there are 6 keys"):
        interval_attention(q, k[:, :6], v[:, :6], intervals)
    with pytest.raises(ValueError, match="give the intervals their `own`"):
        interval_attention(q, *random_inputs(7, 9)[1:], intervals, window=3)
    with pytest.raises(ValueError, match="own key at least; got -3"):
        interval_attention(q, k, v, intervals, window=-3)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_values_of_a_head_need_not_lie_behind_one_another(softcap: float | None) -> None:
    bounds = CASES["one document"]
    length = len(bounds[0])
    inputs = [t.detach().mT.contiguous().mT.requires_grad_() for t in random_inputs(length, length)]
    assert all(t.stride(-1) != 1 for t in inputs)
    for with_lse in (False, True):
        check_against_the_definition(bounds, inputs, ROUTE, softcap=softcap, with_lse=with_lse)


def test_a_route_can_be_forced_and_says_why_it_cannot() -> None:
    q, k, v = random_inputs(7, 7)
    intervals = Intervals(*CASES["one document"])
    plain, _ = interval_attention(q, k, v, intervals)
    for forced in ({"route": "naive"}, {}):
        chosen = intervals if forced else Intervals(*CASES["one document"], route="naive")
        out, _ = interval_attention(q, k, v, chosen, **forced)  # type: ignore[arg-type]
        assert not torch.equal(out, plain)  # float64 inside
        torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"one of auto, cpu, triton, flash, naive; got 'best'"):
        interval_attention(q, k, v, intervals, route="best")
    with pytest.raises(ValueError, match=r"cannot take the route 'flash': .*; use auto"):
        interval_attention(q, k, v, intervals, route="flash")

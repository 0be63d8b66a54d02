"""The Triton kernels of interval attention: interpreted here, compiled where there is a GPU.

Tiles are as small as the kernels allow, so that short rows walk all three loops.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from plait.kernels.interval_attention import Intervals, interval_attention, naive

pytest.importorskip("triton")

from plait.kernels.interval_attention import triton as launches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not launches.INTERPRETED,
    reason="no GPU, and Triton was loaded without TRITON_INTERPRET=1",
)

TILES = launches.Tiles(16, 16, 4, 1)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = launches.Plan(TILES, TILES._replace(keys=32), TILES._replace(queries=32))
    monkeypatch.setattr(launches, "plan_for", lambda *_: plan)


def documents(lengths: list[int], groups: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Causal documents one after another, in which each group sees itself both ways."""
    starts = torch.tensor([0, *lengths]).cumsum(0)
    lo = torch.cat([torch.full((n,), int(s)) for n, s in zip(lengths, starts, strict=False)])
    hi = torch.arange(1, sum(lengths) + 1)
    for start, stop in groups:
        hi[start:stop] = stop
    return lo, hi


CASES = {
    "one position": documents([1], []),
    "documents of one token": documents([1] * 5, []),
    "a long document": documents([75], []),
    "documents and groups": documents([50, 1, 40], [(0, 7), (20, 45), (45, 50), (80, 91)]),
    "nothing but a group": documents([49], [(0, 49)]),
    "some see nothing": (torch.tensor([0, 0, 2, 2, 3]), torch.tensor([1, 2, 2, 3, 5])),
}


def inputs_of(length: int, keys: int, dtype: torch.dtype, size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = [(length, 4, size), (keys, 2, size), (keys, 2, size)]
    made = [torch.randn(s, generator=generator).to(DEVICE, dtype) for s in shapes]
    # Heads inside positions, as a model's projections give them.
    return [t.transpose(0, 1).requires_grad_() for t in made]


def check(
    bounds: tuple[Tensor, Tensor], inputs: list[Tensor], own: Tensor | None = None, **options: Any
) -> None:
    window = options.pop("window", None)
    intervals = Intervals(*bounds, own=own)
    lo, hi = (t.to(DEVICE) for t in intervals.bounds(window))
    expected, expected_lse = naive.interval_attention(*inputs, lo, hi, 0.2, **options)  # type: ignore[misc]
    out, lse = interval_attention(
        *inputs,
        intervals,
        scale=0.2,
        window=window,
        route="triton",
        **options,  # type: ignore[misc]
    )
    single = out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5 if single else 0.05)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=2e-5)
    generator = torch.Generator().manual_seed(1)
    above = torch.randn(out.shape, generator=generator).to(DEVICE)
    above_lse = torch.randn(lse.shape, generator=generator).to(DEVICE)
    seen = expected_lse.isfinite()
    for with_lse in (False, True):
        loss, made = (expected * above).sum(), (out.float() * above).sum()
        if with_lse:
            loss = loss + (expected_lse[seen] * above_lse[seen]).sum()
            made = made + (lse[seen] * above_lse[seen]).sum()
        want = torch.autograd.grad(loss, inputs, retain_graph=True)
        have = torch.autograd.grad(made, inputs, retain_graph=True)
        for a, b in zip(have, want, strict=True):
            assert (a - b).norm() <= (1e-5 if single else 1e-2) * max(1.0, float(b.norm()))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (9, None), (None, 2.0), (9, 2.0)])
@pytest.mark.usefixtures("small_tiles")
def test_output_and_gradients_equal_the_definition(
    name: str, window: int | None, softcap: float | None
) -> None:
    lo, hi = CASES[name]
    check((lo, hi), inputs_of(len(lo), len(lo), torch.float32, 16), window=window, softcap=softcap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
def test_dtypes_and_head_sizes(dtype: torch.dtype, size: int) -> None:
    """At the tiles that this machine would take."""
    check(documents([30, 7], [(3, 20)]), inputs_of(37, 37, dtype, size))


@pytest.mark.usefixtures("small_tiles")
def test_queries_and_keys_of_different_length() -> None:
    stretches = torch.tensor([0, 10, 25]), torch.tensor([8, 11, 33])
    check(stretches, inputs_of(3, 40, torch.float32, 16))
    own = torch.tensor([7, 10, 32])
    check(stretches, inputs_of(3, 40, torch.float32, 16), own=own, window=4)
    everything = torch.zeros(70, dtype=torch.long), torch.full((70,), 5)
    check(everything, inputs_of(70, 5, torch.float32, 16))


@pytest.mark.usefixtures("small_tiles")
def test_rows_too_far_apart_for_the_kernels_are_brought_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launches, "OFFSETS", 37 * 16 * 2)  # as if this were two billion
    inputs = [t.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
              for t in inputs_of(37, 37, torch.float32, 16)]  # fmt: skip
    assert launches._readable(inputs[0]) is not inputs[0]
    check(documents([30, 7], [(3, 20)]), inputs)


@pytest.mark.usefixtures("small_tiles")
def test_every_repetition_gives_the_same_bits() -> None:
    lo, hi = CASES["documents and groups"]
    inputs = inputs_of(len(lo), len(lo), torch.float32, 16)

    def run() -> list[Tensor]:
        made = interval_attention(*inputs, Intervals(lo, hi), route="triton")  # type: ignore[misc]
        total = made[0].square().sum() + made[1].sum()
        return [*made, *torch.autograd.grad(total, inputs)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("window", [None, 9])
def test_the_loops_meet_every_pair_that_is_seen_and_call_none_full_that_is_not(
    name: str, window: int | None
) -> None:
    intervals = Intervals(*CASES[name])
    lo, hi = intervals.bounds(window)
    count = keys = len(lo)
    keys = max(keys, int(hi.max()))
    seen = (torch.arange(keys) >= lo[:, None]) & (torch.arange(keys) < hi[:, None])
    for block_q, block_k in ((16, 32), (32, 16), (16, 16)):
        blocks = intervals.block_map(window, keys, block_q, block_k)
        for table, mask, own, other in (
            (blocks.queries, seen, block_q, block_k), (blocks.keys, seen.T, block_k, block_q)
        ):  # fmt: skip
            assert len(table) == -(-len(mask) // own) and (table.diff(dim=1) >= 0).all()
            for number, (start, full_lo, full_hi, stop) in enumerate(table.tolist()):
                rows = mask[number * own : (number + 1) * own]
                assert not any(value % other for value in (start, full_lo, full_hi, stop))
                assert not rows[:, :start].any() and not rows[:, stop:].any()
                assert (rows[:, full_lo:full_hi].all() and full_hi <= max(count, keys)) or (
                    full_lo == full_hi
                )


def test_a_refusal_says_what_the_kernels_do_not_read() -> None:
    assert launches.refusal(torch.zeros(1, 1, 64, device=DEVICE)) is None
    wide = launches.refusal(torch.zeros(1, 1, 300, device=DEVICE))
    assert wide is not None and "300 values" in wide
    double = launches.refusal(torch.zeros(1, 1, 64, device=DEVICE, dtype=torch.float64))
    assert double is not None and "float64" in double

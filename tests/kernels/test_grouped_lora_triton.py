"""The Triton kernels of grouped LoRA against float64: interpreted, or on the GPU where one is.

Needs nothing but torch, triton, numpy and pytest. TRITON_INTERPRET must be set before Triton is
first imported; `tests/conftest.py` does where there is no GPU.
"""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from plait.kernels.grouped_lora import Segments, grouped_lora, naive  # noqa: E402

RANKS = [1, 4, 8, 16, 17]
SCALES = [2.0, 0.5, 1.0, -1.5, 0.25]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 5e-3}
"""Relative norms. Products of 16-bit rows are TF32 on a GPU, and results are rounded."""

Row = tuple[list[tuple[int, int]], list[int | None], int]
CASES: dict[str, Row] = {
    "every adapter once": ([(0, 9), (9, 30), (30, 31), (31, 70), (70, 77)], [0, 1, 2, 3, 4], 77),
    "scattered, more than a block": (
        [(0, 50), (50, 52), (52, 100), (100, 101), (101, 140)], [3, 0, 3, 4, 3], 140,
    ),
    "base alone, gaps and empty stretches": (
        [(2, 4), (4, 4), (4, 10), (10, 13)], [0, 2, None, 4], 20,
    ),
    "whole blocks": ([(0, 64), (64, 128)], [1, 1], 128),
    "one position": ([(0, 1)], [4], 1),
    "no adapter at all": ([(0, 7)], [None], 7),
}  # fmt: skip


class Inputs:
    """Random x, base and factors for the five adapters."""

    def __init__(
        self,
        length: int,
        inputs: int,
        outputs: int,
        dtype: torch.dtype = torch.float32,
        ranks: list[int] = RANKS,
    ) -> None:
        generator = torch.Generator().manual_seed(length)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.scales = SCALES[: len(ranks)]
        self.x = draw(length, inputs).to(DEVICE, dtype).requires_grad_()
        self.base = draw(length, outputs).to(DEVICE, dtype).requires_grad_()
        self.a = [(draw(r, inputs) / 4).to(DEVICE).requires_grad_() for r in ranks]
        self.b = [(draw(outputs, r) / 4).to(DEVICE).requires_grad_() for r in ranks]
        self.seed = draw(length, outputs).to(DEVICE, dtype)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, self.base, *self.a, *self.b]

    def run(self, row: Row) -> tuple[Tensor, list[Tensor | None]]:
        out = grouped_lora(
            self.x, self.base, self.a, self.b, self.scales, Segments(*row), route="triton"
        )
        return out, self.gradients(out)

    def truth(self, row: Row) -> tuple[Tensor, list[Tensor | None]]:
        out = naive.grouped_lora(self.x, self.base, self.a, self.b, self.scales, *row[:2])
        return out, self.gradients(out)

    def gradients(self, out: Tensor) -> list[Tensor | None]:
        return list(torch.autograd.grad((out * self.seed).sum(), self.leaves, allow_unused=True))

    def check(self, row: Row, tolerance: float) -> None:
        (out, have), (true_out, want) = self.run(row), self.truth(row)
        pairs: list[tuple[Tensor, Tensor | None, Tensor]] = [(self.base, out, true_out)]
        for leaf, mine, true in zip(self.leaves, have, want, strict=True):
            pairs.append((leaf, mine, torch.zeros_like(leaf) if true is None else true))
        for like, mine, true in pairs:
            assert mine is not None and mine.isfinite().all()
            assert mine.dtype == like.dtype and mine.shape == like.shape
            difference = (mine.double() - true.double()).norm()
            assert difference <= tolerance * true.double().norm() + 1e-12


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("inputs", "outputs"), [(19, 33), (160, 131)])
def test_output_and_gradients_equal_the_definition(name: str, inputs: int, outputs: int) -> None:
    row = CASES[name]
    Inputs(row[2], inputs, outputs).check(row, TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_row_keeps_float32_factors(dtype: torch.dtype) -> None:
    row = CASES["scattered, more than a block"]
    Inputs(row[2], 40, 70, dtype).check(row, TOLERANCE[dtype])


def test_rows_that_are_not_contiguous() -> None:
    inputs = Inputs(30, 20, 33)
    segments = Segments([(0, 30)], [4], 30)
    rest: list[Any] = [inputs.base, inputs.a, inputs.b, inputs.scales, segments, "triton"]
    wide = torch.cat([inputs.x, inputs.x], 1)[:, :20]
    assert torch.equal(grouped_lora(wide, *rest), grouped_lora(inputs.x, *rest))


@pytest.mark.parametrize("ranks", [[64, 8], [100], [256, 1, 3]])
def test_large_ranks(ranks: list[int]) -> None:
    adapters: list[int | None] = [0, len(ranks) - 1]
    Inputs(75, 40, 24, ranks=ranks).check(([(0, 70), (70, 75)], adapters, 75), 2e-6)


def test_an_adapter_without_positions_has_a_gradient_of_exact_zero() -> None:
    _, found = Inputs(12, 19, 33).run(([(0, 12)], [3], 12))
    for g in (0, 1, 2, 4):
        for gradient in (found[2 + g], found[2 + len(RANKS) + g]):
            assert gradient is not None and not gradient.any()


def test_repetitions_give_the_same_bits() -> None:
    row = CASES["scattered, more than a block"]
    runs = [Inputs(row[2], 40, 70).run(row) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0])
    for mine, first in zip(runs[0][1], runs[1][1], strict=True):
        assert mine is not None and first is not None and torch.equal(mine, first)


def test_a_rank_beyond_the_largest_is_refused_where_triton_is_forced() -> None:
    inputs = Inputs(5, 19, 33, ranks=[257])
    with pytest.raises(ValueError, match="ranks up to 256; got 257"):
        inputs.run(([(0, 5)], [0], 5))


def test_the_block_map_covers_every_position_of_an_adapter_once() -> None:
    bounds, adapters, length = CASES["scattered, more than a block"]
    segments = Segments(bounds, adapters, length)
    order, blocks, ranges = segments.blocks(torch.device("cpu"), 64, 5)
    owner = [adapters[i] for i, (a, b) in enumerate(bounds) for _ in range(a, b)]
    seen: list[int] = []
    for first, held, adapter in blocks.tolist():
        assert 0 < held <= 64
        positions = order[first : first + held].tolist()
        assert {owner[p] for p in positions} == {adapter}
        seen += positions
    assert sorted(seen) == list(range(length))
    assert ranges[:, 1].tolist() == [owner.count(g) for g in range(5)]
    assert segments.blocks(torch.device("cpu"), 64, 5) is segments.blocks(
        torch.device("cpu"), 64, 5
    )

"""Native products of a few rows against float64, at every level of instructions that is here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

sgl_kernel = pytest.importorskip("sgl_kernel")

from sgl_kernel import Isa, KernelError, cpu_isa, linear  # noqa: E402

LEVELS = [isa for isa in Isa if isa <= cpu_isa() and (isa != Isa.NEON or cpu_isa() == Isa.NEON)]
# Half a unit in the last place, relative: the one rounding at the end.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def operands(
    rows: int, outs: int, width: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * 1000 + outs + width)
    x = torch.randn(rows, width, generator=generator)
    weight = torch.randn(outs, width, generator=generator) / width**0.5
    return x.to(dtype), weight.to(dtype), torch.randn(outs, generator=generator).to(dtype)


def check(
    found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    want = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert found.dtype is x.dtype
    torch.testing.assert_close(
        found.double(), want, rtol=1.01 * ROUNDING[x.dtype], atol=2e-6 if x.shape[1] < 512 else 1e-5
    )


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize(
    ("rows", "outs", "width"),
    [(1, 1, 1), (1, 8, 16), (1, 37, 100), (2, 4, 7), (3, 13, 33), (8, 64, 64), (31, 97, 576)],
)
def test_products(rows: int, outs: int, width: int, dtype: torch.dtype, isa: Isa) -> None:
    x, weight, bias = operands(rows, outs, width, dtype)
    check(linear(x, weight, isa=isa), x, weight, None)
    check(linear(x, weight, bias, isa=isa, num_threads=2), x, weight, bias)


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("rows", [1, 5])
def test_many_outputs_are_cut_into_tasks(rows: int, dtype: torch.dtype) -> None:
    x, weight, bias = operands(rows, 5003, 576, dtype)
    found = linear(x, weight, bias, num_threads=2)
    check(found, x, weight, bias)
    assert torch.equal(found, linear(x, weight, bias)), "threads changed a result"


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize(
    ("rows", "outs"),
    [(rows, outs) for rows in (1, 2, 3, 4, 7, 33) for outs in (5, 8, 13)] + [(70, 600), (130, 37)],
)
def test_wide_rows(rows: int, outs: int, isa: Isa) -> None:
    """More inputs than the kernels take at a time."""
    x, weight, bias = operands(rows, outs, 4871, torch.bfloat16)
    check(linear(x, weight, bias, isa=isa), x, weight, bias)


# Levels and types whose kernels add up in an order of their own for each row.
INVARIANT = [
    (isa, dtype)
    for isa in LEVELS
    for dtype in ROUNDING
    if isa == Isa.AVX2 or (Isa.AVX512_BF16 <= isa <= Isa.AMX and dtype is torch.bfloat16)
]


@pytest.mark.parametrize(("isa", "dtype"), INVARIANT)
@pytest.mark.parametrize("outs", [23, 81])
@pytest.mark.parametrize("width", [40, 576, 4871])
def test_a_rows_answer_does_not_depend_on_the_others(
    width: int, outs: int, isa: Isa, dtype: torch.dtype
) -> None:
    x, weight, bias = operands(140, outs, width, dtype)
    alone = torch.cat([linear(row[None], weight, bias, isa=isa) for row in x])
    for count in (2, 3, 4, 5, 6, 7, 8, 9, 10, 16, 17, 33, 48, 70, 140):
        assert torch.equal(linear(x[:count], weight, bias, isa=isa), alone[:count])
    others = linear(x[1:], weight, bias, isa=isa, num_threads=2)
    assert torch.equal(others, alone[1:])


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_more_rows_than_are_widened_at_a_time(dtype: torch.dtype, isa: Isa) -> None:
    x, weight, bias = operands(500, 20, 9000, dtype)
    found = linear(x, weight, bias, isa=isa, num_threads=2)
    check(found[470:], x[470:], weight, bias)
    check(found[:30], x[:30], weight, bias)
    assert found.isfinite().all()


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 40, 65, 130])
@pytest.mark.parametrize("outs", [3, 16, 31, 33, 64, 95])
def test_heights_and_widths_around_a_tile(outs: int, rows: int, isa: Isa) -> None:
    for width in (32, 33, 95):
        x, weight, bias = operands(rows, outs, width, torch.bfloat16)
        check(linear(x, weight, bias, isa=isa), x, weight, bias)
        check(linear(x, weight, isa=isa, num_threads=2), x, weight, None)


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("rows", [1, 8, 40])
def test_strided_rows_and_parts_of_a_weight(rows: int, isa: Isa) -> None:
    x, weight, bias = operands(2 * rows, 40, 96, torch.bfloat16)
    # What stands beside the parts would show in any sum that it entered.
    for around in (x[:, :16], x[:, 67:], x[1::2], weight[:3], weight[38:], weight[:, :16]):
        around.fill_(float("nan"))
    weight[:, 67:] = float("nan")
    some, part = x[::2, 16:67], weight[3:38, 16:67]
    check(linear(some, part, bias[3:38], isa=isa), some, part, bias[3:38])


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinity_and_nan_stay_where_they_are(dtype: torch.dtype, isa: Isa) -> None:
    x, weight, _ = operands(3, 9, 40, dtype)
    x[1, 39] = float("inf")
    weight[4, 0] = float("nan")
    found = linear(x, weight, isa=isa)
    assert found[:, 4].isnan().all()
    others = found[:, [0, 1, 2, 3, 5, 6, 7, 8]]
    assert others[[0, 2]].isfinite().all()
    assert others[1].isinf().all()


def test_no_rows_and_no_outputs() -> None:
    x, weight, _ = operands(3, 4, 8, torch.float32)
    assert linear(x[:0], weight).shape == (0, 4)
    assert linear(x, weight[:0]).shape == (3, 0)


def test_what_is_not_served_is_said() -> None:
    x, weight, bias = operands(2, 4, 8, torch.float32)
    with pytest.raises(KernelError, match="does not serve"):
        linear(x.double(), weight.double())
    with pytest.raises(KernelError, match="does not serve"):
        linear(x, weight.bfloat16())
    with pytest.raises(KernelError, match="does not serve"):
        linear(x, weight[:, :4])
    with pytest.raises(KernelError, match="contiguous"):
        linear(x, weight.t().contiguous().t())
    with pytest.raises(KernelError, match="bias"):
        linear(x, weight, bias[:3])

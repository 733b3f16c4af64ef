"""Products by way of float32 equal float64 to one rounding, however the weight is cut."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from sglang.srt.layers import products

HALF_UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}


def operands(
    rows: int, out: int, width: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * 100 + out)
    x = torch.randn(rows, width, generator=generator)
    weight, bias = (
        torch.randn(out, width, generator=generator),
        torch.randn(out, generator=generator),
    )
    return x.to(dtype), (weight / width**0.5).to(dtype), bias.to(dtype)


def close_to_one_rounding(
    found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    want = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert found.dtype is x.dtype
    unit = HALF_UNIT[x.dtype]
    torch.testing.assert_close(found.double(), want, rtol=1.01 * unit, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("rows", "out"), [(1, 1), (5, 7), (8, 100), (31, 64), (70, 129)])
def test_widened_products(
    rows: int, out: int, with_bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_TILE_ELEMENTS", 32 * 48)  # 32 outputs a tile
    monkeypatch.setattr(products, "_TILE_ROWS", 16)
    x, weight, bias = operands(rows, out, 48, dtype)
    chosen = bias if with_bias else None
    close_to_one_rounding(products.widened_linear(x, weight, chosen), x, weight, chosen)


def test_a_weight_wider_than_a_tile_goes_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_TILE_ELEMENTS", 10)
    x, weight, bias = operands(9, 5, 48, torch.bfloat16)
    close_to_one_rounding(products.widened_linear(x, weight, bias), x, weight, bias)


def test_leading_dimensions_and_views_are_kept() -> None:
    x, weight, bias = operands(24, 10, 32, torch.bfloat16)
    folded = x.view(2, 12, 32)[:, ::2]
    found = products.widened_linear(folded, weight[2:8], bias[2:8])
    assert found.shape == (2, 6, 6)
    close_to_one_rounding(found, folded, weight[2:8], bias[2:8])


class Kernels:
    """Stands in for sgl_kernel and notes how many rows it was given."""

    def __init__(self, isa: str) -> None:
        self.rows: list[int] = []
        self._isa = isa

    def is_recording(self) -> bool:
        return False

    def cpu_isa(self) -> SimpleNamespace:
        return SimpleNamespace(name=self._isa)

    def linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        num_threads: int,
    ) -> torch.Tensor:
        assert num_threads == torch.get_num_threads()
        self.rows.append(len(x))
        return F.linear(x, weight, bias)


@pytest.mark.parametrize(
    ("rows", "dtype", "fast", "isa", "way"),
    [
        (32, torch.bfloat16, False, "AVX2", "native"),
        (1, torch.float32, False, "AVX2", "native"),
        (600, torch.bfloat16, False, "AVX2", "native"),
        (600, torch.float16, False, "AVX2", "native"),
        (512, torch.float32, False, "AVX2", "native"),
        (513, torch.float32, False, "AVX2", "torch"),
        (32, torch.bfloat16, False, "GENERIC", "native"),
        (33, torch.bfloat16, False, "GENERIC", "widened"),
        (33, torch.float32, False, "NEON", "torch"),
        (8, torch.bfloat16, False, None, "widened"),
        (7, torch.bfloat16, False, None, "torch"),
        (1, torch.bfloat16, True, "AVX512", "native"),
        (2, torch.bfloat16, True, "AVX512", "torch"),
        (64, torch.bfloat16, True, "AVX512_BF16", "native"),
        (65, torch.bfloat16, True, "AVX512_BF16", "torch"),
        (8, torch.float32, True, "AVX512_BF16", "native"),
        (9, torch.float32, True, "AVX512_BF16", "torch"),
        (1, torch.float16, True, "AVX512_BF16", "torch"),
        (128, torch.bfloat16, True, "AMX", "native"),
        (129, torch.bfloat16, True, "AMX", "torch"),
        (8, torch.float32, True, "AMX", "native"),
        (9, torch.float32, True, "AMX", "torch"),
        (1, torch.float16, True, "AMX", "torch"),
        (1, torch.float32, True, "AVX512", "torch"),
        (8, torch.bfloat16, True, None, "torch"),
    ],
)
def test_which_way_a_product_takes(
    rows: int,
    dtype: torch.dtype,
    fast: bool,
    isa: str | None,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    native, widened = Kernels(isa or ""), []
    real = products.widened_linear

    def note(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        widened.append(x.numel() // x.shape[-1])
        return real(x, weight, bias)

    monkeypatch.setattr(products, "cpu_multiplies", lambda t: fast or t is torch.float32)
    monkeypatch.setattr(products, "kernels_for", lambda *_: native if isa else None)
    monkeypatch.setattr(products, "widened_linear", note)
    x, weight, bias = operands(rows, 16, 32, dtype)
    found = products.linear(x.view(1, rows, 32), weight, bias)
    assert found.shape == (1, rows, 16)
    close_to_one_rounding(found[0], x, weight, bias)
    assert native.rows == ([rows] if way == "native" else [])
    assert widened == ([rows] if way == "widened" else [])


def test_every_processor_multiplies_float32() -> None:
    assert products.cpu_multiplies(torch.float32)

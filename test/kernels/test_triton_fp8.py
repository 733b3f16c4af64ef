"""Weights of E4M3 in Triton's interpreter: exact codes, and rows that are rounded as well."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from kernels.quantized_cases import E4M3, drawn_codes, numbers
from sgl_kernel.triton import ExpertCodes, GroupedTile, QuantizedWeight, mixture
from sgl_kernel.triton.quantized import default_tile
from sgl_kernel.triton.rounded import round_rows

GROUPS = [0, 64, 96]
HIGH = GroupedTile(64, 16, 64)


def make(group: int, outs: int, width: int, gain: float = 1.0) -> QuantizedWeight:
    return QuantizedWeight(*drawn_codes((E4M3, group, False, None), outs, width, gain))


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def as_codes(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What PyTorch rounds x to, and the scales."""
    pieces = x.float().split(group or x.shape[1], 1)
    most = [piece.abs().amax(1, keepdim=True) for piece in pieces]
    scales = [torch.where(one == 0, 1.0, one / 448) for one in most]
    codes = [(p / s).to(torch.float8_e4m3fn) for p, s in zip(pieces, scales, strict=True)]
    return torch.cat(codes, 1), torch.cat(scales, 1)


def rounded(x: torch.Tensor, group: int) -> torch.Tensor:
    codes, scales = as_codes(x, group)
    wide = scales.double().repeat_interleave(group or x.shape[1], 1)[:, : x.shape[1]]
    return codes.double() * wide


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_weight_is_rounded(dtype: torch.dtype, group: int) -> None:
    weight = make(group, 19, 224, gain=0.25)
    x = drawn(5, 224, dtype=dtype)
    wide = numbers(weight)
    want, terms = x.double() @ wide.t(), x.double().abs() @ wide.abs().t()
    found = weight.multiply(x, tile=GroupedTile(16, 16, 64))
    of_the_answer = {torch.float32: 0.0, torch.bfloat16: 2.0**-7}[dtype]
    assert ((found.double() - want).abs() <= of_the_answer * want.abs() + 1e-6 * terms).all()


def test_every_code() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256).view(torch.float8_e4m3fn)
    weight = QuantizedWeight(codes, torch.full((1, 1), 0.75))
    want = codes.float() * 0.75
    found = weight.dequantize(torch.float32)
    torch.testing.assert_close(found, want, rtol=0, atol=0, equal_nan=True)
    for rows in (1, 3):
        assert weight.multiply(torch.ones(rows, 256)).isnan().all()


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_as_codes(dtype: torch.dtype, group: int) -> None:
    x = drawn(6, 227, dtype=dtype)[:, 3:] * 3
    x[1], x[2, 70] = 0, -900.0
    x[4] *= 1e-20
    found, (codes, scales) = round_rows(x, group), as_codes(x, group)
    assert torch.equal(found.scales, scales)
    assert torch.equal(found.codes.view(torch.uint8), codes.view(torch.uint8))
    for lost in (float("nan"), float("inf")):
        x[3, 5] = lost
        again = round_rows(x, group)
        wide = again.codes[3, :64].float() * again.scales[3, 0]
        assert not wide.isfinite().all()


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_rounded_rows(dtype: torch.dtype, group: int) -> None:
    """Where it is asked for, and only on tiles of many rows."""
    weight = make(group, 21, 224, gain=0.25)
    x, bias = drawn(6, 224, dtype=dtype), drawn(21, dtype=dtype)
    exact = weight.multiply(x, bias, tile=HIGH)
    few = weight.multiply(x, bias)
    weight.rounds_inputs = True
    assert weight.rows(0, 3).rounds_inputs
    found = weight.multiply(x, bias, tile=HIGH)
    near, wide = rounded(x, group), numbers(weight)
    want = near @ wide.t() + bias.double()
    terms = near.abs() @ wide.abs().t() + bias.double().abs()
    of_the_answer = {torch.float32: 0.0, torch.bfloat16: 2.0**-7}[dtype]
    assert ((found.double() - want).abs() <= of_the_answer * want.abs() + 1e-6 * terms).all()
    assert not torch.equal(found, exact)
    assert torch.equal(weight.multiply(x, bias), few)
    tiles = [default_tile(rows, 8, dtype) for rows in (2, 32, 33, 64, 65, 900)]
    assert [weight.rounded(x, tile) is None for tile in tiles] == [True, True] + 4 * [False]


@pytest.mark.parametrize("scale_inputs", [False, True])
def test_experts_of_rounded_rows(scale_inputs: bool) -> None:
    num_experts, hidden, width, tokens = 2, 96, 64, 6
    gate, up = (make(64, num_experts * width, hidden, 2.0**-9) for _ in range(2))
    down = make(0, num_experts * hidden, width, 2.0**-9)
    for weight in (gate, up, down):
        weight.rounds_inputs = True
    x = drawn(tokens, hidden)
    experts = torch.arange(tokens).remainder(2)[:, None].contiguous()
    shares = torch.rand(tokens, 1, generator=torch.Generator().manual_seed(2)) + 0.5
    found = mixture(
        *(x, experts, shares),
        (ExpertCodes(gate, width, 0, width), ExpertCodes(up, width, 0, width)),
        ExpertCodes(down, hidden, 0, hidden),
        num_experts=num_experts,
        scale_inputs=scale_inputs,
        tile=HIGH,
    )
    near, chosen = rounded(x, 64), experts[:, 0]
    if scale_inputs:
        near *= shares.double()
    wide = [numbers(one).view(num_experts, -1, one.shape[1])[chosen] for one in (gate, up, down)]
    opened = [(one @ near.unsqueeze(-1)).squeeze(-1) for one in wide[:2]]
    inner = (torch.nn.functional.silu(opened[0]) * opened[1]).float()
    want = (wide[2] @ rounded(inner, 0).unsqueeze(-1)).squeeze(-1)
    want = want if scale_inputs else want * shares.double()
    # A number of `inner` that lies at the middle of two codes may be rounded the other way.
    error = (found.double() - want).abs()
    assert error.median() <= 1e-5 * want.abs().max()
    assert error.max() <= 0.02 * want.abs().max()
    exact = rounded(x, 64) - x.double()
    assert exact.abs().max() > 0

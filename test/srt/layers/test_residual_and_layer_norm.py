"""The residual sum and the layer norm: on tapes the same numbers as without."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from sglang.srt.layers.centred_norm import BiaslessLayerNorm
from sglang.srt.layers.residual import ResidualSum, begin_residual
from sglang.srt.utils.native import native_kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HIDDEN = 200
Pair = tuple[torch.Tensor, torch.Tensor]


def rows(dtype: torch.dtype, mean: float = 0.0) -> Pair:
    """New rows and a residual stream with large numbers, as models have them."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(5, HIDDEN, generator=generator) * 30 + mean
    residual = torch.randn(5, HIDDEN, generator=generator) * 100 + mean
    return x.to(dtype), residual


def played(work: Callable[[Pair], Pair], dtype: torch.dtype) -> Pair:
    """What a tape of `work` makes of `rows`, played after it was recorded of other rows."""
    kernels = native_kernels()
    if kernels is None:
        pytest.skip("sgl-kernel is not installed")
    new = rows(dtype, mean=7.0)
    pair = (torch.zeros_like(new[0]), torch.ones_like(new[1]))
    tape = kernels.Tape(kernels.Arena(1 << 20))
    with kernels.record(tape):
        out = work(pair)
    for here, there in zip(pair, new, strict=True):
        here.copy_(there)
    tape.play(1)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_recorded_sum_is_the_sum(dtype: torch.dtype) -> None:
    layer = ResidualSum(HIDDEN, dtype=dtype)
    x, residual = rows(dtype, mean=7.0)
    for rounded, total in (layer(x, residual), played(lambda pair: layer(*pair), dtype)):
        assert total.dtype is torch.float32
        assert torch.equal(total, x + residual)
        assert torch.equal(rounded, (x + residual).to(dtype))
    assert torch.equal(begin_residual(x), x.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm(dtype: torch.dtype) -> None:
    norm = BiaslessLayerNorm(HIDDEN, 1e-5, dtype=dtype)
    norm.weight_loader("weight", torch.linspace(0.5, 1.5, HIDDEN))
    x, residual = rows(dtype, mean=7.0)
    exact = F.layer_norm((x + residual).double(), (HIDDEN,), norm.weight.double(), None, 1e-5)
    # Half a step of the type, and of float32 what a few sums of 200 numbers lose.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
    for normed, total in (norm(x, residual), played(lambda pair: norm(*pair), dtype)):
        assert torch.equal(total, x + residual)
        assert normed.dtype is dtype
        torch.testing.assert_close(normed.double(), exact, atol=2 * tolerance, rtol=0)
    begun, wide = norm.begin(x)
    assert torch.equal(wide, x.float())
    assert torch.equal(begun, norm(x))
    began, _ = played(lambda pair: norm.begin(pair[0]), dtype)
    torch.testing.assert_close(began, begun, atol=2 * tolerance, rtol=0)

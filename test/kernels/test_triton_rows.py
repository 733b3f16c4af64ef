"""Norms, gates and the choice of experts in Triton's interpreter, against the layers in torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from sgl_kernel.library import KernelError
from sgl_kernel.triton import clamped_gate, gelu_tanh_and_mul, rms_norm, route, silu_and_mul
from sglang.srt.layers.activation import ClampedGate
from sglang.srt.layers.moe import route_by_sigmoid, route_by_softmax

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 100, 576])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms(width: int, dtype: torch.dtype, offset: float) -> None:
    x, weight = random(5, width, dtype=dtype), random(width, dtype=dtype, seed=2)
    residual = random(5, 2 * width, seed=3)[:, :width]
    tolerance = TOLERANCE[dtype]
    for added in (None, residual):
        total = x.double() if added is None else x.double() + added.double()
        expected = F.rms_norm(total, (width,), None, 1e-6) * (weight.double() + offset)
        out, kept = rms_norm(x, weight, 1e-6, added, offset=offset, keep=added is None)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
        assert kept is not None
        assert kept.dtype == torch.float32
        assert torch.equal(kept, x.float() if added is None else x + added)
    assert rms_norm(x, weight, 1e-6)[1] is None


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("width", [8, 24, 1500])
def test_gates(width: int, dtype: torch.dtype) -> None:
    x = 4 * random(3, 2 * width, dtype=dtype)
    x[0, :4] = torch.tensor([90.0, -90.0, 200.0, -200.0])
    gate, up = x.double().chunk(2, -1)
    tolerance = TOLERANCE[dtype]
    for found, expected in (
        (silu_and_mul(x), F.silu(gate) * up),
        (gelu_tanh_and_mul(x), F.gelu(gate, approximate="tanh") * up),
        (clamped_gate(x, 1.702, 7.0), ClampedGate(1.702, 7.0)(x.double())),
    ):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("num_experts", "num_chosen"), [(4, 1), (8, 2), (60, 4), (128, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routes(num_experts: int, num_chosen: int, dtype: torch.dtype) -> None:
    # Distinct logits: which of equals torch takes is not said.
    order = torch.stack([torch.randperm(num_experts) for _ in range(7)])
    logits = (order / 16 - 2).to(dtype)
    for renormalize in (False, True):
        expected = route_by_softmax(logits, num_chosen, renormalize=renormalize)
        experts, weights = route(logits, num_chosen, softmax=True, renormalize=renormalize)
        assert torch.equal(experts, expected.experts)
        torch.testing.assert_close(weights, expected.weights, rtol=1e-5, atol=1e-7)
    expected = route_by_sigmoid(logits, num_chosen)
    experts, weights = route(logits, num_chosen, softmax=False)
    assert torch.equal(experts, expected.experts)
    torch.testing.assert_close(weights, expected.weights, rtol=1e-5, atol=1e-7)


def test_among_equals_the_lowest_expert_is_taken() -> None:
    experts, weights = route(torch.zeros(1, 6), 3, softmax=True, renormalize=True)
    assert experts.tolist() == [[0, 1, 2]]
    assert weights[0].tolist() == pytest.approx([1 / 3] * 3)


def test_no_rows() -> None:
    assert rms_norm(torch.empty(0, 8), torch.ones(8), 1e-6)[0].shape == (0, 8)
    assert silu_and_mul(torch.empty(0, 8)).shape == (0, 4)
    assert route(torch.empty(0, 8), 2, softmax=True)[0].shape == (0, 2)


def test_what_is_not_served_is_refused() -> None:
    with pytest.raises(KernelError, match="residuals of that shape"):
        rms_norm(torch.ones(2, 8), torch.ones(8), 1e-6, torch.ones(2, 4))
    with pytest.raises(KernelError, match="9 of 8"):
        route(torch.ones(2, 8), 9, softmax=True)
    with pytest.raises(KernelError, match="gate and up"):
        silu_and_mul(torch.ones(2, 7))

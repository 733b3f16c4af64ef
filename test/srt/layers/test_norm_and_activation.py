from __future__ import annotations

import pytest
import torch

from sglang.srt.layers import activation, layernorm
from sglang.srt.layers.activation import ClampedGate, GeluTanhAndMul, SiluAndMul
from sglang.srt.layers.layernorm import GemmaRMSNorm, RMSNorm


@pytest.fixture(params=["torch", "as installed"], autouse=True)
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds without the native kernels and with them, where they are."""
    if request.param == "torch":
        for module in (activation, layernorm):
            monkeypatch.setattr(module, "kernels_for", lambda *_: None)
    else:
        monkeypatch.setattr(activation, "_FEW_ELEMENTS", 0)


def make_norm(dtype: torch.dtype) -> RMSNorm:
    norm = RMSNorm(48, 1e-5, dtype=dtype)
    norm.weight_loader("weight", torch.randn(48, generator=torch.Generator().manual_seed(1)))
    return norm


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-6), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("shape", [(0, 48), (1, 48), (5, 48), (5, 3, 48)])
def test_rms_norm(dtype: torch.dtype, atol: float, shape: tuple[int, ...]) -> None:
    norm = make_norm(dtype)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    want = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    out = norm(x)
    assert out.dtype is dtype
    torch.testing.assert_close(out.double(), want * norm.weight.double(), rtol=0, atol=atol)


def test_residual_is_added_first_and_given_back() -> None:
    norm = make_norm(torch.float32)
    x, residual = torch.ones(2, 48), torch.full((2, 48), 2.0)
    out, total = norm(x, residual)
    assert torch.equal(total, torch.full((2, 48), 3.0))
    assert torch.equal(out, norm(total))
    assert torch.equal(x, torch.ones(2, 48))
    assert torch.equal(residual, torch.full((2, 48), 2.0))


def test_rms_norm_matches_transformers() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = make_norm(torch.float32)
    theirs = LlamaRMSNorm(48, 1e-5)
    theirs.weight.data.copy_(norm.weight)
    x = torch.randn(7, 48, generator=torch.Generator().manual_seed(3)) * 10
    torch.testing.assert_close(norm(x), theirs(x), rtol=1e-6, atol=1e-6)


def test_wrong_weight_is_refused() -> None:
    norm = RMSNorm(4, 1e-5, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"shape \(5,\)"):
        norm.weight_loader("weight", torch.ones(5))
    with pytest.raises(ValueError, match="no parameter 'bias'"):
        norm.weight_loader("bias", torch.ones(4))


@pytest.mark.parametrize("rows", [0, 1, 6])
def test_silu_and_mul(rows: int) -> None:
    x = torch.randn(rows, 20, generator=torch.Generator().manual_seed(0))
    gate, up = x[:, :10].double(), x[:, 10:].double()
    want = gate / (1 + (-gate).exp()) * up
    torch.testing.assert_close(SiluAndMul()(x).double(), want, rtol=0, atol=1e-6)


def test_gemma_norm_adds_one_in_float32() -> None:
    generator = torch.Generator().manual_seed(5)
    norm = GemmaRMSNorm(48, 1e-6, dtype=torch.bfloat16)
    norm.weight_loader("weight", torch.randn(48, generator=generator) * 0.01)
    x = torch.randn(9, 48, generator=generator).bfloat16()
    wide = x.double()
    factor = 1 + norm.weight.double()
    want = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * factor
    out, total = norm(x, torch.zeros(9, 48))
    assert (out.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    # One rounding, at the end; 1 + weight in bfloat16 would move a quarter of the values.
    assert (out != want.bfloat16()).float().mean() < 0.01
    assert torch.equal(norm(x), out)


def test_gelu_tanh_and_mul() -> None:
    x = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    gate, up = x[:, :10].double(), x[:, 10:].double()
    inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    want = gate / 2 * (1 + inner.tanh()) * up
    torch.testing.assert_close(GeluTanhAndMul()(x).double(), want, rtol=0, atol=1e-6)


def test_clamped_gate() -> None:
    x = torch.randn(50, 20, generator=torch.Generator().manual_seed(0)) * 4
    gate, up = x[:, :10].double().clamp(max=3), x[:, 10:].double().clamp(-3, 3)
    assert (gate == 3).any()
    assert (gate < -3).any()
    want = (up + 1) * gate / (1 + (-1.702 * gate).exp())
    torch.testing.assert_close(ClampedGate(1.702, 3.0)(x).double(), want, rtol=0, atol=1e-5)

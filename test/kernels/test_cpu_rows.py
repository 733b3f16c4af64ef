"""Native norms and gates against float64, at every level of instructions that is here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

sgl_kernel = pytest.importorskip("sgl_kernel")

from sgl_kernel import (  # noqa: E402
    Gate,
    GateKind,
    Isa,
    KernelError,
    cpu_isa,
    gate_and_mul,
    rms_norm,
    silu_and_mul,
)

LEVELS = [isa for isa in Isa if isa <= cpu_isa() and (isa != Isa.NEON or cpu_isa() == Isa.NEON)]
# One rounding, relative; a float32 sum over a row adds some more.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 1.01 * 2.0**-8, torch.float16: 1.01 * 2.0**-11}
SHAPES = [(1, 1), (3, 7), (5, 64), (2, 576), (150, 512)]


def normed(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    wide = x.double()
    scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return wide * scale * (offset + weight.double())


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize(("rows", "width"), SHAPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norm_of_a_sum(rows: int, width: int, offset: float, dtype: torch.dtype, isa: Isa) -> None:
    generator = torch.Generator().manual_seed(rows + width)
    x = torch.randn(rows, width, generator=generator).to(dtype)
    residual = 3 * torch.randn(rows, width, generator=generator)
    weight = torch.randn(width, generator=generator).to(dtype)
    kept = x.clone(), residual.clone()
    out, total = rms_norm(x, weight, 1e-5, residual, offset=offset, isa=isa, num_threads=2)
    assert total is not None
    assert out.dtype is dtype
    assert torch.equal(total, x.float() + residual)
    want = normed(total, weight, 1e-5, offset)
    torch.testing.assert_close(out.double(), want, rtol=ROUNDING[dtype], atol=1e-6)
    assert torch.equal(x, kept[0])
    assert torch.equal(residual, kept[1])


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("x_dtype", list(ROUNDING))
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_norm_alone(
    rows: int, width: int, x_dtype: torch.dtype, dtype: torch.dtype, isa: Isa
) -> None:
    generator = torch.Generator().manual_seed(rows * width)
    whole = torch.randn(rows, 2 * width, generator=generator).to(x_dtype)
    x = whole[:, width:]  # rows apart
    weight = torch.randn(width, generator=generator).to(dtype)
    out, total = rms_norm(x, weight, 1e-6, isa=isa)
    assert total is None
    want = normed(x, weight, 1e-6, 0.0)
    torch.testing.assert_close(out.double(), want, rtol=ROUNDING[dtype], atol=1e-6)


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_gates(rows: int, width: int, dtype: torch.dtype, isa: Isa) -> None:
    generator = torch.Generator().manual_seed(rows * 7 + width)
    x = (8 * torch.randn(rows, 2 * width, generator=generator)).to(dtype)
    found = silu_and_mul(x, isa=isa, num_threads=2)
    gate, up = x.double().chunk(2, dim=-1)
    assert found.dtype is dtype
    want = F.silu(gate) * up
    torch.testing.assert_close(found.double(), want, rtol=ROUNDING[dtype] + 1e-6, atol=1e-6)


def opened(gate: torch.Tensor, up: torch.Tensor, opening: Gate) -> torch.Tensor:
    if opening.kind is GateKind.GELU_TANH:
        return F.gelu(gate, approximate="tanh") * up
    gate, up = gate.clamp(max=opening.limit), up.clamp(-opening.limit, opening.limit)
    return (up + 1) * gate * torch.sigmoid(opening.alpha * gate)


OPENINGS = [Gate(GateKind.GELU_TANH), Gate(GateKind.CLAMPED, 1.702, 7.0)]


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("opening", OPENINGS, ids=lambda opening: opening.kind.name)
def test_other_gates(opening: Gate, dtype: torch.dtype, isa: Isa) -> None:
    generator = torch.Generator().manual_seed(7)
    x = (8 * torch.randn(5, 2 * 67, generator=generator)).to(dtype)
    found = gate_and_mul(x, opening, isa=isa, num_threads=2)
    assert found.dtype is dtype
    want = opened(*x.double().chunk(2, dim=-1), opening)
    torch.testing.assert_close(found.double(), want, rtol=ROUNDING[dtype] + 1e-5, atol=1e-5)
    far = torch.tensor([[-1e30, -100.0, 0.0, 1e30, float("nan"), 1.0, 1.0, 1.0, 1.0, 1.0]])
    found, want = gate_and_mul(far, opening, isa=isa), opened(*far.double().chunk(2, -1), opening)
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("isa", LEVELS)
def test_gates_far_from_zero(isa: Isa) -> None:
    gate = torch.tensor([-1e30, -200.0, -100.0, -88.0, 0.0, 88.0, 100.0, 1e30, float("inf")])
    x = torch.cat([gate, torch.ones(len(gate))]).unsqueeze(0)
    found = silu_and_mul(x, isa=isa)[0]
    torch.testing.assert_close(found, F.silu(gate), rtol=1e-5, atol=1e-30)
    assert silu_and_mul(torch.tensor([[float("nan"), 1.0]]), isa=isa).isnan().all()


def test_no_rows() -> None:
    out, _ = rms_norm(torch.empty(0, 8), torch.ones(8), 1e-5)
    assert out.shape == (0, 8)
    assert silu_and_mul(torch.empty(0, 8)).shape == (0, 4)


def test_what_is_not_served_is_said() -> None:
    x, weight = torch.ones(2, 8), torch.ones(8)
    with pytest.raises(KernelError, match="does not serve"):
        rms_norm(x.double(), weight, 1e-5)
    with pytest.raises(KernelError, match="weight"):
        rms_norm(x, weight[:4], 1e-5)
    with pytest.raises(KernelError, match="residual"):
        rms_norm(x, weight, 1e-5, x.bfloat16())
    with pytest.raises(KernelError, match="are not served"):
        silu_and_mul(torch.ones(2, 7))
    with pytest.raises(KernelError, match="are not served"):
        silu_and_mul(torch.ones(8, 2).t())

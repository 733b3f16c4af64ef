"""Native lookups, angles, maxima and conversions of rows against what torch says."""

from __future__ import annotations

import math

import pytest
import torch

sgl_kernel = pytest.importorskip("sgl_kernel")

from sgl_kernel import (  # noqa: E402
    Isa,
    KernelError,
    angles,
    cpu_isa,
    gather,
    highest,
    rms_norm,
    scale,
    scale_by_position,
    widen,
)

LEVELS = [isa for isa in Isa if isa <= cpu_isa() and (isa != Isa.NEON or cpu_isa() == Isa.NEON)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
def test_gather(dtype: torch.dtype) -> None:
    whole = torch.randint(0, 200, (9, 40)).to(dtype)
    table = whole[:, 3:20]
    ids = torch.tensor([8, 0, 0, 5])
    assert torch.equal(gather(table, ids), table[ids])
    assert gather(table, ids[:0]).shape == (0, 17)
    with pytest.raises(KernelError, match="int64"):
        gather(table, ids.int())
    with pytest.raises(KernelError, match="contiguous"):
        gather(table.t(), ids)


@pytest.mark.parametrize("interleaved", [False, True])
def test_angles_are_exact_at_ten_million(interleaved: bool) -> None:
    positions = torch.tensor([0, 1, 4095, 1_000_003, 9_999_999])
    frequencies = torch.logspace(0, -6, 16, dtype=torch.float64)
    cos, sin = angles(positions, frequencies, scaling=1.25, interleaved=interleaved)
    wide = positions.double()[:, None] * frequencies
    for i in range(16):
        first, second = (2 * i, 2 * i + 1) if interleaved else (i, 16 + i)
        for row in range(5):
            angle = float(wide[row, i])
            for at, sign in ((first, -1), (second, 1)):
                assert cos[row, at] == pytest.approx(1.25 * math.cos(angle), rel=1e-7, abs=1e-9)
                assert sin[row, at] == pytest.approx(sign * 1.25 * math.sin(angle), rel=1e-7)
    with pytest.raises(KernelError, match="float64"):
        angles(positions, frequencies.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales(dtype: torch.dtype) -> None:
    x = torch.randn(5, 50).to(dtype)[:, 7:]
    assert torch.equal(scale(x, 5.656854, num_threads=2), (x.float() * 5.656854).to(dtype))
    positions = torch.tensor([0, 14, 15, 8191, 9_999_999])
    found = scale_by_position(x, positions, attn_scale=0.3, floor_scale=16.0)
    factors = 1 + 0.3 * torch.log1p(torch.floor((positions.double() + 1) / 16))
    assert torch.equal(found, (x.float() * factors.float()[:, None]).to(dtype))
    assert torch.equal(found[:2], x[:2])
    assert scale(x[:0], 2.0).shape == (0, 43)
    with pytest.raises(KernelError, match="int64"):
        scale_by_position(x, positions.int(), attn_scale=0.3, floor_scale=16.0)
    with pytest.raises(KernelError, match="positive"):
        scale_by_position(x, positions, attn_scale=0.3, floor_scale=0.0)
    with pytest.raises(KernelError, match="does not serve"):
        scale(x.double(), 2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_widen(dtype: torch.dtype) -> None:
    whole = torch.randn(5, 50).to(dtype)
    assert torch.equal(widen(whole[:, 7:], num_threads=2), whole[:, 7:].float())
    with pytest.raises(KernelError, match="float64"):
        widen(whole.double())


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("width", [1, 7, 256, 257, 4000])
def test_highest(width: int, isa: Isa) -> None:
    x = torch.randint(-50, 50, (6, width)).float()  # many equal ones: the first counts
    x[1] = -math.inf
    x[2, width // 2] = math.nan
    x[3, -1] = math.inf
    values, places = highest(x, num_threads=2, isa=isa)
    for row in (0, 1, 3, 4, 5):
        assert values[row] == x[row].max()
        assert int(places[row]) == x[row].tolist().index(float(values[row]))
    assert math.isnan(values[2])
    assert int(places[2]) == 0
    with pytest.raises(KernelError, match="bfloat16"):
        highest(x.bfloat16())


def test_a_norm_keeps_what_it_was_given_for_the_first_residual() -> None:
    x, weight = torch.randn(3, 20).bfloat16(), torch.rand(20).bfloat16()
    out, kept = rms_norm(x, weight, 1e-5, keep=True)
    alone, none = rms_norm(x, weight, 1e-5)
    assert none is None
    assert kept is not None
    assert torch.equal(kept, x.float())
    assert torch.equal(out, alone)


def test_heads_apart_are_normalised_without_a_copy() -> None:
    whole, weight = torch.randn(5, 100), torch.rand(16)
    heads = whole[:, 4:68].view(5, 4, 16)
    assert not heads.is_contiguous()
    out, _ = rms_norm(heads, weight, 1e-5)
    want, _ = rms_norm(heads.reshape(20, 16), weight, 1e-5)
    assert torch.equal(out, want)
    across, _ = rms_norm(heads.transpose(0, 1), weight, 1e-5)
    assert torch.equal(across.view(4, 5, 16).transpose(0, 1), want.view(5, 4, 16))

"""The Triton kernels on a GPU, against float64 on the host: what the interpreter can't show.

    TRITON_INTERPRET=0 python -m pytest -m gpu test/kernels/test_triton_gpu.py

Not yet run: written without a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")

from kernels.quantized_cases import E4M3, drawn_codes
from kernels.test_triton_quantized import LAYOUTS, make, numbers
from kernels.triton_cases import ALL, BUSY, IDLE, Case, Chip, Sight
from sgl_kernel.triton import (
    QuantizedWeight,
    Segments,
    default_tiles,
    mixture,
    rms_norm,
    rotate_and_store,
    route,
    silu_and_mul,
    store_kv,
)
from sgl_kernel.triton.rounded import multiplies_fp8, round_rows
from sglang.srt.mem_cache.segment_backing.segment_plane import round_to

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets"),
]

ATOL = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
LENGTHS = [(3000, 1), (700, 130), (0, 300), (64, 1), (5, 7)]


def check(case: Case, sight: Sight = ALL, chip: Chip = BUSY, **more: object) -> None:
    num_heads, kv_heads = case.heads
    small, large = default_tiles(*case.dims, num_heads // kv_heads, case.q.dtype)
    sinks = more.pop("sinks", None)
    on_device = sinks.cuda() if isinstance(sinks, torch.Tensor) else None
    out = case.run(sight, chip=chip, small=small, large=large, sinks=on_device, **more)  # type: ignore[arg-type]
    expected, _ = case.reference(sight, sinks=sinks, **more)  # type: ignore[arg-type]
    torch.testing.assert_close(out.cpu().double(), expected, rtol=0, atol=ATOL[case.q.dtype])


@pytest.mark.parametrize("chip", [BUSY, IDLE], ids=["whole", "split"])
@pytest.mark.parametrize("segment_pages", [None, 5])
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("dtype", [*ATOL, *FP8])
def test_attention(
    dtype: torch.dtype, page_size: int, segment_pages: int | None, chip: Chip
) -> None:
    case = Case(
        LENGTHS,
        heads=(10, 2),
        dims=(128, 128),
        dtype=dtype,
        q_dtype=torch.bfloat16 if dtype in FP8 else None,
        page_size=page_size,
        segment_pages=segment_pages,
        device="cuda",
    )
    check(case, chip=chip)


@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (96, 128), (128, 96), (256, 256)])
@pytest.mark.parametrize("sight", [ALL, Sight(window=200), Sight(chunk=256)], ids=str)
def test_widths_windows_caps_and_sinks(dims: tuple[int, int], sight: Sight) -> None:
    case = Case(LENGTHS, heads=(8, 2), dims=dims, dtype=torch.bfloat16, page_size=64, device="cuda")
    check(case, sight, IDLE)
    check(case, sight, IDLE, logit_cap=20.0, sinks=torch.linspace(-2.0, 6.0, 8))


@pytest.mark.parametrize("plane_type", [torch.bfloat16, *FP8])
@pytest.mark.parametrize("segmented", [False, True])
def test_stores(plane_type: torch.dtype, segmented: bool) -> None:
    tokens, kv_heads, dim = 100, 8, 128
    generator = torch.Generator().manual_seed(1)
    k, v = (
        torch.randn(tokens, kv_heads * dim, generator=generator).bfloat16().cuda() for _ in "kv"
    )
    k[0] *= 1e6
    k[1, 0] = float("nan")
    q = torch.randn(tokens, 40 * dim, generator=generator).bfloat16().cuda()
    slots = torch.randperm(256, generator=generator)[:tokens].cuda()
    planes = [torch.zeros(256, kv_heads, dim, device="cuda").to(plane_type) for _ in "kv"]
    targets: list[torch.Tensor | Segments] = list(planes)
    if segmented:
        targets = [
            Segments(
                torch.tensor([part.data_ptr() for part in plane.split(64)], device="cuda"),
                plane_type,
                kv_heads,
                dim,
                64,
            )
            for plane in planes
        ]
    k_scale, v_scale = (0.3, 70.0) if plane_type in FP8 else (1.0, 1.0)
    store_kv(k, v, slots, *targets, k_scale=k_scale, v_scale=v_scale)
    for x, plane, scale in ((k, planes[0], k_scale), (v, planes[1], v_scale)):
        found = plane.view(torch.uint8 if plane_type in FP8 else plane_type)[slots]
        found = found.view(plane_type).flatten(1).float()
        torch.testing.assert_close(
            found, round_to(x, plane_type, scale).float(), rtol=0, atol=0, equal_nan=True
        )
    angles = torch.rand(tokens, dim // 2, generator=generator, dtype=torch.float64) * 6
    cos = torch.cat((angles.cos(), angles.cos()), -1)
    sin = torch.cat((-angles.sin(), angles.sin()), -1)
    turned = rotate_and_store(q, v, v, cos.float().cuda(), sin.float().cuda(), slots, *targets)
    heads = q.cpu().double().view(tokens, 40, dim)
    exact = heads * cos.unsqueeze(1) + heads.roll(dim // 2, -1) * sin.unsqueeze(1)
    torch.testing.assert_close(turned.cpu().double(), exact.flatten(1), rtol=8e-3, atol=1e-3)


def test_rows_and_mixtures() -> None:
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().cuda()

    x, weight = random(64, 2048), random(2048)
    residual = random(64, 2048).float()
    normed, total = rms_norm(x, weight, 1e-6, residual)
    assert total is not None
    assert torch.equal(total, x + residual)
    expected = torch.nn.functional.rms_norm(total.double(), (2048,), weight.double(), 1e-6)
    torch.testing.assert_close(normed.double(), expected, rtol=8e-3, atol=1e-3)
    gate, up = x.double().chunk(2, -1)
    torch.testing.assert_close(
        silu_and_mul(x).double(), torch.nn.functional.silu(gate) * up, rtol=8e-3, atol=1e-3
    )
    experts, weights = route(random(64, 16), 4, softmax=True, renormalize=True)
    gate_up, down = random(16, 512, 2048) / 45, random(16, 2048, 256) / 16
    found = mixture(x, experts, weights, gate_up, down).double()
    exact = torch.zeros_like(found)
    for expert in range(16):
        gate, up = (x.double() @ gate_up[expert].double().t()).chunk(2, -1)
        result = (torch.nn.functional.silu(gate) * up) @ down[expert].double().t()
        exact += result * (weights * (experts == expert)).sum(1, keepdim=True)
    torch.testing.assert_close(found, exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("rows", [1, 16, 30, 60, 500])
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("dtype", list(ATOL))
def test_products_of_codes(dtype: torch.dtype, layout: str, rows: int) -> None:
    weight = make(layout, 1037, 2880, gain=1 / 64)
    wide = numbers(weight)
    weight.codes, weight.scales = weight.codes.cuda(), weight.scales.cuda()
    weight.mins = None if weight.mins is None else weight.mins.cuda()
    x = torch.randn(rows, 2880, generator=torch.Generator().manual_seed(rows)).to(dtype)
    bias = torch.randn(1037, generator=torch.Generator().manual_seed(1)).to(dtype)
    out = weight.multiply(x.cuda(), bias.cuda()).cpu().double()
    want = x.double() @ wide.t() + bias.double()
    # The weight is rounded to the type of x, each number by at most half a step.
    terms = x.double().abs() @ wide.abs().t() + bias.double().abs()
    assert ((out - want).abs() <= torch.finfo(dtype).eps * terms + 1e-6 * terms).all()
    ids = torch.tensor([1036, 5], device="cuda")
    torch.testing.assert_close(
        weight.dequantize_rows(ids, dtype).cpu().double(),
        wide[ids.cpu()],
        rtol=torch.finfo(dtype).eps,
        atol=1e-6,
    )


@pytest.mark.parametrize("rows", [60, 500])
@pytest.mark.parametrize("group", [0, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_rows_rounded_to_fp8(dtype: torch.dtype, group: int, rows: int) -> None:
    if not multiplies_fp8(torch.device("cuda")):
        pytest.skip("no tensor cores for FP8")
    weight = QuantizedWeight(*drawn_codes((E4M3, group, False, None), 1037, 2880, 1 / 64))
    wide = numbers(weight)
    weight.codes, weight.scales = weight.codes.cuda(), weight.scales.cuda()
    weight.rounds_inputs = True
    x = torch.randn(rows, 2880, generator=torch.Generator().manual_seed(rows)).to(dtype).cuda()
    codes, scales = round_rows(x, group)
    near = codes.double() * scales.double().repeat_interleave(group or 2880, 1)[:, :2880]
    assert ((near - x.double()).abs() <= 2.0**-4 * x.double().abs() + 2.0**-9 * scales.max()).all()
    out = weight.multiply(x).cpu().double()
    want, terms = near.cpu() @ wide.t(), near.cpu().abs() @ wide.abs().t()
    # Tensor cores of an H100 keep about 14 bits of a sum (arXiv 2412.19437).
    bound = torch.finfo(dtype).eps * want.abs() + 2.0**-13 * terms
    assert ((out - want).abs() <= bound).all()

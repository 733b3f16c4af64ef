"""Native rotation of heads against float64, and native copies into slots against indexing."""

from __future__ import annotations

import pytest
import torch

sgl_kernel = pytest.importorskip("sgl_kernel")

from sgl_kernel import Isa, KernelError, KVPlanes, cpu_isa, rotate  # noqa: E402

LEVELS = [isa for isa in Isa if isa <= cpu_isa() and (isa != Isa.NEON or cpu_isa() == Isa.NEON)]
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 1.01 * 2.0**-8, torch.float16: 1.01 * 2.0**-11}


def angles_of(rows: int, dim: int, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and signed sine float32 [rows, dim] of random angles, one a pair."""
    angles = torch.rand(rows, dim // 2, generator=torch.Generator().manual_seed(rows)) * 7
    cos, sin = angles.cos(), angles.sin()
    if interleaved:
        return cos.repeat_interleave(2, -1), torch.stack((-sin, sin), -1).flatten(1)
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("rows", "heads", "dim"), [(1, 1, 2), (3, 2, 6), (5, 9, 64), (70, 3, 128)])
def test_rotate(
    rows: int, heads: int, dim: int, interleaved: bool, dtype: torch.dtype, isa: Isa
) -> None:
    generator = torch.Generator().manual_seed(heads)
    whole = torch.randn(rows, heads * dim + 5, generator=generator).to(dtype)
    x = whole[:, 5:]  # rows apart
    kept = whole.clone()
    cos, sin = angles_of(rows, dim, interleaved)
    out = rotate(x, cos, sin, interleaved=interleaved, isa=isa, num_threads=2)
    assert out.dtype is dtype
    parts = x.double().view(rows, heads, dim)
    if interleaved:
        partners = parts.view(rows, heads, -1, 2).flip(-1).flatten(-2)
    else:
        partners = parts.roll(dim // 2, -1)
    want = parts * cos.double()[:, None] + partners * sin.double()[:, None]
    scale = (parts.abs() + partners.abs()).flatten(1)  # the terms may cancel
    error = (out.double() - want.flatten(1)).abs()
    assert (error <= ROUNDING[dtype] * want.flatten(1).abs() + 2e-7 * scale).all()
    assert torch.equal(whole, kept)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    x, (cos, sin) = torch.randn(33, 128).bfloat16(), angles_of(33, 64, interleaved=False)
    together = rotate(x, cos, sin, num_threads=2)
    alone = [rotate(x[i : i + 1], cos[i : i + 1], sin[i : i + 1]) for i in range(33)]
    assert torch.equal(together, torch.cat(alone))


def test_what_rotate_refuses() -> None:
    x, cos = torch.randn(2, 12), torch.randn(2, 4)
    with pytest.raises(KernelError, match="heads of 5"):
        rotate(x, torch.randn(2, 5), torch.randn(2, 5))
    with pytest.raises(KernelError, match="angles"):
        rotate(x, cos.double(), cos)
    with pytest.raises(KernelError, match="angles"):
        rotate(x, cos, torch.randn(3, 4))
    with pytest.raises(KernelError, match="float64"):
        rotate(x.double(), cos, cos)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize(("rows", "heads"), [(1, 1), (7, 3), (3000, 2)])
def test_store(rows: int, heads: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    both = torch.randint(0, 200, (rows, heads * (16 + 8)), generator=generator).to(dtype)
    k = both[:, : heads * 16].view(rows, heads, 16)
    v = both[:, heads * 16 :].view(rows, heads, 8)
    planes = [torch.zeros(4000, heads, 16, dtype=dtype), torch.zeros(4000, heads, 8, dtype=dtype)]
    slots = torch.randperm(4000, generator=generator)[:rows]
    KVPlanes(*planes).store(slots, k, v, num_threads=2)
    for plane, new in zip(planes, (k, v), strict=True):
        want = torch.zeros_like(plane)
        want[slots] = new
        assert torch.equal(plane, want)


def all_sources(dtype: torch.dtype) -> torch.Tensor:
    """Every bf16 or fp16; as float32 every bf16 and those just beside the ties of fp8."""
    codes = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    if dtype != torch.float32:
        return codes.view(dtype)
    wide = codes.view(torch.bfloat16).float()
    bits = wide.view(torch.int32)
    return torch.cat((wide, (bits + 1).view(torch.float32), (bits - 1).view(torch.float32)))


@pytest.mark.parametrize("plane_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_store_rounds_to_a_byte(dtype: torch.dtype, plane_dtype: torch.dtype) -> None:
    """As torch does after a clamp; NaN stays NaN."""
    x = all_sources(dtype).view(-1, 2, 64)
    rows = len(x)
    slots = torch.randperm(rows + 5, generator=torch.Generator().manual_seed(1))[:rows]
    planes = [torch.zeros(rows + 5, 2, 64, dtype=plane_dtype) for _ in range(2)]
    KVPlanes(*planes).store(slots, x, x.flip(2).contiguous(), num_threads=2)
    most = torch.finfo(plane_dtype).max
    want = x.float().clamp(-most, most).to(plane_dtype)
    for plane, expected in zip(planes, (want, want.view(torch.uint8).flip(2)), strict=True):
        found = plane.view(torch.uint8)[slots].view(plane_dtype)
        expected = expected.view(plane_dtype)
        nan = expected.float().isnan()
        assert torch.equal(found.float().isnan(), nan)
        same = found.view(torch.uint8) == expected.view(torch.uint8)
        assert (same | nan).all()


@pytest.mark.parametrize("plane_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_store_divides_by_scales(dtype: torch.dtype, plane_dtype: torch.dtype) -> None:
    """Each side by its own, as a product with the float32 inverse, rounded once."""
    x = all_sources(dtype).view(-1, 2, 64)
    slots = torch.arange(len(x))
    planes = [torch.zeros(len(x), 2, 64, dtype=plane_dtype) for _ in range(2)]
    KVPlanes(*planes).store(slots, x, x, k_scale=0.3, v_scale=700.0, num_threads=2)
    most = torch.finfo(plane_dtype).max
    for plane, scale in zip(planes, (0.3, 700.0), strict=True):
        inverse = torch.tensor(1.0 / scale, dtype=torch.float32)
        expected = (x.float() * inverse).clamp(-most, most).to(plane_dtype)
        nan = expected.float().isnan()
        assert torch.equal(plane.float().isnan(), nan)
        assert ((plane.view(torch.uint8) == expected.view(torch.uint8)) | nan).all()


@pytest.mark.parametrize(
    ("x", "plane"), [("float32", "float32"), ("float8_e5m2", "float8_e5m2"), ("float32", "int8")]
)
def test_only_what_is_rounded_to_fp8_has_scales(x: str, plane: str) -> None:
    width = 12 if plane == "int8" else 8
    pair = [torch.zeros(9, 2, width).to(getattr(torch, plane)) for _ in range(2)]
    new = torch.zeros(1, 2, 8).to(getattr(torch, x))
    with pytest.raises(KernelError, match="rounded to fp8 have scales"):
        KVPlanes(*pair).store(torch.tensor([3]), new, new, v_scale=2.0)


def test_a_byte_is_stored_as_it_is() -> None:
    x = torch.arange(256, dtype=torch.uint8).view(2, 2, 64).view(torch.float8_e4m3fn)
    planes = [torch.zeros(9, 2, 64, dtype=torch.float8_e4m3fn) for _ in range(2)]
    KVPlanes(*planes).store(torch.tensor([7, 3]), x, x)
    for plane in planes:
        assert torch.equal(plane.view(torch.uint8)[[7, 3]], x.view(torch.uint8))


def test_what_a_byte_is_not_rounded_from() -> None:
    planes = KVPlanes(*(torch.zeros(9, 2, 8, dtype=torch.float8_e5m2) for _ in range(2)))
    slots, x = torch.tensor([3, 1]), torch.zeros(2, 2, 8)
    for k, v in ((x.double(), x.double()), (x, x.half()), (x.to(torch.float8_e4m3fn), x)):
        with pytest.raises(KernelError, match="does not fit"):
            planes.store(slots, k, v)
    mixed = KVPlanes(planes.planes[0], torch.zeros(9, 2, 8))
    with pytest.raises(KernelError, match="does not fit"):
        mixed.store(slots, x, x)


def test_what_store_refuses() -> None:
    planes = KVPlanes(torch.zeros(10, 2, 8), torch.zeros(10, 2, 4))
    slots, k, v = torch.tensor([3, 1]), torch.zeros(2, 2, 8), torch.zeros(2, 2, 4)
    for wrong in (k.double(), k[:1], torch.zeros(2, 2, 4), torch.zeros(2, 8, 2).transpose(1, 2)):
        with pytest.raises(KernelError):
            planes.store(slots, wrong, v)
    with pytest.raises(KernelError, match="int64"):
        planes.store(slots.int(), k, v)
    with pytest.raises(KernelError, match="contiguous"):
        KVPlanes(torch.zeros(10, 8, 2).transpose(1, 2), torch.zeros(10, 2, 4))


def pack(x: torch.Tensor) -> torch.Tensor:
    """Heads [*, D] as int8 [*, D + 4]: multiples of their largest over 127, then that factor."""
    wide = x.float()
    largest = wide.abs().amax(-1, keepdim=True).clamp(max=torch.finfo(torch.float32).max)
    scale = largest / 127
    codes = (wide / scale).nan_to_num(0.0).round().clamp(-127, 127)
    codes = torch.where(scale > 0, codes, 0.0).to(torch.int8)
    return torch.cat([codes, scale.view(torch.int8)], -1)


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_heads_are_rounded_to_bytes_with_a_scale(dtype: torch.dtype) -> None:
    """The same bits as torch's, ties and extremes included."""
    torch.manual_seed(1)
    rows, heads, dim = 40, 3, 20
    k, v = torch.randn(2, rows, heads, dim).unbind()
    k[0] = torch.arange(dim) - 10.0  # ties where the largest is 127 times a power of two
    k[1, :, 0], k[1, :, 1:] = 127.0, torch.arange(1, dim) * 0.5
    k[2] = 0.0
    k[3, 1, 5] = float("inf")
    k[4] = 1e-44
    k, v = k.to(dtype), v.to(dtype)
    planes = torch.zeros(2, 50, heads, dim + 4, dtype=torch.int8)
    slots = torch.randperm(50)[:rows]
    KVPlanes(planes[0], planes[1]).store(slots, k, v, num_threads=2)
    for plane, x in zip(planes, (k, v), strict=True):
        assert torch.equal(plane[slots], pack(x))
        others = torch.ones(50, dtype=torch.bool)
        others[slots] = False
        assert not plane[others].any()
    # rows that are packed already are copied
    again = torch.zeros_like(planes)
    KVPlanes(again[0], again[1]).store(slots, pack(k), pack(v))
    assert torch.equal(again, planes)


def test_a_head_with_a_nan_is_all_nan() -> None:
    x = torch.randn(1, 2, 8)
    x[0, 1, 3] = float("nan")
    planes = torch.zeros(2, 3, 2, 12, dtype=torch.int8)
    KVPlanes(planes[0], planes[1]).store(torch.tensor([2]), x, x)
    scales = planes[:, 2, :, 8:].contiguous().view(torch.float32)[..., 0]
    assert scales[:, 0].isfinite().all()
    assert scales[:, 1].isnan().all()

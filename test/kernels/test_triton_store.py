"""Rotation and store of new K and V in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from sgl_kernel.library import KernelError
from sgl_kernel.triton import Segments, rotate_and_store, store_kv
from sglang.srt.configs.rope_config import RopeConfig
from sglang.srt.layers.rotary_embedding import get_rope
from sglang.srt.mem_cache.segment_backing.segment_plane import round_to

SLOTS = torch.tensor([33, 2, 17, 16, 40])
POSITIONS = torch.tensor([0, 5, 999_999, 9_999_999, 31])


def planes(
    dtype: torch.dtype, kv_heads: int, dims: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    k, v = (torch.zeros(48, kv_heads, dim).to(dtype) for dim in dims)
    return k, v


def in_segments(plane: torch.Tensor, parts: list[torch.Tensor]) -> Segments:
    """The plane as three segments in tensors of their own, which `parts` keeps."""
    own = [part.clone() for part in plane.split(16)]
    parts += own
    pointers = torch.tensor([part.data_ptr() for part in own])
    return Segments(pointers, plane.dtype, plane.shape[1], plane.shape[2], 16)


def rows(heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    widths = (heads[0] * dims[0], heads[1] * dims[0], heads[1] * dims[1])
    whole = torch.randn(5, sum(widths), generator=generator).to(dtype)
    return list(whole.split(widths, -1))  # rows of a merged projection, not contiguous


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "dims"), [((6, 2), (16, 16)), ((12, 12), (80, 24)), ((3, 1), (96, 128))]
)
def test_rotation_is_the_layers(
    heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype, interleaved: bool
) -> None:
    """Against the module in float64, and its own numbers within a rounding."""
    rope = get_rope(dims[0], RopeConfig(), 1 << 20, dtype, interleaved=interleaved)
    q, k, v = rows(heads, dims, dtype)
    cos, sin = rope.cos_sin(POSITIONS)
    k_plane, v_plane = planes(dtype, heads[1], dims)
    turned = rotate_and_store(
        q, k, v, cos.squeeze(1), sin.squeeze(1), SLOTS, k_plane, v_plane, interleaved=interleaved
    )
    eps = 2e-6 if dtype is torch.float32 else 1e-2  # the interpreter cuts bfloat16 off
    for x, found in ((q, turned), (k, k_plane[SLOTS].flatten(1))):
        exact = x.double().view(5, -1, dims[0])
        if interleaved:
            swapped = exact.view(*exact.shape[:-1], -1, 2).flip(-1).flatten(-2)
        else:
            swapped = exact.roll(dims[0] // 2, -1)
        exact = (exact * cos.double() + swapped * sin.double()).flatten(1)
        torch.testing.assert_close(found.double(), exact, rtol=eps, atol=eps / 4)
        torch.testing.assert_close(found, rope.rotate(POSITIONS, x), rtol=eps, atol=eps / 4)
    assert torch.equal(v_plane[SLOTS].flatten(1), v)
    untouched = [slot for slot in range(48) if slot not in SLOTS.tolist()]
    assert not k_plane[untouched].any()
    assert not v_plane[untouched].any()


@pytest.mark.parametrize("plane_type", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_numbers_are_the_pools(plane_type: torch.dtype, dtype: torch.dtype) -> None:
    """Bit for bit, what is too large, not a number, tiny or between two numbers included."""
    _, k, v = rows((1, 3), (16, 8), dtype)
    k[0] *= torch.logspace(-9, 9, k.shape[1], base=10).to(dtype)
    k[0, :6] = torch.tensor([448.0, 464.0, 57344.0, 1e30, float("inf"), float("nan")])
    k[1] = torch.linspace(-1.0, 1.0, k.shape[1]).to(dtype) * 0.02
    if plane_type is torch.float16:
        k[0] = 60000.0
    k_plane, v_plane = planes(plane_type, 3, (16, 8))
    store_kv(k, v, SLOTS, k_plane, v_plane)
    for x, plane in ((k, k_plane), (v, v_plane)):
        expected = round_to(x, plane_type).float()
        torch.testing.assert_close(
            plane[SLOTS].flatten(1).float(), expected, rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("plane_type", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_are_the_pools(plane_type: torch.dtype, dtype: torch.dtype) -> None:
    """Bit for bit; a rotation of no angle stores the same."""
    q, k, v = rows((1, 3), (16, 8), dtype)
    k[0] *= torch.logspace(-5, 5, k.shape[1], base=10).to(dtype)
    v[1] *= 30_000.0
    scales = {"k_scale": 0.3, "v_scale": 700.0}
    stored = planes(plane_type, 3, (16, 8))
    store_kv(k, v, SLOTS, *stored, **scales)
    turned = planes(plane_type, 3, (16, 8))
    cos, sin = torch.ones(5, 16), torch.zeros(5, 16)
    rotate_and_store(q, k, v, cos, sin, SLOTS, *turned, **scales)
    for x, name, plane, other in zip((k, v), scales, stored, turned, strict=True):
        expected = round_to(x, plane_type, scales[name]).view(torch.uint8)
        assert torch.equal(plane[SLOTS].flatten(1).view(torch.uint8), expected)
        assert torch.equal(plane.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("plane_type", [torch.float32, torch.float8_e4m3fn])
def test_segments_at_unrelated_addresses(plane_type: torch.dtype) -> None:
    q, k, v = rows((6, 2), (16, 24), torch.float32)
    cos, sin = (x.squeeze(1) for x in get_rope(16, RopeConfig(), 9, q.dtype).cos_sin(POSITIONS))
    k_plane, v_plane = planes(plane_type, 2, (16, 24))
    expected = rotate_and_store(q, k, v, cos, sin, SLOTS, k_plane, v_plane)
    parts: list[torch.Tensor] = []
    empty = planes(plane_type, 2, (16, 24))
    segments = [in_segments(plane, parts) for plane in empty]
    assert torch.equal(rotate_and_store(q, k, v, cos, sin, SLOTS, *segments), expected)
    assert torch.equal(torch.cat(parts[:3]).view(torch.uint8), k_plane.view(torch.uint8))
    assert torch.equal(torch.cat(parts[3:]).view(torch.uint8), v_plane.view(torch.uint8))


def test_slots_beyond_2_31_elements() -> None:
    """A plane of 2^33 elements that is reserved, not written; a wrapped offset would crash."""
    plane = torch.empty(1 << 21, 2, 1 << 11, dtype=torch.uint8).view(torch.float8_e4m3fn)
    _, k, v = rows((1, 2), (1 << 11, 1 << 11), torch.bfloat16)
    slots = torch.tensor([(1 << 21) - 1, (1 << 19) - 1, 1 << 19, 1 << 20, 7])
    store_kv(k, v, slots, plane, plane)
    found = plane.view(torch.uint8)[slots]
    assert torch.equal(found, round_to(v, plane.dtype).view(5, 2, -1).view(torch.uint8))


def test_nothing_to_store() -> None:
    k_plane, v_plane = planes(torch.float32, 2, (16, 16))
    none = torch.empty(0, 32)
    store_kv(none, none, torch.empty(0, dtype=torch.long), k_plane, v_plane)
    assert not k_plane.any()


def test_what_is_not_served_is_refused() -> None:
    k_plane, v_plane = planes(torch.float32, 2, (16, 16))
    _, k, v = rows((6, 2), (16, 16), torch.float32)
    with pytest.raises(KernelError, match="don't fit"):
        store_kv(k[:, :16], v, SLOTS, k_plane, v_plane)
    with pytest.raises(KernelError, match="one type"):
        store_kv(k, v.bfloat16(), SLOTS, k_plane, v_plane)
    with pytest.raises(KernelError, match="side by side"):
        store_kv(k.t().contiguous().t(), v, SLOTS, k_plane, v_plane)
    with pytest.raises(KernelError, match="only planes of fp8 have scales"):
        store_kv(k, v, SLOTS, k_plane, v_plane, k_scale=2.0)

"""Latent attention's memory: one plane a layer, on every backing, with the arithmetic of one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from sglang.srt.errors import InvariantError
from sglang.srt.mem_cache import memory_pool
from sglang.srt.mem_cache.kv_layout import (
    GroupId,
    KVCacheSpec,
    KVGroupSpec,
    SegmentId,
    SegmentLayout,
)
from sglang.srt.mem_cache.memory_pool import (
    MHATokenToKVPool,
    MLATokenToKVPool,
)
from sglang.srt.mem_cache.page_copy import copy_pages
from sglang.srt.mem_cache.segment_backing.base import Plane, plane_widths
from sglang.srt.mem_cache.segment_backing.mmap import MmapBacking
from sglang.srt.mem_cache.segment_backing.segment_plane import SegmentPlane, round_to
from sglang.srt.mem_cache.segment_backing.segment_table import SegmentTableBacking
from sglang.srt.mem_cache.segment_backing.static import StaticBacking
from sglang.srt.mem_cache.segment_cuts import (
    make_segment_layouts,
)
from sglang.srt.mem_cache.segment_table_pool import (
    SegmentTableKVPool,
    make_kv_pool,
)

GROUP = GroupId(0)
C, P = 12, 4  # latent and rotary numbers


def spec_of(dtype: str = "float32", layers: int = 2, page_size: int = 4) -> KVCacheSpec:
    group = KVGroupSpec(tuple(range(layers)))
    return KVCacheSpec((group,), 1, C + P, C, dtype, page_size, values_in_keys=True)


def layouts_of(spec: KVCacheSpec, granule: int, segments: int = 5) -> tuple[SegmentLayout, ...]:
    size = 4096 // spec.k_bytes_per_slot_layer  # a system page
    return make_segment_layouts(
        spec,
        slots_per_segment=size,
        auto_segment_bytes=1,
        auto_min_slots=1,
        granule_bytes=granule,
        machine_bytes=segments * size * spec.bytes_per_token,
        budget_bytes=1,
    )


@pytest.fixture(params=["mmap", "static", "segment_table"])
def make_pool(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A pool of `spec_of(dtype)` whose segments 1, 2 and 4 have memory, and its backing."""
    made = []

    def make(dtype: str = "float32") -> tuple[MHATokenToKVPool, Any]:
        kinds: dict[str, Any] = {
            "mmap": MmapBacking,
            "static": StaticBacking,
            "segment_table": SegmentTableBacking,
        }
        backing = kinds[request.param](available_bytes=lambda: 1 << 40)
        made.append(backing)
        spec = spec_of(dtype)
        layouts = layouts_of(spec, backing.granule_bytes)
        backing.reserve(spec, layouts)
        backing.map(GROUP, [SegmentId(1), SegmentId(2), SegmentId(4)])
        return make_kv_pool(spec, layouts, backing), backing

    yield make
    for backing in made:
        backing.close()


def test_one_plane_counts_once() -> None:
    spec = KVCacheSpec((KVGroupSpec(tuple(range(61))),), 1, 576, 512, "bfloat16", 64, True)
    assert spec.bytes_per_token == spec.bytes_per_slot(GROUP) == 70_272
    assert (spec.k_width, spec.v_width, spec.v_bytes_per_slot_layer) == (576, 0, 0)
    assert plane_widths(spec) == {Plane.KEY: 576}
    (layout,) = make_segment_layouts(
        spec,
        slots_per_segment=None,
        auto_segment_bytes=32 << 20,
        auto_min_slots=8192,
        granule_bytes=2 << 20,
        machine_bytes=1 << 40,
        budget_bytes=1 << 36,
    )
    assert layout.plane_bytes_per_slot == (1152,)
    # 8,192 tokens of 1,152 bytes are no whole granules; 16,384 are nine.
    assert layout.slots_per_segment == 16_384
    assert layout.segment_bytes == 61 * 9 * (2 << 20)
    assert layout.fixed_bytes == 61 * (2 << 20)
    fp8 = KVCacheSpec(spec.groups, 1, 576, 512, "fp8_e4m3", 64, values_in_keys=True)
    assert fp8.bytes_per_token == 35_136


def test_what_latents_can_not_be() -> None:
    with pytest.raises(ValueError, match="int8 can't hold latent attention"):
        spec_of("int8")
    with pytest.raises(ValueError, match="values of 20 are no part of keys of 16"):
        KVCacheSpec((KVGroupSpec((0,)),), 1, 16, 20, "float32", 4, values_in_keys=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8_e4m3"])
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("scattered", [True, False])
def test_rows_land_in_their_slots_once(
    make_pool: Any, dtype: str, native: bool, scattered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr(memory_pool, "native_kernels", lambda: None)
    pool, _ = make_pool(dtype)
    size = pool.layouts[0].slots_per_segment
    slots = list(range(size + 3, size + 23))
    if scattered:
        slots = [4 * size + 7 * i % size for i in range(20)]
    loc, rows = torch.tensor(slots), torch.randn(20, 1, C + P).clamp(-3, 3)
    scale = 0.5 if dtype.startswith("fp8") else 1.0
    pool.set_kv_buffer(1, loc, rows, rows[..., :C], k_scale=scale, v_scale=scale)
    stored = round_to(rows, pool.dtype, scale).float()
    assert torch.equal(pool.get_key_buffer(1)[loc].float(), stored)
    assert not pool.get_key_buffer(0)[loc].float().any()
    assert len(pool.stored_planes(0)) == 2  # one of each layer
    values = pool.get_value_buffer(1)
    if isinstance(values, SegmentPlane):
        assert isinstance(pool, SegmentTableKVPool)
        assert values is pool.get_key_buffer(1)
    else:
        assert isinstance(pool, MLATokenToKVPool)
        assert torch.equal(values[loc].float(), stored[..., :C])
        assert values.data_ptr() == pool.get_key_buffer(1).data_ptr()
    assert pool.get_kv_size_bytes() == (
        2 * pool.layouts[0].num_slots * pool.spec.k_bytes_per_slot_layer,
        0,
    )


def test_latents_and_rotary_keys_apart(make_pool: Any) -> None:
    pool, _ = make_pool()
    if not isinstance(pool, MLATokenToKVPool):
        pytest.skip("a segment table has no such pool")
    assert (pool.kv_lora_rank, pool.qk_rope_head_dim) == (C, P)
    loc = torch.tensor([pool.layouts[0].slots_per_segment])
    latent, rotary = torch.randn(1, 1, C), torch.randn(1, 1, P)
    pool.set_mla_kv_buffer(0, loc, latent, rotary)
    assert torch.equal(pool.get_key_buffer(0)[loc], torch.cat((latent, rotary), -1))
    assert torch.equal(pool.get_value_buffer(0)[loc], latent)


def test_slots_outside_are_refused(make_pool: Any) -> None:
    pool, _ = make_pool()
    if isinstance(pool, SegmentTableKVPool):
        pytest.skip("a segment table finds that segments have no memory")
    row = torch.zeros(1, 1, C + P)
    with pytest.raises(InvariantError, match="slots outside"):
        pool.set_kv_buffer(0, torch.tensor([pool.layouts[0].num_slots]), row, row)


def test_pages_move_whole(make_pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What compaction does: of all layers, over segment borders, through a buffer of two pages."""
    pool, _ = make_pool()
    pages = pool.layouts[0].pages_per_segment
    sources = np.array([pages, pages + 2, 2 * pages - 1, 2 * pages], np.int32)
    targets = np.array([4 * pages + 3, 2 * pages + 5, 4 * pages, pages + 1], np.int32)

    def slots(of: np.ndarray) -> torch.Tensor:
        return torch.from_numpy((of[:, None].astype(np.int64) * 4 + np.arange(4)).reshape(-1))

    rows = [torch.randn(16, 1, C + P) for _ in range(2)]
    for layer in range(2):
        pool.set_kv_buffer(layer, slots(sources), rows[layer], rows[layer][..., :C])
    monkeypatch.setattr("sglang.srt.mem_cache.page_copy.COPY_BUFFER_BYTES", 2 * 4 * 16 * 4)
    copy_pages(pool, GROUP, sources, targets)
    for layer in range(2):
        assert torch.equal(pool.get_key_buffer(layer)[slots(targets)], rows[layer])


def test_memory_comes_and_goes_with_one_plane() -> None:
    """The system's own figure is that of one plane a layer, and slots keep their addresses."""
    spec = spec_of()
    with_backing = MmapBacking(available_bytes=lambda: 1 << 40)
    layouts = layouts_of(spec, with_backing.granule_bytes)
    with_backing.reserve(spec, layouts)
    try:
        (layout,) = layouts
        assert with_backing.resident_bytes() == layout.fixed_bytes == 2 * 4096
        view = with_backing.view(0, Plane.KEY)
        assert view.shape == (layout.num_slots, 1, C + P)
        with_backing.map(GROUP, [SegmentId(2)])
        assert with_backing.resident_bytes() == layout.fixed_bytes + layout.segment_bytes
        view[2 * layout.slots_per_segment :][: layout.slots_per_segment] = 1.0
        with_backing.unmap(GROUP, [SegmentId(2)])
        assert with_backing.resident_bytes() == layout.fixed_bytes
        with pytest.raises((KeyError, StopIteration)):
            with_backing.view(0, Plane.VALUE)
    finally:
        with_backing.close()

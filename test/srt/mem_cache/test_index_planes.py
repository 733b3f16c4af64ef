"""Index keys beside latents: a plane of their own, counted, moved and read on every backing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sglang.srt.errors import InvariantError
from sglang.srt.managers.scheduler_device import fixed_bytes
from sglang.srt.mem_cache.kv_layout import (
    GroupId,
    KVCacheSpec,
    KVGroupSpec,
    SegmentId,
    SegmentLayout,
)
from sglang.srt.mem_cache.memory_pool import (
    MHATokenToKVPool,
    NSATokenToKVPool,
)
from sglang.srt.mem_cache.page_copy import copy_pages
from sglang.srt.mem_cache.segment_backing.base import Plane, layer_planes
from sglang.srt.mem_cache.segment_backing.mmap import MmapBacking
from sglang.srt.mem_cache.segment_backing.segment_plane import round_to
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
C, P, X = 12, 4, 8  # latent, rotary and index numbers
KINDS: dict[str, Any] = {
    "mmap": MmapBacking,
    "static": StaticBacking,
    "segment_table": SegmentTableBacking,
}


def spec_of(dtype: str = "float32") -> KVCacheSpec:
    """Three layers, of which the second has no index keys."""
    group = KVGroupSpec((0, 1, 2))
    return KVCacheSpec((group,), 1, C + P, C, dtype, 4, True, index_dim=X, index_layers=(0, 2))


def layouts_of(spec: KVCacheSpec, granule: int) -> tuple[SegmentLayout, ...]:
    return make_segment_layouts(
        spec,
        slots_per_segment=64,
        auto_segment_bytes=1,
        auto_min_slots=1,
        granule_bytes=granule,
        machine_bytes=5 * 512 * spec.bytes_per_token,
        budget_bytes=1,
    )


@pytest.fixture(params=KINDS)
def make_pool(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A pool of `spec_of(dtype)` whose segments 1 and 2 have memory, and its backing."""
    made = []

    def make(dtype: str = "float32") -> tuple[MHATokenToKVPool, Any]:
        backing = KINDS[request.param](available_bytes=lambda: 1 << 40)
        made.append(backing)
        spec = spec_of(dtype)
        layouts = layouts_of(spec, backing.granule_bytes)
        backing.reserve(spec, layouts)
        backing.map(GROUP, [SegmentId(1), SegmentId(2)])
        return make_kv_pool(spec, layouts, backing), backing

    yield make
    for backing in made:
        backing.close()


def test_index_keys_count() -> None:
    """DeepSeek-V3.2: 61 layers of 576 + 128 numbers; of GLM-5.2 21 of 78 have an indexer."""
    layers = tuple(range(61))
    latents = KVCacheSpec((KVGroupSpec(layers),), 1, 576, 512, "bfloat16", 64, True)
    spec = replace(latents, index_dim=128, index_layers=layers)
    assert spec.bytes_per_token == spec.bytes_per_slot(GROUP) == 61 * 704 * 2 == 85_888
    assert replace(spec, dtype="fp8_e4m3").bytes_per_token == 42_944
    some = replace(spec, groups=(KVGroupSpec(tuple(range(78))),), index_layers=tuple(range(21)))
    assert some.bytes_per_token == 2 * (78 * 576 + 21 * 128)
    (layout,) = make_segment_layouts(
        some,
        slots_per_segment=None,
        auto_segment_bytes=32 << 20,
        auto_min_slots=8192,
        granule_bytes=2 << 20,
        machine_bytes=1 << 40,
        budget_bytes=1 << 36,
    )
    assert {plane: shape.width for plane, shape in layer_planes(some, layout, 20).items()} == {
        Plane.KEY: 576,
        Plane.INDEX: 128,
    }
    assert list(layer_planes(some, layout, 21)) == [Plane.KEY]
    assert layout.slots_per_segment == 16_384
    assert layout.segment_bytes == (78 * 9 + 21 * 2) * (2 << 20)
    assert layout.fixed_bytes == fixed_bytes(some, 2 << 20) == (78 + 21) * (2 << 20)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index_layers": ()}, r"index keys of 8 in layers \(\)"),
        ({"index_dim": 0}, r"index keys of 0 in layers \(0, 2\)"),
        ({"index_layers": (0, 3)}, r"in layers \(0, 3\)"),
        ({"values_in_keys": False}, "beside latents only"),
    ],
)
def test_what_can_not_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(spec_of(), **changes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8_e4m3"])
def test_keys_land_in_their_slots(make_pool: Any, dtype: str) -> None:
    pool, _ = make_pool(dtype)
    size = pool.layouts[0].slots_per_segment
    loc = torch.tensor([2 * size + 1, size, size + 5, 2 * size - 1])
    keys = torch.randn(4, X) * 300
    if isinstance(pool, SegmentTableKVPool):
        pool.index_planes.store(2, loc, keys)
    else:
        assert isinstance(pool, NSATokenToKVPool)
        pool.set_index_k_buffer(2, loc, keys)
        assert pool.get_index_k_buffer(2) is pool.index_planes[2]
    assert torch.equal(pool.index_planes[2][loc].float()[:, 0], round_to(keys, pool.dtype).float())
    assert not pool.index_planes[0][loc].float().any()
    assert not pool.get_key_buffer(2)[loc].float().any()
    assert [len(pool.stored_planes(group)) for group in range(pool.spec.num_groups)] == [5]
    with pytest.raises(InvariantError, match="layer 1 keeps no index keys"):
        pool.index_planes.store(1, loc, keys)


def test_pages_move_with_their_index_keys(make_pool: Any) -> None:
    pool, _ = make_pool()
    pages = pool.layouts[0].pages_per_segment
    sources, targets = (
        np.array([pages, 2 * pages - 1], np.int32),
        np.array([2 * pages + 3, pages + 1], np.int32),
    )

    def slots(of: np.ndarray) -> torch.Tensor:
        return torch.from_numpy((of[:, None].astype(np.int64) * 4 + np.arange(4)).reshape(-1))

    keys = torch.randn(8, X)
    for layer in (0, 2):
        pool.index_planes.store(layer, slots(sources), keys + layer)
    copy_pages(pool, GROUP, sources, targets)
    for layer in (0, 2):
        assert torch.equal(pool.index_planes[layer][slots(targets)][:, 0], keys + layer)


def test_memory_comes_and_goes_with_the_planes() -> None:
    backing = MmapBacking(available_bytes=lambda: 1 << 40)
    spec = spec_of()
    layouts = layouts_of(spec, backing.granule_bytes)
    backing.reserve(spec, layouts)
    try:
        (layout,) = layouts
        assert backing.resident_bytes() == layout.fixed_bytes == 5 * 4096
        backing.map(GROUP, [SegmentId(2)])
        assert backing.resident_bytes() == layout.fixed_bytes + layout.segment_bytes
        backing.unmap(GROUP, [SegmentId(2)])
        assert backing.resident_bytes() == layout.fixed_bytes
    finally:
        backing.close()

"""The static backing: everything resident from the start, nothing ever comes or goes."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import sys
import weakref

import pytest
import torch

from sglang.srt.errors import BackingError, InvariantError
from sglang.srt.mem_cache.kv_layout import (
    GroupId,
    KVCacheSpec,
    KVGroupSpec,
    SegmentId,
    SegmentLayout,
)
from sglang.srt.mem_cache.segment_backing import Plane
from sglang.srt.mem_cache.segment_backing.static import StaticBacking
from sglang.srt.mem_cache.segment_cuts import (
    make_segment_layouts,
    trim_layouts_to_budget,
)
from sglang.srt.mem_cache.segment_manager import SegmentManager

MIB = 1 << 20
G = GroupId(0)
SPEC = KVCacheSpec((KVGroupSpec((0, 1)),), 2, 32, 16, "bfloat16", 16)


def budget_layouts(budget_bytes: int = 8 * MIB) -> tuple[SegmentLayout, ...]:
    layouts = make_segment_layouts(
        SPEC,
        slots_per_segment=1024,
        auto_segment_bytes=1,
        auto_min_slots=1,
        granule_bytes=StaticBacking.granule_bytes,
        machine_bytes=1 << 40,
        budget_bytes=budget_bytes,
    )
    return trim_layouts_to_budget(layouts, budget_bytes)


def test_all_of_the_budget_is_resident_and_zero() -> None:
    layouts = budget_layouts()
    backing = StaticBacking()
    backing.reserve(SPEC, layouts)
    (layout,) = layouts
    held = (layout.max_segments - 1) * layout.segment_bytes + layout.fixed_bytes
    assert held > 7 * MIB
    keys = backing.view(1, Plane.KEY)
    assert keys.shape == (layout.num_slots, 2, 32)
    assert keys.dtype == torch.bfloat16
    assert backing.view(0, Plane.VALUE).shape == (layout.num_slots, 2, 16)
    assert keys[: SPEC.page_size].count_nonzero() == 0
    assert keys[layout.slots_per_segment :].count_nonzero() == 0
    if sys.platform == "linux":
        resident = backing.resident_bytes()
        assert resident is not None
        # planes are not page aligned: up to a page at each end of both of their parts
        assert held - 1 <= resident <= held + 4 * 4 * mmap.PAGESIZE
    backing.close()
    assert backing.resident_bytes() is None


def test_map_checks_ids_and_unmap_is_a_bug() -> None:
    backing = StaticBacking()
    layouts = budget_layouts(1 * MIB)
    backing.reserve(SPEC, layouts)
    before = backing.resident_bytes()
    backing.map(G, [SegmentId(1)])
    assert backing.resident_bytes() == before
    for wrong in (0, layouts[0].max_segments):
        with pytest.raises(InvariantError, match="not all in"):
            backing.map(G, [SegmentId(wrong)])
    with pytest.raises(InvariantError, match="can't be unmapped"):
        backing.unmap(G, [SegmentId(1)])
    with pytest.raises(InvariantError, match="reserved before"):
        backing.reserve(SPEC, layouts)
    backing.close()
    for unreserved in (backing, StaticBacking()):
        with pytest.raises(InvariantError, match="not been reserved"):
            unreserved.view(0, Plane.KEY)
        with pytest.raises(InvariantError, match="not been reserved"):
            unreserved.map(G, [SegmentId(1)])


def test_more_than_the_machine_has_is_refused_at_start() -> None:
    backing = StaticBacking(available_bytes=lambda: 8 * MIB, margin_bytes=MIB)
    with pytest.raises(BackingError, match=r"static KV pool needs .*--kv-memory-budget"):
        backing.reserve(SPEC, budget_layouts())
    assert backing.resident_bytes() is None
    backing.reserve(SPEC, budget_layouts(6 * MIB))
    backing.close()


@pytest.mark.skipif(sys.platform == "win32", reason="takes its memory from torch there")
def test_whichever_plane_has_no_memory_nothing_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    real, taken, failing = mmap.mmap, [], 0

    def refuse(*args: int, **options: int) -> mmap.mmap:
        if len(taken) + 1 == failing:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        pages = real(*args, **options)
        taken.append(weakref.ref(pages))
        return pages

    monkeypatch.setattr("sglang.srt.mem_cache.segment_backing.static.mmap.mmap", refuse)
    layouts = budget_layouts(1 * MIB)
    backing = StaticBacking()
    for failing in range(1, 2 * 2 + 1):  # layers, planes
        taken.clear()
        with pytest.raises(BackingError, match=r"static KV pool: .*Cannot allocate memory"):
            backing.reserve(SPEC, layouts)
        assert len(taken) == failing - 1
        gc.collect()
        assert all(pages() is None for pages in taken)
        assert backing.resident_bytes() is None
    failing = 0
    backing.reserve(SPEC, layouts)
    backing.map(G, [SegmentId(1)])
    backing.close()


def test_a_manager_over_static_memory() -> None:
    layouts = budget_layouts(2 * MIB)
    backing = StaticBacking()
    backing.reserve(SPEC, layouts)
    manager = SegmentManager(
        layouts, backing, budget_bytes=2 * MIB, reserve_segments=1, idle_release_s=0.0
    )
    assert manager.mapped_bytes == (layouts[0].max_segments - 1) * layouts[0].segment_bytes
    assert manager.free_pages(G) == (layouts[0].max_segments - 1) * layouts[0].pages_per_segment
    assert manager.plan_shrink(1e9) is None
    manager.check()
    manager.close()

"""Makes the parts of a rank's memory: segments, page indexes, prefix cache, ladder.

`KVMemory` is the only caller. Without window groups the parts are the plain ones, so that a model
whose layers all keep every token pays nothing for windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from sglang.srt.mem_cache.allocator import PageAllocator
from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache
from sglang.srt.mem_cache.capacity import request_page_bounds
from sglang.srt.mem_cache.chunk_cache import ChunkCache
from sglang.srt.mem_cache.kv_events import KVEventRecorder
from sglang.srt.mem_cache.kv_layout import (
    KVCacheSpec,
)
from sglang.srt.mem_cache.page_ladder import Coldest, PageLadder
from sglang.srt.mem_cache.page_owner import PageIndex
from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.srt.mem_cache.rank_agreement import RankAgreement
from sglang.srt.mem_cache.segment_backing.base import SegmentBacking
from sglang.srt.mem_cache.segment_cuts import (
    make_segment_layouts,
    trim_layouts_to_budget,
)
from sglang.srt.mem_cache.segment_manager import SegmentManager
from sglang.srt.mem_cache.window_cache import WindowRadixCache
from sglang.srt.mem_cache.window_index import WindowPageIndex
from sglang.srt.mem_cache.window_ladder import WindowPageLadder
from sglang.srt.mem_cache.window_rule import window_rules


def make_manager(
    spec: KVCacheSpec,
    backing: SegmentBacking,
    *,
    budget_bytes: int,
    machine_bytes: int,
    slots_per_segment: int | None,
    auto_segment_bytes: int,
    auto_min_slots: int,
    reserve_segments: int,
    idle_release_s: float,
    now: float,
    ranks: RankAgreement | None,
    kv_parallel: int,
    lower_budget_bytes: int,
) -> SegmentManager:
    """Cut the slot space into segments, reserve it, and map the idle state.

    Parameters and errors: see `KVMemory.create`.
    """
    layouts = make_segment_layouts(
        spec,
        slots_per_segment=slots_per_segment,
        auto_segment_bytes=auto_segment_bytes,
        auto_min_slots=auto_min_slots,
        granule_bytes=backing.granule_bytes,
        machine_bytes=machine_bytes,
        budget_bytes=budget_bytes + lower_budget_bytes,
        kv_parallel=kv_parallel,
    )
    if not backing.elastic:
        layouts = trim_layouts_to_budget(layouts, budget_bytes)
    backing.reserve(spec, tuple(layout.on_rank for layout in layouts))
    return SegmentManager(
        layouts,
        backing,
        budget_bytes=budget_bytes,
        reserve_segments=reserve_segments,
        idle_release_s=idle_release_s,
        now=now,
        ranks=ranks,
        lower_budget_bytes=lower_budget_bytes,
    )


def make_allocators(spec: KVCacheSpec, manager: SegmentManager) -> tuple[PageAllocator, ...]:
    """One allocator per group, its page counts kept by the manager."""
    return tuple(
        PageAllocator(
            layout,
            partial(manager.add_pages, layout.group),
            PageIndex if rule is None else WindowPageIndex,
        )
        for layout, rule in zip(manager.layouts, window_rules(spec), strict=True)
    )


def make_prefix_cache(
    spec: KVCacheSpec,
    allocators: Sequence[PageAllocator],
    enable: bool,
    policy: str,
    events: KVEventRecorder | None,
) -> BasePrefixCache:
    """A cache over the allocators' pages; the one that keeps nothing unless `enable`."""
    if not enable:
        return ChunkCache(spec.num_groups)
    indexes, rules = [allocator.index for allocator in allocators], window_rules(spec)
    if any(rules):
        return WindowRadixCache(indexes, spec.page_size, policy, rules, events)
    return RadixCache(indexes, spec.page_size, policy, events)


def make_ladder(
    spec: KVCacheSpec,
    manager: SegmentManager,
    allocators: tuple[PageAllocator, ...],
    cache: BasePrefixCache,
    coldest: Coldest,
    prefill_chunk: int,
) -> PageLadder:
    """The scarcity ladder; `prefill_chunk` is the most tokens of a request in one step."""
    if any(window_rules(spec)):
        bounds = request_page_bounds(spec, prefill_chunk)
        return WindowPageLadder(manager, allocators, cache, coldest, bounds)
    return PageLadder(manager, allocators, cache, coldest)

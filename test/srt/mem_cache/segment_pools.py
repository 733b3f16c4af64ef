"""Small pools over the fake backing, with one group and with two; for tests only."""

from __future__ import annotations

from sglang.srt.mem_cache.kv_layout import (
    GroupKind,
    KVCacheSpec,
    KVGroupSpec,
    SegmentLayout,
)
from sglang.srt.mem_cache.segment_cuts import (
    make_segment_layouts,
)
from sglang.srt.mem_cache.segment_manager import SegmentManager
from sglang.srt.mem_cache.segment_state import SegmentState, TicketOutcome
from srt.mem_cache.fake_backing import FakeBacking

ONE_GROUP = KVCacheSpec((KVGroupSpec((0, 1)),), 1, 4, 4, "float32", 4)  # 64 bytes a token
TWO_GROUPS = KVCacheSpec(
    (KVGroupSpec((0, 1, 2)), KVGroupSpec((3,), GroupKind.SLIDING, 8)), 1, 4, 4, "float32", 4
)
PAGES_PER_SEGMENT = 4
SEGMENT_BYTES = 16 * 64  # of ONE_GROUP

STATES = tuple(SegmentState)


def small_layouts(spec: KVCacheSpec = ONE_GROUP, segments: int = 9) -> tuple[SegmentLayout, ...]:
    """Segments of 16 tokens; in the second group, if any, of 32. `segments` usable ones."""
    layouts = make_segment_layouts(
        spec,
        slots_per_segment=16,
        auto_segment_bytes=1,
        auto_min_slots=1,
        granule_bytes=1,
        machine_bytes=segments * 16 * spec.bytes_per_slot(spec.group_of_layer()[0]),
        budget_bytes=0,
    )
    if spec.num_groups == 1:
        return layouts
    wide = make_segment_layouts(
        spec,
        slots_per_segment=32,
        auto_segment_bytes=1,
        auto_min_slots=1,
        granule_bytes=1,
        machine_bytes=segments * 32 * spec.bytes_per_slot(spec.group_of_layer()[3]),
        budget_bytes=0,
    )
    return (layouts[0], wide[1])


def make_pool(
    spec: KVCacheSpec = ONE_GROUP,
    *,
    budget_bytes: int = 5 * SEGMENT_BYTES,
    reserve_segments: int = 0,
    segments: int = 9,
    elastic: bool = True,
) -> tuple[SegmentManager, FakeBacking]:
    backing = FakeBacking(elastic=elastic)
    layouts = small_layouts(spec, segments)
    backing.reserve(spec, layouts)
    manager = SegmentManager(
        layouts,
        backing,
        budget_bytes=budget_bytes,
        reserve_segments=reserve_segments,
        idle_release_s=30.0,
    )
    return manager, backing


def grow(manager: SegmentManager, *pages: int, take_empty: bool = False) -> TicketOutcome:
    """Plan, apply and wait; the plan must exist."""
    plan = manager.plan_growth(pages, take_empty=take_empty)
    assert plan is not None
    return manager.wait(manager.apply(plan))


def snapshot(manager: SegmentManager) -> object:
    """All that a refused map has to leave as it was (refusals and milliseconds excepted)."""
    return [
        (
            dict(stats.segments),
            (stats.pages_free, stats.pages_used, stats.pages_cached),
            stats.mapped_bytes,
            {
                id: repr(s)
                for id, s in manager.segments(stats.group).items()
                if s.state.value != "reserved"
            },
        )
        for stats in manager.stats()
    ]

"""A machine that refuses: map or unmap number n fails, for every n; all counts are restored."""

from __future__ import annotations

import pytest

from sglang.srt.mem_cache.kv_layout import GroupId, KVCacheSpec, SegmentId
from sglang.srt.mem_cache.segment_budget import FIRST_PAUSE_S, LONGEST_PAUSE_S, GrowthPause
from sglang.srt.mem_cache.segment_manager import SegmentManager
from sglang.srt.mem_cache.segment_state import SegmentState
from srt.mem_cache.fake_backing import FakeBacking
from srt.mem_cache.segment_pools import (
    ONE_GROUP,
    PAGES_PER_SEGMENT,
    SEGMENT_BYTES,
    TWO_GROUPS,
    grow,
    make_pool,
    snapshot,
)

G = GroupId(0)
BIG = 1 << 20


def used_pool(spec: KVCacheSpec) -> tuple[SegmentManager, FakeBacking]:
    """Two segments per group mapped, page counts on the first."""
    manager, backing = make_pool(spec, budget_bytes=BIG)
    grow(manager, *([5] * spec.num_groups))
    for group in range(spec.num_groups):
        manager.add_pages(GroupId(group), SegmentId(1), used=2, cached=1)
    return manager, backing


@pytest.mark.parametrize("spec", [ONE_GROUP, TWO_GROUPS], ids=["one group", "two groups"])
def test_whichever_map_of_a_plan_fails_everything_is_as_before(spec: KVCacheSpec) -> None:
    for failing in range(1, spec.num_groups + 1):
        manager, backing = used_pool(spec)
        before = snapshot(manager)
        mapped = set(backing.mapped)
        backing.failing_maps = {backing.num_maps + failing}
        outcome = grow(manager, *([9] * spec.num_groups))
        assert not outcome.succeeded
        assert "told to fail" in (outcome.refused or "")
        assert outcome.mapped == ((),) * spec.num_groups
        assert snapshot(manager) == before
        assert backing.mapped == mapped
        assert sum(stats.refused_count for stats in manager.stats()) > 0
        manager.check()
        manager.note_time(10.0)
        assert grow(manager, *([9] * spec.num_groups)).succeeded
        manager.check()
        manager.close()


def test_what_the_undo_can_not_give_back_stays_mapped() -> None:
    manager, backing = make_pool(TWO_GROUPS, budget_bytes=BIG)
    backing.failing_maps = {2}
    backing.failing_unmaps = {1}
    outcome = grow(manager, 4, 8)
    assert "undoing it failed" in (outcome.refused or "")
    assert outcome.mapped == ((1,), ())
    assert backing.mapped == {(0, 1)}
    assert manager.segments(GroupId(0))[SegmentId(1)].state is SegmentState.MAPPED
    assert manager.segments(GroupId(1))[SegmentId(1)].state is SegmentState.RESERVED
    manager.check()
    manager.close()


def test_a_refused_unmap_leaves_the_segments_mapped_and_waits_again() -> None:
    manager, backing = make_pool()
    grow(manager, 8)
    backing.failing_unmaps = {1}
    manager.note_time(100.0)
    plan = manager.plan_shrink(100.0)
    assert plan is not None
    outcome = manager.wait(manager.apply(plan))
    assert not outcome.succeeded
    assert outcome.unmapped == ((),)
    assert manager.free_pages(G) == 2 * PAGES_PER_SEGMENT
    assert not manager.growth_paused
    assert manager.plan_shrink(129.0) is None
    manager.note_time(130.0)
    again = manager.plan_shrink(130.0)
    assert again is not None
    assert manager.wait(manager.apply(again)).unmapped == ((2, 1),)
    manager.check()
    manager.close()


def test_growth_pauses_after_a_refusal_and_longer_each_time() -> None:
    manager, backing = make_pool()
    backing.fail_all_maps = True
    now = 0.0
    pauses = []
    for _ in range(8):
        assert not manager.growth_paused
        grow(manager, 1)
        assert manager.growth_paused
        assert manager.plan_growth((1,)) is None
        assert manager.plan_reserve() is None
        assert manager.growable_pages(G) == 0
        began = now
        while manager.growth_paused:
            now += FIRST_PAUSE_S / 4
            manager.note_time(now)
        pauses.append(round(now - began, 6))
    assert pauses == sorted(pauses)
    assert pauses[0] == pytest.approx(FIRST_PAUSE_S, abs=0.06)
    assert pauses[-1] == pytest.approx(LONGEST_PAUSE_S, abs=0.06)
    (stats,) = manager.stats()
    assert stats.refused_count == 8
    backing.fail_all_maps = False
    assert grow(manager, 1).succeeded
    assert not manager.growth_paused
    manager.close()


def test_memory_given_back_ends_the_pause() -> None:
    manager, backing = make_pool()
    grow(manager, 4)
    backing.fail_all_maps = True
    grow(manager, 4)
    assert manager.growth_paused
    plan = manager.plan_shrink(1e3)
    assert plan is not None
    manager.wait(manager.apply(plan))
    assert not manager.growth_paused
    manager.close()


def test_the_pause_never_depends_on_earlier_success() -> None:
    pause = GrowthPause(5.0)
    assert not pause.is_on(5.0)
    pause.lengthen(5.0)
    pause.lengthen(6.0)
    assert pause.is_on(6.0 + 2 * FIRST_PAUSE_S - 1e-6)
    assert not pause.is_on(6.0 + 2 * FIRST_PAUSE_S)
    pause.end(7.0)
    pause.lengthen(8.0)
    assert not pause.is_on(8.0 + FIRST_PAUSE_S)


def test_a_failed_exchange_between_groups_tells_what_happened() -> None:
    """One group gave memory, the other's map was refused: the first does not get it back."""
    manager, backing = make_pool(TWO_GROUPS, budget_bytes=2 * 1536)
    grow(manager, 8, 0)
    backing.failing_maps = {2}
    outcome = grow(manager, 0, 8, take_empty=True)
    assert not outcome.succeeded
    assert outcome.unmapped == ((2,), ())
    assert backing.mapped == {(0, 1)}
    manager.check()
    manager.note_time(1.0)
    assert grow(manager, 0, 8).succeeded
    manager.check()
    manager.close()


def test_a_failed_unmap_of_an_exchange_maps_nothing() -> None:
    manager, backing = make_pool(TWO_GROUPS, budget_bytes=2 * 1536)
    grow(manager, 8, 0)
    before = snapshot(manager)
    backing.failing_unmaps = {1}
    outcome = grow(manager, 0, 8, take_empty=True)
    assert not outcome.succeeded
    assert (outcome.mapped, outcome.unmapped) == (((), ()), ((), ()))
    assert snapshot(manager) == before
    assert manager.mapped_bytes == 2 * SEGMENT_BYTES * 3 // 2
    manager.check()
    manager.close()

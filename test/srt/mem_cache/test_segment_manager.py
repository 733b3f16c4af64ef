"""Plans, tickets, budget, reserve, idle release and epochs, over one group."""

from __future__ import annotations

import threading

import pytest

from sglang.srt.errors import BackingError, InvariantError
from sglang.srt.mem_cache.kv_layout import GroupId, SegmentId
from sglang.srt.mem_cache.segment_manager import SegmentManager
from sglang.srt.mem_cache.segment_state import SegmentState
from srt.mem_cache.fake_backing import FakeBacking
from srt.mem_cache.segment_pools import (
    ONE_GROUP,
    PAGES_PER_SEGMENT,
    SEGMENT_BYTES,
    grow,
    make_pool,
    small_layouts,
    snapshot,
)

G = GroupId(0)


def states(manager: SegmentManager) -> dict[int, str]:
    return {id: segment.state.value for id, segment in manager.segments(G).items()}


@pytest.mark.parametrize("reserve", [0, 1, 3])
def test_starts_in_the_idle_state(reserve: int) -> None:
    manager, backing = make_pool(reserve_segments=reserve)
    assert backing.mapped == {(0, 1 + i) for i in range(reserve)}
    assert manager.mapped_bytes == reserve * SEGMENT_BYTES
    assert manager.free_pages(G) == reserve * PAGES_PER_SEGMENT
    assert manager.plan_shrink(1e9) is None
    assert manager.plan_reserve() is None
    manager.check()
    manager.close()


def test_repr_is_the_state() -> None:
    manager, _ = make_pool(reserve_segments=1)
    assert repr(manager) == (
        "SegmentManager(mapped=1024 of 5120: SegmentStats(group=0 reserved=8 mapping=0 mapped=1 "
        "draining=0 | pages free=4 used=0 cached=0 | bytes mapped=1024 fixed=256 budget=5120 | "
        "maps=1 unmaps=0 refused=0))"
    )
    manager.close()


def test_growth_is_pure_until_applied() -> None:
    manager, backing = make_pool()
    before = snapshot(manager)
    plan = manager.plan_growth((5,))
    assert plan is not None
    assert (plan.map, plan.unmap, plan.revive) == (((1, 2),), ((),), ((),))
    assert manager.plan_growth((5,)) == plan
    assert snapshot(manager) == before
    assert backing.calls == []
    manager.close()


def test_nothing_wanted_is_no_plan() -> None:
    manager, _ = make_pool()
    assert manager.plan_growth((0,)) is None
    assert manager.plan_growth((-3,)) is None
    manager.close()


def test_states_flip_only_when_asked() -> None:
    manager, backing = make_pool()
    backing.gate.clear()
    plan = manager.plan_growth((1,))
    assert plan is not None
    ticket = manager.apply(plan)
    assert manager.poll(ticket) is None
    assert states(manager) == {1: "mapping"}
    assert manager.pending_pages(G) == PAGES_PER_SEGMENT
    assert manager.free_pages(G) == 0
    assert manager.pending() == (ticket,)
    manager.check()
    backing.gate.set()
    outcome = manager.wait(ticket)
    assert outcome.succeeded
    assert outcome.mapped == ((1,),)
    assert manager.poll(ticket) is outcome
    assert manager.wait(ticket) is outcome
    assert ticket.outcome is outcome
    assert states(manager) == {1: "mapped"}
    assert manager.free_pages(G) == PAGES_PER_SEGMENT
    assert manager.pending() == ()
    manager.close()


def test_poll_after_the_thread_is_done_flips() -> None:
    manager, backing = make_pool()
    plan = manager.plan_growth((1,))
    assert plan is not None
    ticket = manager.apply(plan)
    job_done = threading.Event()
    manager._jobs[ticket.number].future.add_done_callback(  # type: ignore[union-attr]
        lambda _: job_done.set()
    )
    assert job_done.wait(60)
    assert backing.mapped == {(0, 1)}
    assert states(manager) == {1: "mapping"}
    assert manager.poll(ticket) is not None
    assert states(manager) == {1: "mapped"}
    manager.close()


def test_generation_changes_with_the_set_of_mapped_segments() -> None:
    manager, _ = make_pool()
    first = manager.generation(G)
    grow(manager, 1)
    second = manager.generation(G)
    assert second != first
    manager.add_pages(G, SegmentId(1), used=1)
    assert manager.generation(G) == second
    manager.close()


def test_the_budget_bounds_growth_all_or_nothing() -> None:
    manager, _ = make_pool(budget_bytes=3 * SEGMENT_BYTES + SEGMENT_BYTES - 1)
    assert manager.growable_pages(G) == 3 * PAGES_PER_SEGMENT
    assert manager.plan_growth((13,)) is None
    grow(manager, 12)
    assert manager.plan_growth((1,)) is None
    assert manager.growable_pages(G) == 0
    manager.close()


def test_the_slot_space_bounds_growth() -> None:
    manager, _ = make_pool(budget_bytes=1 << 40, segments=2)
    assert manager.growable_pages(G) == 2 * PAGES_PER_SEGMENT
    assert manager.plan_growth((9,)) is None
    grow(manager, 8)
    assert manager.plan_growth((1,)) is None
    manager.close()


def test_maps_under_way_count_against_the_budget() -> None:
    manager, backing = make_pool(budget_bytes=2 * SEGMENT_BYTES)
    backing.gate.clear()
    plan = manager.plan_growth((8,))
    assert plan is not None
    ticket = manager.apply(plan)
    assert manager.plan_growth((1,)) is None
    assert manager.growable_pages(G) == 0
    backing.gate.set()
    assert manager.wait(ticket).succeeded
    manager.close()


def test_a_budget_change_is_immediate_and_takes_nothing_away() -> None:
    manager, backing = make_pool(budget_bytes=2 * SEGMENT_BYTES)
    grow(manager, 8)
    manager.set_budget(SEGMENT_BYTES)
    (stats,) = manager.stats()
    assert stats.mapped_bytes == 2 * SEGMENT_BYTES > stats.budget_bytes == SEGMENT_BYTES
    assert manager.plan_growth((1,)) is None
    assert manager.growable_pages(G) == 0
    assert backing.num_unmaps == 0
    manager.set_budget(3 * SEGMENT_BYTES)
    grow(manager, 1)
    with pytest.raises(ValueError, match="negative"):
        manager.set_budget(-1)
    manager.close()


def test_plans_are_numbered_and_go_stale() -> None:
    manager, _ = make_pool()
    plan = manager.plan_growth((1,))
    assert plan is not None
    manager.wait(manager.apply(plan))
    with pytest.raises(InvariantError, match="stale"):
        manager.apply(plan)
    again = manager.plan_growth((1,))
    assert again is not None
    assert again.number == plan.number + 1
    manager.close()


def test_idle_segments_above_the_reserve_go_highest_first() -> None:
    manager, backing = make_pool(reserve_segments=1)
    manager.note_time(100.0)
    grow(manager, 12)
    for segment in (2, 3):
        manager.add_pages(G, SegmentId(segment), used=1)
    manager.note_time(110.0)
    manager.add_pages(G, SegmentId(3), used=-1, cached=1)
    manager.add_pages(G, SegmentId(3), cached=-1)
    assert manager.plan_shrink(129.9) is None
    plan = manager.plan_shrink(130.0)
    assert plan is not None
    assert plan.unmap == ((4,),)  # 1 is the reserve's, 2 is used, 3 is empty since 110
    assert manager.plan_shrink(140.0).unmap == ((4, 3),)  # type: ignore[union-attr]
    manager.wait(manager.apply(plan))
    assert states(manager) == {1: "mapped", 2: "mapped", 3: "mapped", 4: "reserved"}
    assert backing.mapped == {(0, 1), (0, 2), (0, 3)}
    manager.check()
    manager.close()


def test_after_everything_is_freed_the_reserve_is_what_stays() -> None:
    manager, backing = make_pool(reserve_segments=2)
    grow(manager, 12)
    manager.note_time(50.0)
    plan = manager.plan_shrink(50.0)
    assert plan is not None
    outcome = manager.wait(manager.apply(plan))
    assert outcome.unmapped == ((5, 4, 3),)
    assert backing.mapped == {(0, 1), (0, 2)}
    assert manager.mapped_bytes == 2 * SEGMENT_BYTES
    assert manager.plan_shrink(1e9) is None
    manager.check()
    manager.close()


def test_freed_ids_are_used_again_lowest_first() -> None:
    manager, _ = make_pool()
    grow(manager, 12)
    manager.add_pages(G, SegmentId(3), used=1)
    plan = manager.plan_shrink(1e3)
    assert plan is not None
    manager.wait(manager.apply(plan))
    assert grow(manager, 12).mapped == ((1, 2, 4),)
    manager.close()


def test_the_reserve_is_refilled_by_plan() -> None:
    manager, _ = make_pool(reserve_segments=2)
    for segment in (1, 2):
        manager.add_pages(G, SegmentId(segment), used=1)
    plan = manager.plan_reserve()
    assert plan is not None
    assert plan.map == ((3, 4),)
    manager.apply(plan)
    assert manager.plan_reserve() is None  # they are coming
    manager.close()


def test_unmapping_waits_for_the_last_forward_that_may_read() -> None:
    manager, backing = make_pool()
    grow(manager, 4)
    manager.note_launched(7)
    manager.add_pages(G, SegmentId(1), used=1)
    manager.add_pages(G, SegmentId(1), used=-1)
    plan = manager.plan_shrink(1e3)
    assert plan is not None
    ticket = manager.apply(plan)
    manager.note_completed(6)
    assert manager.poll(ticket) is None
    assert backing.num_unmaps == 0
    assert states(manager) == {1: "draining"}
    assert manager.free_pages(G) == 0
    assert manager.mapped_bytes == SEGMENT_BYTES
    manager.check()
    with pytest.raises(InvariantError, match="waits for a forward"):
        manager.wait(ticket)
    manager.note_completed(7)
    assert manager.wait(ticket).unmapped == ((1,),)
    assert backing.mapped == set()
    manager.close()


def test_a_draining_segment_is_revived_before_its_unmap_began() -> None:
    manager, backing = make_pool(budget_bytes=2 * SEGMENT_BYTES)
    grow(manager, 8)
    manager.note_launched(1)
    for segment in (1, 2):
        manager.add_pages(G, SegmentId(segment), used=1)
        manager.add_pages(G, SegmentId(segment), used=-1)
    plan = manager.plan_shrink(1e3)
    assert plan is not None
    draining = manager.apply(plan)
    assert manager.growable_pages(G) == 2 * PAGES_PER_SEGMENT
    again = manager.plan_growth((1,))
    assert again is not None
    assert (again.map, again.revive) == (((),), ((1,),))
    outcome = manager.wait(manager.apply(again))
    assert outcome.mapped == ((),)
    assert states(manager) == {1: "mapped", 2: "draining"}
    assert manager.free_pages(G) == PAGES_PER_SEGMENT
    manager.check()
    manager.note_completed(1)
    assert manager.wait(draining).unmapped == ((2,),)
    assert backing.mapped == {(0, 1)}
    assert [call for call in backing.calls if call[0] == "unmap"] == [("unmap", 0, (2,))]
    manager.check()
    manager.close()


def test_when_all_are_revived_the_waiting_plan_ends() -> None:
    manager, backing = make_pool()
    grow(manager, 4)
    manager.note_launched(1)
    manager.add_pages(G, SegmentId(1), used=1)
    manager.add_pages(G, SegmentId(1), used=-1)
    plan = manager.plan_shrink(1e3)
    assert plan is not None
    draining = manager.apply(plan)
    grow(manager, 4)
    assert manager.wait(draining).unmapped == ((),)
    assert backing.num_unmaps == 0
    assert manager.free_pages(G) == PAGES_PER_SEGMENT
    manager.close()


def test_an_unmap_that_began_is_not_revived() -> None:
    manager, backing = make_pool(budget_bytes=SEGMENT_BYTES)
    grow(manager, 4)
    backing.gate.clear()
    plan = manager.plan_shrink(1e3)
    assert plan is not None
    ticket = manager.apply(plan)
    assert manager.plan_growth((1,)) is None
    backing.gate.set()
    manager.wait(ticket)
    assert grow(manager, 1).mapped == ((1,),)
    manager.close()


def test_a_segment_in_use_can_not_be_drained() -> None:
    manager, _ = make_pool()
    grow(manager, 4)
    plan = manager.plan_shrink(1e3)
    assert plan is not None
    manager.add_pages(G, SegmentId(1), used=1)
    with pytest.raises(InvariantError, match="has pages"):
        manager.apply(plan)
    manager.close()


def test_static_memory_is_all_mapped_and_never_planned() -> None:
    manager, backing = make_pool(elastic=False, budget_bytes=9 * SEGMENT_BYTES)
    assert manager.mapped_bytes == 9 * SEGMENT_BYTES
    assert backing.calls == [("map", 0, tuple(range(1, 10)))]
    assert manager.plan_growth((1,)) is None
    assert manager.plan_growth((1,), take_empty=True) is None
    assert manager.plan_shrink(1e9) is None
    assert manager.plan_reserve() is None
    manager.close()
    with pytest.raises(ValueError, match="can't hold"):
        make_pool(elastic=False, budget_bytes=8 * SEGMENT_BYTES)


def test_a_reserve_above_the_budget_is_refused_at_start() -> None:
    with pytest.raises(ValueError, match="a KV budget of 1,024 bytes can't hold the 2,048 bytes"):
        make_pool(budget_bytes=SEGMENT_BYTES, reserve_segments=2)


def test_a_refused_start_raises_and_closes() -> None:
    backing = FakeBacking()
    backing.fail_all_maps = True
    before = threading.active_count()
    with pytest.raises(BackingError, match="told to fail"):
        SegmentManager(
            small_layouts(),
            backing,
            budget_bytes=5 * SEGMENT_BYTES,
            reserve_segments=1,
            idle_release_s=30.0,
        )
    assert backing.closed
    assert threading.active_count() == before


def test_close_ends_the_thread_and_the_backing_once() -> None:
    before = threading.active_count()
    manager, backing = make_pool(reserve_segments=1)
    plan = manager.plan_growth((1,))
    assert plan is not None
    ticket = manager.apply(plan)
    assert threading.active_count() == before + 1
    manager.close()
    manager.close()
    assert threading.active_count() == before
    assert backing.closed
    with pytest.raises(InvariantError, match="closed"):
        manager.wait(ticket)
    with pytest.raises(InvariantError, match="stale"):
        manager.apply(plan)


def test_a_bug_in_the_backing_is_not_swallowed() -> None:
    manager, backing = make_pool()

    def broken(_group: GroupId, _segments: object) -> None:
        raise ZeroDivisionError

    backing.map = broken  # type: ignore[assignment,method-assign]
    plan = manager.plan_growth((1,))
    assert plan is not None
    ticket = manager.apply(plan)
    with pytest.raises(ZeroDivisionError):
        manager.wait(ticket)
    manager.close()


def test_stats_count_maps_and_measure_with_the_given_timer() -> None:
    backing = FakeBacking()
    layouts = small_layouts()
    backing.reserve(ONE_GROUP, layouts)
    ticks = iter(range(100))
    manager = SegmentManager(
        layouts,
        backing,
        budget_bytes=5 * SEGMENT_BYTES,
        reserve_segments=0,
        idle_release_s=30.0,
        timer=lambda: float(next(ticks)),
    )
    grow(manager, 12)
    plan = manager.plan_shrink(1e3)
    assert plan is not None
    manager.wait(manager.apply(plan))
    (stats,) = manager.stats()
    assert (stats.map_count, stats.unmap_count, stats.refused_count) == (3, 3, 0)
    assert (stats.map_ms, stats.unmap_ms) == (1000.0, 1000.0)
    assert stats.segments[SegmentState.RESERVED] == 9
    manager.close()

"""The rungs one by one: free pages, growth, eviction, another group's segments, None."""

from __future__ import annotations

import numpy as np
import pytest

from sglang.srt.mem_cache.kv_layout import GroupId, SegmentLayout
from sglang.srt.mem_cache.page_ladder import joint_pages
from sglang.srt.mem_cache.segment_state import Ticket, TicketOutcome
from srt.mem_cache.fake_backing import FakeBacking
from srt.mem_cache.memory_driver import (
    MemoryDriver,
    PoisonedBacking,
    Request,
    finish_background,
    make_memory,
)


def make_driver(**options: object) -> MemoryDriver:
    memory, backing = make_memory(backing=PoisonedBacking(), **options)  # type: ignore[arg-type]
    return MemoryDriver(memory, backing)


def run(driver: MemoryDriver, tokens: list[int]) -> Request:
    """Open a request and compute its whole prompt."""
    request = driver.open(tokens)
    assert request is not None
    left = len(tokens) - request.num_computed
    assert driver.extend([(request, left)])
    return request


def cache(driver: MemoryDriver, tokens: list[int]) -> None:
    driver.close(run(driver, tokens), insert=True)
    driver.check()


def test_free_pages_come_before_new_segments() -> None:
    driver = make_driver()
    cache(driver, list(range(8)))
    maps = driver.backing.num_maps
    run(driver, list(range(50, 58)))
    assert driver.backing.num_maps == maps == 1
    assert driver.memory.ladder.free_pages() == (0,)


def test_growth_below_the_budget_comes_before_eviction() -> None:
    driver = make_driver(budget_segments=3)
    cache(driver, list(range(16)))
    run(driver, list(range(100, 132)))
    assert driver.memory.match_len(np.arange(16, dtype=np.int32)) == 16
    assert driver.backing.mapped == {(0, 1), (0, 2), (0, 3)}


def test_eviction_frees_just_what_is_needed() -> None:
    driver = make_driver(budget_segments=2)
    cache(driver, list(range(32)))
    run(driver, list(range(100, 109)))  # 3 pages
    assert driver.memory.match_len(np.arange(32, dtype=np.int32)) == 20
    driver.check()


def test_growth_takes_what_fits_and_eviction_gives_the_rest() -> None:
    driver = make_driver(budget_segments=3)
    cache(driver, list(range(32)))
    run(driver, list(range(100, 128)))  # 7 pages: one more segment has 4
    assert driver.memory.match_len(np.arange(32, dtype=np.int32)) == 20
    assert len(driver.backing.mapped) == 3
    driver.check()


def test_what_can_not_be_had_costs_nothing() -> None:
    driver = make_driver(budget_segments=2)
    cache(driver, list(range(16)))
    request = driver.open(list(range(100, 140)))
    assert request is not None
    before = repr(driver.memory)
    assert not driver.extend([(request, 36)])
    assert repr(driver.memory) == before, "no prefix was evicted and nothing was mapped for a no"
    assert driver.extend([(request, 32)])
    assert driver.memory.cache.num_pages == 0
    driver.check()


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_map_number_n_is_refused(failing: int) -> None:
    """Whatever map the machine refuses, every count is restored and a later call succeeds."""
    driver = make_driver(budget_segments=4)
    driver.backing.failing_maps.add(failing)
    request = driver.open(list(range(64)))
    assert request is not None
    done = []
    for _ in range(5):
        mapped = set(driver.backing.mapped)
        computed = request.num_computed
        done.append(request.num_computed < 64 and driver.extend([(request, 16)]))
        if not done[-1]:
            assert (driver.backing.mapped, request.num_computed) == (mapped, computed)
            driver.boundary(10.0)  # the pause after a refusal ends
        driver.check()
    assert done == [n + 1 != failing for n in range(5)]
    assert request.num_computed == 64


def test_a_refused_map_is_followed_by_eviction() -> None:
    driver = make_driver(budget_segments=4)
    cache(driver, list(range(32)))
    driver.backing.fail_all_maps = True
    run(driver, list(range(100, 116)))
    assert driver.memory.match_len(np.arange(32, dtype=np.int32)) == 16
    assert driver.memory.manager.growth_paused
    assert driver.memory.headroom_pages() == (4,), "what is mapped, less what is used"
    driver.boundary(10.0)
    assert driver.memory.headroom_pages() == (12,)
    driver.check()


def test_a_map_that_always_fails_means_none_and_harms_nothing() -> None:
    driver = make_driver()
    driver.backing.fail_all_maps = True
    request = driver.open(list(range(8)))
    assert request is not None
    for _ in range(10):
        assert not driver.extend([(request, 8)])
        driver.check()
        driver.boundary(1.0)
    assert not driver.decode([(request, 1)])
    driver.close(request, insert=True)
    assert driver.memory.memory_object()["pages"] == {"free": 0, "used": 0, "cached": 0}


def test_a_refusal_in_the_second_group_leaves_none_in_the_first() -> None:
    driver = make_driver(num_groups=2)
    driver.backing.failing_maps.add(2)
    request = driver.open(list(range(8)))
    assert request is not None
    assert not driver.extend([(request, 8)])
    assert driver.backing.mapped == set()
    driver.check()
    driver.boundary(1.0)
    assert driver.extend([(request, 8)])
    assert driver.backing.mapped == {(0, 1), (1, 1)}
    driver.check()


def test_look_ahead_maps_while_others_work() -> None:
    driver = make_driver()
    memory = driver.memory
    driver.backing.gate.clear()
    memory.on_step_boundary(0.0, (3,))
    assert memory.ladder.free_pages() == (0,)
    memory.on_step_boundary(0.1, (5,))
    assert memory.num_pending_growths == 1, "one at a time"
    driver.backing.gate.set()
    finish_background(memory)
    assert memory.ladder.free_pages() == (4,)
    run(driver, list(range(16)))
    assert driver.backing.num_maps == 1, "the step found its pages mapped"
    driver.check()


def test_the_ladder_waits_for_a_map_that_is_under_way() -> None:
    driver = make_driver()
    driver.backing.gate.clear()
    driver.memory.on_step_boundary(0.0, (4,))
    driver.backing.gate.set()
    run(driver, list(range(16)))
    assert driver.backing.num_maps == 1
    driver.check()


def test_idle_segments_go_but_not_those_that_the_next_step_wants() -> None:
    driver = make_driver(prefix_idle_s=-1)
    request = run(driver, list(range(64)))
    driver.close(request, insert=False)
    driver.boundary(100.0, expected=5)
    assert driver.backing.mapped == {(0, 1), (0, 2)}
    driver.boundary(100.0, expected=5)
    assert driver.backing.num_maps == 1, "nothing was given back only to be taken again"
    driver.boundary(100.0)
    assert driver.backing.mapped == set()
    driver.check()


def test_a_draining_segment_is_revived_instead_of_mapped() -> None:
    driver = make_driver(budget_segments=2)
    memory = driver.memory
    memory.note_launched(1)
    driver.close(run(driver, list(range(32))), insert=False)
    driver.boundary(100.0)
    assert memory.ladder.free_pages() == (0,)
    assert memory.memory_object()["segments"]["draining"] == 2  # type: ignore[index]
    run(driver, list(range(16)))
    assert driver.backing.num_maps == 1
    assert driver.backing.num_unmaps == 0
    driver.check()
    memory.note_completed(1)
    finish_background(memory)
    assert driver.backing.mapped == {(0, 1)}
    driver.check()


def test_a_refused_unmap_gives_the_segments_back_to_the_allocator() -> None:
    driver = make_driver()
    driver.close(run(driver, list(range(32))), insert=False)
    driver.backing.failing_unmaps.add(1)
    driver.boundary(100.0)
    assert driver.memory.ladder.free_pages() == (8,)
    driver.check()
    driver.boundary(100.0)
    assert driver.memory.ladder.free_pages() == (0,)
    driver.check()


def test_the_reserve_is_refilled_and_kept() -> None:
    driver = make_driver(reserve_segments=1)
    assert driver.backing.mapped == {(0, 1)}
    request = run(driver, list(range(16)))
    driver.boundary(1.0)
    assert driver.backing.mapped == {(0, 1), (0, 2)}
    driver.close(request, insert=False)
    driver.boundary(100.0)
    assert len(driver.backing.mapped) == 1
    driver.check()


def test_empty_segments_of_another_group_make_room() -> None:
    driver = make_driver(num_groups=2, budget_segments=2)
    memory = driver.memory
    ladder = memory.ladder
    assert ladder.ensure((8, 0))  # four segments in all: two for group 0 ...
    assert ladder.ensure((8, 8))  # ... and two for group 1
    assert driver.backing.mapped == {(0, 1), (0, 2), (1, 1), (1, 2)}
    assert ladder.headroom_pages() == (8, 8)
    memory.manager.set_budget(3 * memory.manager.layouts[0].segment_bytes)
    assert ladder.headroom_pages() == (4, 4)
    driver.check()


def test_taking_from_another_group() -> None:
    layouts_budget = 2
    driver = make_driver(num_groups=2, budget_segments=layouts_budget)
    ladder = driver.memory.ladder
    plan = driver.memory.manager.plan_growth((12, 0))
    assert plan is not None
    ladder._settle(*_apply(driver, plan))
    assert ladder.free_pages() == (12, 0)
    assert ladder.ensure((4, 8)), "group 0 gives one empty segment, the budget has one more"
    assert ladder.free_pages() == (8, 8)
    assert len(driver.backing.mapped) == 4
    driver.check()


def _apply(driver: MemoryDriver, plan):  # type: ignore[no-untyped-def]
    ticket = driver.memory.ladder._begin(plan)
    return ticket, driver.memory.manager.wait(ticket)


def test_joint_pages() -> None:
    def layout(group: int, pages: int, segments: int = 1000) -> SegmentLayout:
        return SegmentLayout(GroupId(group), 1, pages, segments, 1, 8, 8, 1)

    one = [layout(0, 4)]  # 64 bytes a segment
    assert joint_pages(one, 64 * 3 + 63, [0]) == 12
    assert joint_pages(one, 64 * 3, [5]) == 7
    assert joint_pages(one, 64, [9]) == 0
    assert joint_pages([layout(0, 4, 3)], 64 * 100, [0]) == 8, "the slot space is a bound too"
    two = [layout(0, 4), layout(1, 8)]  # 64 and 128 bytes a segment
    assert joint_pages(two, 64 * 4, [0, 0]) == 8
    assert joint_pages(two, 64 * 3, [0, 0]) == 4
    assert joint_pages(two, 64 * 3, [4, 0]) == 0


def test_static_memory_stands_from_the_start() -> None:
    memory, backing = make_memory(backing=FakeBacking(elastic=False), budget_segments=3)
    driver = MemoryDriver(memory, backing)
    assert memory.ladder.free_pages() == (12,)
    assert memory.capacity_tokens == 48
    cache(driver, list(range(40)))
    driver.boundary(1000.0)
    assert memory.ladder.free_pages() == (12,), "old prefixes go, memory stays"
    request = run(driver, list(range(48)))
    assert not driver.decode([(request, 1)])
    assert backing.calls == [("map", 0, (1, 2, 3))]
    driver.check()


def test_memory_on_its_way_back_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unmap under way still counts against the budget: without it there is room again."""
    driver = make_driver(budget_segments=1, idle_release_s=1.0)
    memory = driver.memory
    driver.close(run(driver, list(range(8))), insert=False)
    driver.backing.gate.clear()
    memory.on_step_boundary(5.0)
    assert memory.num_pending_growths == 1
    wait = memory.manager.wait

    def open_the_gate(ticket: Ticket) -> TicketOutcome:
        driver.backing.gate.set()
        return wait(ticket)

    monkeypatch.setattr(memory.manager, "wait", open_the_gate)
    run(driver, list(range(8)))
    assert driver.backing.mapped == {(0, 1)}


@pytest.mark.parametrize("groups", [1, 2])
def test_memory_that_is_just_being_given_back_can_be_had(groups: int) -> None:
    driver = make_driver(num_groups=groups, budget_segments=1)
    driver.close(run(driver, [1] * 5), insert=False)
    driver.memory.ladder.release_empty()
    assert driver.memory.manager.pending(), "nobody has taken over the outcome"
    run(driver, [2] * 5)
    driver.check()

"""What comes back from the tier below, and when: read by requests, room first, bounded steps."""

from __future__ import annotations

import math

from sglang.srt.mem_cache.kv_layout import GroupId
from sglang.srt.mem_cache.promotion import LOOK_EVERY_S
from sglang.srt.mem_cache.segment_state import Tier
from srt.mem_cache.disk_backing import DiskBacking
from srt.mem_cache.memory_driver import MemoryDriver, make_memory

SEGMENT = 16  # tokens
G = GroupId(0)


def driver_of(
    budget: int, lower: int, *, promotes: bool = True
) -> tuple[MemoryDriver, DiskBacking]:
    """Segments of four pages of four tokens; `budget` of them in memory, `lower` below."""
    backing = DiskBacking()
    backing.promotes = promotes
    memory, _ = make_memory(
        budget_segments=budget, disk_segments=lower, max_segments=32, backing=backing
    )
    driver = MemoryDriver(memory, backing)
    backing.before_demote = driver.check_not_written
    return driver, backing


def compute(driver: MemoryDriver, first: int, count: int) -> None:
    request = driver.open([first] * count)
    assert request is not None
    while request.num_computed < count:
        epoch = driver.memory.manager.launched_epoch + 1
        assert driver.extend([(request, min(8, count - request.num_computed))])
        driver.launch(epoch)
        driver.complete(epoch)


def below(driver: MemoryDriver) -> list[int]:
    records = driver.memory.manager.segments(G)
    return sorted(s for s, one in records.items() if one.tier is Tier.LOWER)


def boundaries(driver: MemoryDriver, count: int = 12) -> None:
    """Step boundaries, each after what was begun at the one before has ended."""
    for turn in range(1, count):
        driver.boundary(turn * LOOK_EVERY_S)
        manager = driver.memory.manager
        for ticket in manager.pending():
            manager.wait(ticket)


def two_requests(
    budget: int, lower: int, *, insert: bool, promotes: bool = True
) -> tuple[MemoryDriver, DiskBacking]:
    """One request that lies below in part, since another had grown, which has ended."""
    driver, backing = driver_of(budget, lower, promotes=promotes)
    compute(driver, 7, (budget - 1) * SEGMENT)
    compute(driver, 8, budget * SEGMENT)
    driver.check()
    assert len(below(driver)) == budget - 1
    driver.close(driver.requests[1], insert=insert)
    return driver, backing


def test_what_a_request_reads_comes_back_when_another_has_left() -> None:
    driver, backing = two_requests(4, 6, insert=False)
    boundaries(driver)
    driver.check()
    assert not below(driver)
    stats = driver.memory.manager.stats()[0]
    assert stats.promote_count == backing.num_promoted > 0
    assert stats.mapped_bytes <= stats.budget_bytes


def test_nothing_moves_up_where_the_system_keeps_what_is_read() -> None:
    driver, backing = two_requests(4, 6, insert=False, promotes=False)
    boundaries(driver)
    assert backing.num_promoted == 0
    assert below(driver)


def test_cached_prefixes_that_nobody_reads_give_their_place() -> None:
    driver, backing = two_requests(4, 8, insert=True)
    demoted = backing.num_demoted
    boundaries(driver)
    driver.check()
    assert backing.num_demoted > demoted
    records = driver.memory.manager.segments(G)
    read = driver.requests[0].lease.tables[G].page_ids // 4
    assert {records[segment].tier for segment in read.tolist()} == {Tier.DEVICE}


def test_a_step_moves_no_more_than_its_bound_and_a_look_waits_for_its_time() -> None:
    driver, backing = driver_of(6, 8)
    compute(driver, 7, 5 * SEGMENT)
    compute(driver, 8, 6 * SEGMENT)
    promoter = driver.memory._promoter
    assert promoter is not None
    promoter._step_bytes = driver.memory.manager.layouts[G].segment_bytes
    driver.boundary(0.0)  # looks, and nothing can be done: all of memory is read
    assert backing.num_promoted == 0
    driver.close(driver.requests[1], insert=False)
    driver.memory.ladder.shrink(math.inf, ())
    for ticket in driver.memory.manager.pending():
        driver.memory.manager.wait(ticket)
    left = len(below(driver))
    assert left >= 3
    driver.boundary(0.0)
    assert backing.num_promoted == 0, "the next look is not due"
    for number in range(1, left):
        driver.boundary(LOOK_EVERY_S)
        assert backing.num_promoted == number, "one a step, without a pause"


def test_room_for_the_coming_step_stays_free() -> None:
    driver, _ = two_requests(5, 8, insert=False)
    driver.memory.ladder.shrink(math.inf, ())
    for ticket in driver.memory.manager.pending():
        driver.memory.manager.wait(ticket)
    manager, promoter = driver.memory.manager, driver.memory._promoter
    assert promoter is not None
    size = manager.layouts[G].segment_bytes
    room = (manager.budget_bytes - manager.committed_bytes) // size
    assert room >= 3
    wanted = 4 * (room - 2) + driver.memory.ladder.free_pages()[0]  # two are left
    assert promoter.step(100.0, [wanted]) == 1, "of two, one is kept"


def test_a_refused_move_pauses_and_is_tried_again() -> None:
    driver, backing = two_requests(4, 6, insert=False)
    backing.fail_all_maps = True
    boundaries(driver, 5)
    driver.check()
    assert below(driver)
    assert driver.memory.manager.growth_paused
    backing.fail_all_maps = False
    boundaries(driver, 60)
    driver.check()
    assert not below(driver)

"""What goes to disk and when: the ladder, capacity, budget cuts, refusals, real contents."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest

from sglang.srt.mem_cache.allocation import KVMemory
from sglang.srt.mem_cache.kv_layout import GroupId
from sglang.srt.mem_cache.reclaim import Reclaim, reclaim_step
from sglang.srt.mem_cache.segment_backing.disk_file import DiskFile
from sglang.srt.mem_cache.segment_backing.mmap_disk import MmapDiskBacking
from sglang.srt.mem_cache.segment_manager import SegmentManager
from srt.mem_cache.disk_backing import DiskBacking
from srt.mem_cache.fake_backing import FakeBacking
from srt.mem_cache.memory_driver import MemoryDriver, finish_background, make_memory, tiny_spec

SEGMENT = 16  # tokens
G = GroupId(0)


def driver_of(budget: int, disk: int, **options: object) -> tuple[MemoryDriver, DiskBacking]:
    """Segments of four pages of four tokens; `budget` of them in memory, `disk` on disk."""
    backing = DiskBacking()
    memory, _ = make_memory(
        budget_segments=budget, disk_segments=disk, max_segments=32, backing=backing, **options
    )
    driver = MemoryDriver(memory, backing)
    backing.before_demote = driver.check_not_written
    return driver, backing


def computed(driver: MemoryDriver, first: int, count: int, chunk: int = 8) -> int:
    """A request whose tokens are all `first`; returns how many could be computed."""
    request = driver.open([first] * count)
    assert request is not None
    while request.num_computed < count:
        epoch = driver.memory.manager.launched_epoch + 1
        if not driver.extend([(request, min(chunk, count - request.num_computed))]):
            break
        driver.launch(epoch)
        driver.complete(epoch)
    return request.num_computed


def test_a_request_larger_than_memory_is_computed_and_stays_whole() -> None:
    driver, backing = driver_of(budget=2, disk=6)
    assert driver.memory.capacity_tokens == 8 * SEGMENT
    assert computed(driver, 7, 8 * SEGMENT) == 8 * SEGMENT
    driver.check()
    assert (len(backing.mapped), len(backing.on_disk)) == (2, 6)
    assert not driver.decode([(driver.requests[0], 1)])  # not a page more
    driver.close(driver.requests[0], insert=False)
    driver.boundary(0.0)
    assert not backing.on_disk, "empty segments on disk wait for nobody"


def test_the_oldest_part_of_a_lone_request_goes_and_the_end_stays_in_memory() -> None:
    driver, backing = driver_of(budget=3, disk=8)
    computed(driver, 7, 6 * SEGMENT)
    pages = driver.requests[0].lease.tables[0].page_ids
    order = list(dict.fromkeys((pages // 4).tolist()))
    assert backing.on_disk == {(0, segment) for segment in order[:3]}
    assert backing.mapped == {(0, segment) for segment in order[3:]}


def test_cached_prefixes_go_to_disk_before_they_are_dropped() -> None:
    driver, backing = driver_of(budget=2, disk=2)
    computed(driver, 7, 2 * SEGMENT)
    driver.close(driver.requests[0], insert=True)
    computed(driver, 8, 2 * SEGMENT)
    assert driver.memory.cache.num_pages == 8
    assert len(backing.on_disk) == 2
    hit = driver.open([7] * (2 * SEGMENT) + [1])
    assert hit is not None
    assert hit.num_computed == 2 * SEGMENT
    driver.check()
    driver.close(hit, insert=False)
    assert computed(driver, 9, 2 * SEGMENT) == 2 * SEGMENT  # now the prefix has to go
    assert driver.memory.cache.num_pages == 0
    driver.check()


def test_what_nobody_reads_goes_before_what_a_request_reads() -> None:
    driver, backing = driver_of(budget=3, disk=3)
    computed(driver, 7, SEGMENT)
    computed(driver, 8, SEGMENT)
    cached = set(backing.mapped)
    read = int(driver.requests[1].lease.tables[0].page_ids[0]) // 4
    driver.close(driver.requests[0], insert=True)
    cached.discard((0, read))
    computed(driver, 9, 2 * SEGMENT)
    assert backing.on_disk == cached


def test_a_full_disk_is_scarcity_and_the_numbers_say_so() -> None:
    driver, backing = driver_of(budget=2, disk=4)
    backing.failing_disk = set(range(1, 100))
    assert computed(driver, 7, 6 * SEGMENT) == 2 * SEGMENT
    assert driver.memory.manager.reach_bytes == driver.memory.manager.budget_bytes
    assert driver.memory.headroom_pages() == (0,)
    driver.check()
    backing.failing_disk.clear()
    driver.boundary(1.0)  # the pause is over
    assert driver.memory.headroom_pages() == (16,)
    request = driver.requests[0]
    assert driver.extend([(request, 4 * SEGMENT)])
    driver.check()


def test_memory_that_the_machine_refuses_is_had_on_disk() -> None:
    driver, backing = driver_of(budget=8, disk=8)
    backing.fail_all_maps = True
    assert computed(driver, 7, 3 * SEGMENT) == 3 * SEGMENT
    assert (len(backing.mapped), len(backing.on_disk)) == (0, 3)
    driver.check()


def test_a_lower_budget_sends_segments_to_disk_and_evicts_nothing() -> None:
    driver, backing = driver_of(budget=4, disk=4)
    computed(driver, 7, 2 * SEGMENT)
    driver.close(driver.requests[0], insert=True)
    computed(driver, 8, 2 * SEGMENT)
    manager = driver.memory.manager
    manager.set_budget(manager.layouts[0].segment_bytes)
    for _ in range(10):
        done = reclaim_step(driver.memory)
        finish_background(driver.memory)
        driver.check()
        if done.state is Reclaim.HOLDS:
            break
        assert done.evicted_pages == 0
    assert (len(backing.mapped), len(backing.on_disk)) == (1, 3)
    assert driver.memory.cache.num_pages == 8


def test_segments_with_what_a_forward_writes_stay() -> None:
    driver, backing = driver_of(budget=2, disk=8)
    request = driver.open([7] * (6 * SEGMENT))
    assert request is not None
    for epoch in range(1, 4):  # chunks as large as memory, each placed while the last one runs
        assert driver.extend([(request, 2 * SEGMENT)])
        driver.launch(epoch)
        driver.complete(epoch - 1)
        driver.check()
    assert len(backing.on_disk) == 4
    assert backing.num_demoted == 2, "the second chunk began on disk, the first had to stay"


def test_a_backing_without_a_disk_has_no_tier() -> None:
    memory, backing = make_memory()
    layouts = memory.manager.layouts
    with pytest.raises(ValueError, match="the fake backing has no tier below memory"):
        SegmentManager(
            layouts,
            FakeBacking(),
            budget_bytes=1 << 20,
            reserve_segments=0,
            idle_release_s=1.0,
            lower_budget_bytes=1 << 20,
        )
    assert backing.mapped == set()


@pytest.mark.skipif(sys.platform != "linux", reason="the mmap backing needs Linux")
def test_on_a_real_disk_every_token_reads_what_was_written(tmp_path: Path) -> None:
    backing = MmapDiskBacking(DiskFile(tmp_path))
    segment = 12 * mmap.PAGESIZE // 4  # the narrower plane has 4 bytes a token
    memory = KVMemory.create(
        tiny_spec(),
        backing,
        budget_bytes=2 * segment,
        lower_budget_bytes=6 * segment,
        machine_bytes=16 * segment,
        max_requests=4,
        slots_per_segment=1,
    )
    assert memory.manager.layouts[0].segment_bytes == segment
    driver = MemoryDriver(memory, FakeBacking())
    tokens = mmap.PAGESIZE // 4
    assert computed(driver, 7, 5 * tokens, chunk=300) == 5 * tokens
    driver.check()
    assert memory.manager.lower_bytes == 3 * segment
    for token in (1, 2, 3):
        assert driver.decode([(driver.requests[0], token)])
    driver.close(driver.requests[0], insert=True)
    assert computed(driver, 8, 2 * tokens, chunk=300) == 2 * tokens
    again = driver.open([7] * (5 * tokens) + [1, 2, 3, 4])
    assert again is not None
    assert again.num_computed >= 5 * tokens - 4
    driver.check()
    while driver.requests:
        driver.close(driver.requests[-1], insert=False)
    assert memory.flush()
    for _ in range(2):
        driver.boundary(100.0)
    assert memory.manager.lower_bytes == memory.manager.mapped_bytes == 0
    assert backing.lower_bytes() == 0
    memory.close_pool()

"""Compaction: which pages move where, and that nobody notices but the segments."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from sglang.srt.errors import InvariantError
from sglang.srt.mem_cache.compaction import compact, plan_compaction
from sglang.srt.mem_cache.kv_layout import (
    GroupId,
    KVCacheSpec,
    KVGroupSpec,
    SegmentId,
)
from sglang.srt.mem_cache.page_copy import copy_pages
from sglang.srt.mem_cache.page_owner import PageIndex, PageState
from sglang.srt.mem_cache.segment_backing.segment_table import SegmentTableBacking
from sglang.srt.mem_cache.segment_cuts import (
    make_segment_layouts,
)
from sglang.srt.mem_cache.segment_table_pool import (
    make_kv_pool,
)
from srt.mem_cache.memory_driver import (
    MemoryDriver,
    PoisonedBacking,
    finish_background,
    make_memory,
)
from srt.mem_cache.segment_pools import small_layouts

PER = 4  # pages of a segment


def index_of(*owned: int) -> PageIndex:
    """Segments 1, 2, ... whose first owned[i] pages are used."""
    index = PageIndex(small_layouts()[0])
    assert index.layout.pages_per_segment == PER
    for segment, count in enumerate(owned, 1):
        index.add_segment(segment)
        index.take(np.arange(segment * PER, segment * PER + count, dtype=np.int32))
    return index


def test_the_emptiest_segments_move_into_the_fullest() -> None:
    plan = plan_compaction(index_of(3, 1, 2, 0), max_pages=100)
    assert plan is not None
    # 6 pages fit in two segments: only segment 2 goes, into segment 1, the fullest
    assert (plan.sources.tolist(), plan.targets.tolist(), plan.num_emptied) == ([8], [7], 1)


def test_of_equals_the_highest_id_goes() -> None:
    plan = plan_compaction(index_of(1, 1, 1), max_pages=100)
    assert plan is not None
    assert (plan.sources.tolist(), plan.targets.tolist(), plan.num_emptied) == ([12, 8], [5, 6], 2)


@pytest.mark.parametrize("owned", [(), (0, 0), (1,), (4, 4), (4, 3), (3, 2), (0, 4, 1)])
def test_what_can_not_be_packed_better_stays(owned: tuple[int, ...]) -> None:
    assert plan_compaction(index_of(*owned), max_pages=100) is None


def test_a_bound_cuts_a_segment_and_the_next_plan_goes_on_with_it() -> None:
    index = index_of(2, 2)
    first = plan_compaction(index, max_pages=1)
    assert first is not None
    assert (first.sources.tolist(), first.targets.tolist(), first.num_emptied) == ([8], [6], 0)
    index.relocate(first.sources, first.targets)
    second = plan_compaction(index, max_pages=1)
    assert second is not None
    assert (second.sources.tolist(), second.targets.tolist(), second.num_emptied) == ([9], [7], 1)
    assert plan_compaction(index, max_pages=0) is None


def test_random_indexes_end_in_their_fewest_segments() -> None:
    rng = random.Random(5)
    for _ in range(200):
        owned = [rng.randrange(PER + 1) for _ in range(rng.randrange(1, 9))]
        index = index_of(*owned)
        while (plan := plan_compaction(index, max_pages=rng.randrange(1, 9))) is not None:
            assert not set(plan.sources.tolist()) & set(plan.targets.tolist())
            index.relocate(plan.sources, plan.targets)
        held = index.segment_counts(PageState.USED)
        assert int(held.sum()) == sum(owned)
        assert int((held > 0).sum()) == -(-sum(owned) // PER)


def test_relocating_is_refused_unless_owned_goes_to_free() -> None:
    index = index_of(2, 1)
    for source, target in ((6, 7), (4, 5)):
        with pytest.raises(InvariantError):
            index.relocate(np.array([source], np.int32), np.array([target], np.int32))


# ---- with contents -----------------------------------------------------------------------------


def scattered(groups: int, seed: int, **options: object) -> MemoryDriver:
    """Running and cached sequences of shared prefixes, full of holes."""
    rng = random.Random(seed)
    memory, backing = make_memory(
        num_groups=groups,
        budget_segments=24,
        max_segments=30,
        max_requests=24,
        backing=PoisonedBacking(),
        **options,
    )
    driver = MemoryDriver(memory, backing)
    for i in range(20):
        shared = [7] * 4 * rng.randrange(4)
        request = driver.open([*shared, *([i] * rng.randrange(5, 12))])
        assert request is not None
        assert driver.extend([(request, len(request.tokens) - request.num_computed)])
        if rng.random() < 0.5:
            driver.cache_prefix(request, request.num_computed)
    for request in rng.sample(driver.requests, 13):
        driver.close(request, insert=rng.random() < 0.4)
    driver.check()
    return driver


def nonempty(driver: MemoryDriver) -> list[int]:
    found = []
    for allocator in driver.memory.allocators:
        free = allocator.index.segment_counts(PageState.FREE)
        mapped = [s for s in range(len(free)) if allocator.index.is_mapped(s)]
        found.append(sum(int(free[s]) < PER for s in mapped))
    return found


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("max_bytes", [1, 200, 1 << 30])
@pytest.mark.parametrize("seed", range(4))
def test_contents_stay_and_segments_empty(groups: int, max_bytes: int, seed: int) -> None:
    driver = scattered(groups, seed)
    memory = driver.memory
    matches = {
        tuple(r.tokens): memory.match_len(np.array(r.tokens, np.int32)) for r in driver.requests
    }
    before, moved, emptied = nonempty(driver), 0, 0
    while (done := compact(memory, max_bytes)) is not None:
        assert done.moved_pages > 0
        assert done.moved_bytes <= max(max_bytes, 48), "one page at least, else within the bound"
        moved += done.moved_pages
        emptied += done.emptied_segments
        driver.check()
    owned = [a.index.num_used + a.index.num_cached for a in memory.allocators]
    assert nonempty(driver) == [-(-pages // PER) for pages in owned]
    assert sum(before) - sum(nonempty(driver)) == emptied > 0
    assert moved > 0
    for tokens, length in matches.items():
        assert memory.match_len(np.array(tokens, np.int32)) == length
    memory.ladder.release_empty()
    finish_background(memory)
    assert memory.manager.mapped_bytes == 192 * sum(nonempty(driver))
    driver.check()
    for request in list(driver.requests):  # life goes on
        driver.decode([(request, 3)])
        driver.close(request, insert=True)
        driver.check()


def test_an_older_snapshot_still_says_what_it_said() -> None:
    driver = scattered(1, 1)
    tables = [request.lease.tables[0] for request in driver.requests]
    snapshots = [table.snapshot() for table in tables]
    before = [(snap.page_ids.copy(), list(snap.runs)) for snap in snapshots]
    assert compact(driver.memory, 1 << 30) is not None
    assert any(
        (table.page_ids != ids).any() for table, (ids, _) in zip(tables, before, strict=True)
    )
    for snap, (ids, runs) in zip(snapshots, before, strict=True):
        assert snap.page_ids.tolist() == ids.tolist()
        assert snap.runs == runs


def test_without_a_prefix_cache() -> None:
    driver = scattered(1, 2, enable_prefix_cache=False)
    assert compact(driver.memory, 1 << 30) is not None
    driver.check()


def test_a_refused_unmap_leaves_the_segment_usable() -> None:
    driver = scattered(1, 3)
    assert compact(driver.memory, 1 << 30) is not None
    mapped = driver.memory.manager.mapped_bytes
    driver.backing.failing_unmaps.add(driver.backing.num_unmaps + 1)
    driver.memory.ladder.release_empty()
    finish_background(driver.memory)
    assert driver.memory.manager.mapped_bytes == mapped
    driver.check()
    driver.memory.ladder.release_empty()
    finish_background(driver.memory)
    assert driver.memory.manager.mapped_bytes < mapped
    driver.check()


def test_a_lost_copy_is_seen_by_the_contents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang.srt.mem_cache.compaction.copy_pages", lambda *_: None)
    driver = scattered(1, 1)
    assert compact(driver.memory, 1 << 30) is not None
    with pytest.raises(AssertionError):
        driver.check()


def test_pages_move_within_a_segment_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planes in pieces: sources and targets in several segments, through a buffer of two pages."""
    spec = KVCacheSpec((KVGroupSpec((0, 1)),), 2, 8, 8, "bfloat16", 4)
    (layout,) = make_segment_layouts(
        spec,
        slots_per_segment=16,
        auto_segment_bytes=1,
        auto_min_slots=1,
        granule_bytes=1,
        machine_bytes=1 << 16,
        budget_bytes=1 << 15,
    )
    backing = SegmentTableBacking(available_bytes=lambda: 1 << 40)
    backing.reserve(spec, (layout,))
    group = GroupId(0)
    backing.map(group, [SegmentId(1), SegmentId(2), SegmentId(4)])
    pool = make_kv_pool(spec, (layout,), backing)
    slots = torch.arange(16, 48)
    for layer in range(2):
        k = torch.randn(32, 2, 8, dtype=torch.bfloat16)
        pool.set_kv_buffer(layer, slots, k, k + 1)
    sources, targets = np.array([4, 6, 9, 10], np.int32), np.array([17, 16, 18, 5], np.int32)
    offsets = np.arange(4)
    before = (sources[:, None].astype(np.int64) * 4 + offsets).reshape(-1)
    after = (targets[:, None].astype(np.int64) * 4 + offsets).reshape(-1)
    expected = [
        plane[torch.from_numpy(before)] for layer in range(2) for plane in pool.get_kv_buffer(layer)
    ]
    monkeypatch.setattr("sglang.srt.mem_cache.page_copy.COPY_BUFFER_BYTES", 2 * 4 * 2 * 8 * 2)
    copy_pages(pool, group, sources, targets)
    found = [
        plane[torch.from_numpy(after)] for layer in range(2) for plane in pool.get_kv_buffer(layer)
    ]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))

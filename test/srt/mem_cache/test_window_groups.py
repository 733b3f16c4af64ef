"""Groups that recycle: which pages stay, when they are free, and where a prefix is usable."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang.srt.mem_cache.allocation import KVLease, KVMemory, PageNeed
from sglang.srt.mem_cache.capacity import request_page_bounds
from sglang.srt.mem_cache.kv_layout import GroupKind
from sglang.srt.mem_cache.page_owner import PageState
from sglang.srt.mem_cache.window_index import WindowPageIndex
from sglang.srt.mem_cache.window_rule import WindowRule
from srt.mem_cache.memory_driver import FULL, MemoryDriver, Request, Window, make_memory

PAGE = 4
SLIDING_10 = (FULL, (GroupKind.SLIDING, 10))
CHUNKED_8 = (FULL, (GroupKind.CHUNKED, 8))

KINDS = st.sampled_from([GroupKind.SLIDING, GroupKind.CHUNKED])


def memory_of(windows: tuple[Window, ...], **options: object) -> KVMemory:
    return make_memory(windows=windows, max_segments=32, **options)[0]  # type: ignore[arg-type]


def open_lease(memory: KVMemory, tokens: np.ndarray) -> KVLease:
    lease = memory.open(tokens, max_prefix=len(tokens) - 1)
    assert lease is not None
    return lease


def extend(memory: KVMemory, lease: KVLease, count: int) -> None:
    assert memory.alloc_for_extend([PageNeed(lease, count)]) is not None


def run(driver: MemoryDriver, tokens: list[int], chunk: int = 16) -> Request:
    """Compute a prompt in chunks, sharing as it goes, as the scheduler does."""
    request = driver.open(tokens)
    assert request is not None
    while request.num_computed < len(tokens):
        count = min(chunk, len(tokens) - request.num_computed)
        assert driver.extend([(request, count)])
        driver.cache_prefix(request, request.num_computed)
    driver.check()
    return request


class TestRule:
    @given(KINDS, st.integers(1, 40), st.sampled_from([1, 4, 8]), st.integers(0, 200))
    def test_sight_by_definition(
        self, kind: GroupKind, window: int, page: int, position: int
    ) -> None:
        rule = WindowRule(kind, window, page)
        if kind is GroupKind.SLIDING:
            seen = [q for q in range(position + 1) if q > position - window]
        else:
            seen = [q for q in range(position + 1) if q // window == position // window]
        assert rule.visible_start(position) == seen[0]
        assert rule.first_page(position) == seen[0] // page
        points = rule.first_pages(30).tolist()
        assert points == [rule.first_page(point * page) for point in range(30)]

    @given(KINDS, st.integers(1, 40), st.integers(0, 100), st.integers(1, 50))
    def test_what_is_kept_covers_the_step_and_its_snapshot_within_the_bound(
        self, kind: GroupKind, window: int, start: int, count: int
    ) -> None:
        rule = WindowRule(kind, window, PAGE)
        end_page = -(-(start + count) // PAGE)
        kept = rule.kept_page(start, count)
        assert kept <= rule.first_page(start)
        assert kept <= rule.first_page((start + count - 1) // PAGE * PAGE)
        spec = make_memory(windows=(FULL, (kind, window)))[0].spec
        bound = request_page_bounds(spec, count)[1]
        assert bound is not None
        assert end_page - kept <= bound
        decoded = rule.kept_page_of_decode(start)
        assert decoded <= rule.first_page(start)
        assert start // PAGE + 1 - decoded <= bound


class TestRecycling:
    def test_a_sliding_head_is_dropped_and_free_at_once(self) -> None:
        memory = memory_of(SLIDING_10)
        lease = open_lease(memory, np.arange(60, dtype=np.int32))
        extend(memory, lease, 24)
        assert lease.tables[1].page_ids.tolist() == [4, 5, 6, 7, 8, 9]
        extend(memory, lease, 8)  # its first query stands at 24 and sees 15
        assert lease.tables[1].first_page == 3
        assert lease.tables[1].snapshot().first_position == 12
        assert lease.tables[1].num_pages == 5
        assert lease.tables[0].num_pages == lease.tables[0].end_page == 8
        assert memory.allocators[1].index.num_used == 5
        memory.audit()

    def test_a_chunked_head_goes_at_the_chunk_s_end(self) -> None:
        memory = memory_of(CHUNKED_8)
        lease = open_lease(memory, np.arange(60, dtype=np.int32))
        firsts = []
        extend(memory, lease, 4)
        for _ in range(20):
            assert memory.alloc_for_decode([PageNeed(lease, 1)]) is not None
            firsts.append(lease.tables[1].first_page)
        # The token at 8 begins a chunk; the border before it is 4, and its chunk stays until the
        # token at 9 is placed.
        assert firsts == [0] * 5 + [2] * 8 + [4] * 7
        memory.audit()

    def test_two_rows_may_drop_the_same_page_in_one_step(self) -> None:
        driver = MemoryDriver(*make_memory(windows=SLIDING_10, budget_segments=12))
        tokens = list(range(24))
        driver.close(run(driver, tokens), insert=True)
        pair = [driver.open([*tokens, 90 + i]) for i in range(2)]
        wants = [(request, 1) for request in pair if request is not None]
        assert driver.extend(wants)
        shared = [request.lease.tables[1].page_ids[0] for request, _ in wants]
        index = driver.memory.allocators[1].index
        assert shared[0] == shared[1]
        assert index.rows[shared[0]] == 2
        for token in range(6):
            driver.memory.note_launched(token + 1)
            assert driver.decode([(request, token) for request, _ in wants])
            driver.check()
        assert [request.lease.tables[1].first_page for request, _ in wants] == [4, 4]
        assert index.rows[shared[0]] == 2, "a forward may still read it"
        driver.memory.note_completed(6)
        assert index.rows[shared[0]] == 0
        driver.check()

    def test_pages_wait_for_the_forward_that_may_read_them(self) -> None:
        memory = memory_of(SLIDING_10)
        lease = open_lease(memory, np.arange(60, dtype=np.int32))
        extend(memory, lease, 24)
        memory.note_launched(1)
        extend(memory, lease, 8)
        index = memory.allocators[1].index
        assert index.state[[4, 5, 6]].tolist() == [PageState.USED] * 3
        memory.note_launched(2)
        memory.audit()
        memory.note_completed(1)
        assert index.state[[4, 5, 6]].tolist() == [PageState.FREE] * 3
        memory.audit()

    def test_a_request_beyond_the_pool_s_window_space_lives_in_few_pages(self) -> None:
        memory = memory_of(((GroupKind.SLIDING, 10),), budget_segments=2, prefill_chunk=8)
        lease = open_lease(memory, np.arange(10, dtype=np.int32))
        for _ in range(500):
            extend(memory, lease, 8)
        assert lease.num_tokens == 4000
        assert memory.capacity_tokens > 100
        assert memory.manager.mapped_bytes <= 2 * memory.manager.layouts[0].segment_bytes
        memory.audit()

    def test_shared_window_pages_are_nobody_s_own(self) -> None:
        driver = MemoryDriver(*make_memory(windows=SLIDING_10))
        tokens = list(range(24))
        first = run(driver, tokens)
        driver.close(first, insert=True)
        one, two = (driver.open([*tokens, 1, 2]) for _ in range(2))
        assert one is not None
        assert two is not None
        assert driver.memory.pages_held(one.lease) == (6, 0)
        driver.close(two, insert=False)
        assert driver.memory.pages_held(one.lease) == (6, 3)
        driver.check()

    def test_an_index_of_a_window_counts_idle_pages(self) -> None:
        memory = memory_of(SLIDING_10)
        lease = open_lease(memory, np.arange(60, dtype=np.int32))
        extend(memory, lease, 8)
        index = memory.allocators[1].index
        assert isinstance(index, WindowPageIndex)
        pages = np.array([4, -1, 5], np.int32)
        index.adopt(pages, 7)
        index.drop_row(np.array([4], np.int32))
        assert (index.num_idle, index.num_cached) == (1, 2)
        assert index.idle_in(pages).tolist() == [True, False, False]
        index.release(pages)
        assert (index.num_idle, index.num_cached, index.num_used) == (0, 0, 1)
        index.adopt(np.array([5], np.int32), 7)
        index.share(np.array([5], np.int32))
        index.release(np.array([5], np.int32))  # two rows still read it: used until both are gone
        index.drop_row(np.array([5], np.int32))
        assert (index.num_idle, index.num_used, index.rows[5]) == (0, 1, 1)
        index.drop_row(np.array([5], np.int32))
        assert (index.num_idle, index.num_used, index.rows[5]) == (0, 0, 0)


class TestUsablePoint:
    @pytest.mark.parametrize("length", range(20, 46))
    @pytest.mark.parametrize("windows", [SLIDING_10, CHUNKED_8, ((GroupKind.SLIDING, 7),)])
    def test_a_prompt_and_its_answer_hit_at_full_length(
        self, windows: tuple[Window, ...], length: int
    ) -> None:
        driver = MemoryDriver(*make_memory(windows=windows))
        tokens = list(range(length))
        request = run(driver, tokens, chunk=12)
        again = driver.open(tokens)
        assert again is not None
        assert again.num_computed == (length - 1) // PAGE * PAGE
        driver.check()
        driver.close(again, insert=False)
        for token in range(13):
            driver.decode([(request, token)])
        driver.close(request, insert=True)
        for repeat, whole in ((tokens, length - 1), ([*request.tokens, 5], length + 13)):
            hit = driver.open(repeat)
            assert hit is not None
            assert hit.num_computed == whole // PAGE * PAGE
            driver.check()
            driver.close(hit, insert=False)

    def test_a_fork_moves_down_to_where_all_windows_are_held(self) -> None:
        tokens = list(range(100, 160))
        for windows, wanted in (
            (SLIDING_10, lambda shared: 56 if shared >= 56 else 0),
            (CHUNKED_8, lambda shared: 56 if shared >= 56 else shared // 8 * 8),
        ):
            driver = MemoryDriver(*make_memory(windows=windows))
            driver.close(run(driver, tokens[:57]), insert=True)
            for shared in range(1, 58):
                fork = driver.open([*tokens[:shared], 1, 2, 3])
                assert fork is not None
                assert fork.num_computed == wanted(shared), shared
                driver.check()
                driver.close(fork, insert=False)

    @settings(max_examples=40, deadline=None)
    @given(KINDS, st.integers(1, 20), st.lists(st.integers(0, 12), min_size=1, max_size=6))
    def test_equals_the_definition(self, kind: GroupKind, window: int, gaps: list[int]) -> None:
        """After any snapshots were dropped, the point is the longest whose sight is held."""
        driver = MemoryDriver(*make_memory(windows=(FULL, (kind, window)), budget_segments=20))
        tokens: list[int] = list(range(7))
        for gap in gaps:
            tokens = [*tokens, *range(gap)]
            driver.close(run(driver, tokens), insert=True)
        cache, rule = driver.memory.cache, WindowRule(kind, window, PAGE)
        while True:
            root = cache.tree.find_root(None)  # type: ignore[attr-defined]
            node, entries = root, np.empty(0, np.int32)
            while node is not None and node.children:
                (node,) = node.children.values()
                entries = np.append(entries, node.pages[1].view())
            usable = [
                point
                for point in range(len(entries) + 1)
                if (entries[rule.first_page(point * PAGE) : point] >= 0).all()
            ]
            assert cache.match_len(np.array(tokens, np.int32), None, 999) == usable[-1] * PAGE
            if not any(cache.evict_windows([0, 1])):
                break
            driver.check()


class TestPressure:
    def test_a_window_group_s_need_takes_snapshots_and_no_prefix(self) -> None:
        driver = MemoryDriver(*make_memory(windows=SLIDING_10, budget_segments=6))
        for first in (0, 100, 200):
            driver.close(run(driver, list(range(first, first + 20))), insert=True)
        cache = driver.memory.cache
        full_pages = cache.num_pages
        assert cache.evictable_pages(1) == 3 * 4
        cache.evict_windows([0, 1])
        assert cache.evictable_pages(1) == 2 * 4, "a snapshot goes whole, the coldest first"
        assert driver.memory.match_len(np.arange(20, dtype=np.int32)) == 0
        assert driver.memory.match_len(np.arange(200, 220, dtype=np.int32)) == 20
        assert cache.num_pages == full_pages
        driver.check()

    def test_snapshots_go_before_the_prefix_of_their_age(self) -> None:
        driver = MemoryDriver(*make_memory(windows=SLIDING_10, budget_segments=6))
        for first in (0, 100):
            driver.close(run(driver, list(range(first, first + 20))), insert=True)
        assert driver.memory.cache.evict_cold_windows() == 1
        assert driver.memory.match_len(np.arange(20, dtype=np.int32)) == 0
        assert driver.memory.match_len(np.arange(100, 120, dtype=np.int32)) == 20
        assert driver.memory.cache.num_pages == 10
        driver.check()

    def test_a_full_group_takes_the_segments_of_forgotten_windows(self) -> None:
        driver = MemoryDriver(*make_memory(windows=SLIDING_10, budget_segments=4))
        for first in (0, 100, 200, 300):
            driver.close(run(driver, list(range(first, first + 12))), insert=True)
        request = run(driver, list(range(1000, 1000 + 16 * 6)), chunk=8)
        assert request.num_computed == 16 * 6, "more than half of the budget is the full group's"
        driver.check()

    def test_where_no_group_keeps_all_an_edge_without_snapshot_goes(self) -> None:
        driver = MemoryDriver(*make_memory(windows=((GroupKind.SLIDING, 6),)))
        driver.close(run(driver, list(range(40))), insert=True)
        assert driver.memory.cache.num_pages == 10
        driver.memory.cache.evict_windows([1])
        assert driver.memory.cache.num_pages == 0
        aborted = driver.open(list(range(40)))
        assert aborted is not None
        driver.extend([(aborted, 16)])
        driver.cache_prefix(aborted, 16)
        driver.close(aborted, insert=False)
        assert driver.memory.cache.num_pages == 0
        driver.check()

from __future__ import annotations

import numpy as np
import pytest

from sglang.srt.errors import InvariantError
from sglang.srt.mem_cache.allocator import PageAllocator
from sglang.srt.mem_cache.base_prefix_cache import PrefixHandle
from sglang.srt.mem_cache.kv_layout import GroupId, SegmentLayout
from sglang.srt.mem_cache.radix_cache import RadixCache

PAGE = 2


class Bench:
    """A cache with real page indexes; plays the facade's part for rows."""

    def __init__(self, policy: str = "lru", num_groups: int = 1, per_segment: int = 8) -> None:
        layouts = [
            SegmentLayout(GroupId(g), PAGE, per_segment, 100, 1, 8, 8, 1) for g in range(num_groups)
        ]
        self.allocators = [PageAllocator(layout) for layout in layouts]
        for allocator in self.allocators:
            allocator.add_segments(range(1, 9))
        self.indexes = [allocator.index for allocator in self.allocators]
        self.cache = RadixCache(self.indexes, PAGE, policy)
        self.handles: list[PrefixHandle] = []

    def lock(self, *tokens: int, key: str | None = None, priority: int = 0) -> PrefixHandle:
        array = np.array(tokens, np.int32)
        hit = self.cache.match(array, key, len(tokens), priority=priority)
        self.handles.append(hit.handle)
        return hit.handle

    def add(self, handle: PrefixHandle, *tokens: int) -> list[int]:
        """Compute `tokens` (all of the sequence) past the handle in fresh pages and insert them."""
        old = handle.num_tokens // PAGE
        count = len(tokens) // PAGE
        tables = []
        for allocator in self.allocators:
            new = allocator.alloc_pages(count - old)
            assert new is not None
            tables.append(np.concatenate([np.full(old, -1, np.int32), new]))
        self.cache.insert(handle, np.array(tokens, np.int32), len(tokens), tuple(tables))
        for allocator, table in zip(self.allocators, tables, strict=True):
            allocator.index.drop_row(table[old:])  # the row is done with them
        return tables[0][old:].tolist()

    def release(self, handle: PrefixHandle) -> None:
        self.handles.remove(handle)
        self.cache.release(handle)

    def put(self, *tokens: int, key: str | None = None, priority: int = 0) -> list[int]:
        """A whole life: match, compute the rest, insert, release."""
        handle = self.lock(*tokens, key=key, priority=priority)
        pages = self.add(handle, *tokens)
        self.release(handle)
        return pages

    def find(self, *tokens: int, key: str | None = None) -> int:
        return self.cache.match_len(np.array(tokens, np.int32), key, len(tokens))

    def check(self) -> None:
        self.cache.check(self.handles)


def test_a_match_gives_pages_in_order_and_a_lock() -> None:
    bench = Bench(num_groups=2)
    pages = bench.put(1, 2, 3, 4, 5, 6)
    hit = bench.cache.match(np.array([1, 2, 3, 4, 9, 9], np.int32), None, 6)
    assert hit.num_tokens == 4
    assert [ids.tolist() for ids in hit.page_ids] == [pages[:2]] * 2
    assert (bench.cache.num_pages, bench.cache.num_locked_pages) == (3, 2)
    bench.cache.check([hit.handle])
    assert bench.cache.evict(10) == 1, "the locked part stays"
    bench.cache.release(hit.handle)
    assert bench.cache.num_evictable_pages == 2
    bench.check()


def test_a_handle_is_released_exactly_once() -> None:
    bench = Bench()
    handle = bench.lock(1, 2)
    bench.release(handle)
    with pytest.raises(InvariantError, match="twice"):
        bench.cache.release(handle)
    with pytest.raises(InvariantError, match="released"):
        bench.cache.insert(handle, np.array([1, 2], np.int32), 2, (np.array([8], np.int32),))


def test_max_tokens_and_the_page_size_bound_a_match() -> None:
    bench = Bench()
    bench.put(1, 2, 3, 4)
    tokens = np.array([1, 2, 3, 4], np.int32)
    assert [bench.cache.match_len(tokens, None, limit) for limit in range(6)] == [0, 0, 2, 2, 4, 4]
    assert bench.find(1, 2, 3) == 2


def test_namespaces_never_share() -> None:
    bench = Bench()
    one, two = bench.put(1, 2, 3, 4), bench.put(1, 2, 3, 4, key="tenant")
    bench.check()
    assert not set(one) & set(two)
    assert bench.find(1, 2, 3, 4) == bench.find(1, 2, 3, 4, key="tenant") == 4
    assert bench.find(1, 2, key="other") == 0
    bench.cache.clear()
    assert list(bench.cache.tree.nodes()) == []
    bench.check()


def test_a_running_prefill_grows_one_edge() -> None:
    bench = Bench()
    handle = bench.lock(*range(40))
    for end in range(4, 41, 4):
        bench.add(handle, *range(end))
        bench.check()
        assert bench.find(*range(40)) == end, "others see what was computed"
    nodes = [node for node in bench.cache.tree.nodes() if not node.is_root]
    assert [len(node.tokens) for node in nodes] == [40]
    assert bench.cache.num_locked_pages == 20
    bench.release(handle)
    assert bench.cache.num_evictable_pages == 20


def test_an_edge_that_another_reads_is_continued_below() -> None:
    bench = Bench()
    runner = bench.lock(*range(12))
    bench.add(runner, *range(4))
    reader = bench.lock(*range(4))
    bench.add(runner, *range(8))
    bench.add(runner, *range(12))
    bench.check()
    nodes = [node for node in bench.cache.tree.nodes() if not node.is_root]
    assert [len(node.tokens) for node in nodes] == [4, 8], "one more node, however many chunks"
    bench.release(runner)
    assert bench.cache.num_locked_pages == 2, "the reader locks what it matched and no more"
    assert bench.cache.evict(100) == 4
    bench.release(reader)
    bench.check()


def test_what_is_there_already_stays_the_rows_own() -> None:
    bench = Bench(num_groups=2)
    slow, fast = bench.lock(1, 2, 3, 4, 5, 6), bench.lock(1, 2, 3, 4, 5, 6)
    pages = bench.add(fast, 1, 2, 3, 4)
    bench.add(slow, 1, 2, 3, 4)
    assert slow.num_tokens == 0, "the handle locks only what the row reads"
    assert bench.indexes[0].num_used == 0, "the row's duplicates were freed with the row"
    own = bench.add(slow, 1, 2, 3, 4, 5, 6)
    assert slow.num_tokens == 6
    assert bench.cache.num_locked_pages == 3, "the path to the row's own pages is held"
    hit = bench.cache.match(np.array([1, 2, 3, 4, 5, 6], np.int32), None, 6)
    assert hit.page_ids[0].tolist() == [*pages, own[-1]]
    bench.cache.release(hit.handle)
    for handle in (fast, slow):
        bench.release(handle)
    bench.check()


def test_pages_computed_again_take_the_place_of_what_nobody_reads() -> None:
    """Two edges of which one is cut by a reader: what that one locks stays, below it all is new."""
    bench = Bench(num_groups=2)
    old = bench.put(1, 2, 3, 4, 5, 6)
    again = bench.lock()
    reader = bench.lock(1, 2)
    own = bench.add(again, 1, 2, 3, 4, 5, 6, 7, 8)
    bench.check()
    assert bench.cache.num_locked_pages == bench.cache.num_pages == 4
    assert [index.num_cached for index in bench.indexes] == [4, 4], "nothing is kept twice"
    hit = bench.cache.match(np.arange(1, 9, dtype=np.int32), None, 8)
    assert [ids.tolist() for ids in hit.page_ids] == [[old[0], *own[1:]]] * 2
    bench.cache.release(hit.handle)
    for handle in (again, reader):
        bench.release(handle)
    bench.check()


def test_sequences_that_part_split_an_edge_without_touching_its_handle() -> None:
    bench = Bench()
    first = bench.lock(1, 1, 2, 2, 3, 3)
    bench.add(first, 1, 1, 2, 2, 3, 3)
    other = bench.lock(1, 1, 2, 2, 9, 9)
    assert other.num_tokens == 4
    bench.check()
    bench.add(other, 1, 1, 2, 2, 9, 9)
    bench.check()
    assert bench.find(1, 1, 2, 2, 3, 3) == bench.find(1, 1, 2, 2, 9, 9) == 6
    bench.release(first)
    assert bench.cache.num_locked_pages == 3
    bench.release(other)
    assert bench.cache.num_locked_pages == 0
    bench.check()


def test_eviction_cuts_the_coldest_tail_by_what_is_needed() -> None:
    bench = Bench()
    bench.put(*range(100, 120))
    old = bench.put(*range(20))
    bench.put(*range(100, 120))  # used again: now the younger one
    assert bench.cache.evict(0) == 0
    assert bench.cache.evict(3) == 3
    assert bench.find(*range(20)) == 14
    assert bench.find(*range(100, 120)) == 20
    assert [bench.indexes[0].is_free(page) for page in old] == [False] * 7 + [True] * 3
    assert bench.cache.evict(8) == 8
    assert (bench.find(*range(20)), bench.find(*range(100, 120))) == (0, 18)
    assert bench.cache.evict(1000) == 9
    assert bench.cache.num_pages == 0
    bench.check()


def test_a_parent_goes_after_its_children() -> None:
    bench = Bench()
    bench.put(1, 1, 2, 2)
    bench.put(1, 1, 3, 3)
    assert bench.cache.evict(1) == 1
    assert (bench.find(1, 1, 2, 2), bench.find(1, 1, 3, 3)) == (2, 4)
    assert bench.cache.evict(2) == 2
    assert bench.find(1, 1) == 0
    bench.check()


def test_lfu_keeps_what_is_hit_often() -> None:
    bench = Bench("lfu")
    bench.put(1, 1)
    for _ in range(3):
        bench.release(bench.lock(1, 1))
    bench.put(2, 2)
    bench.put(3, 3)
    bench.release(bench.lock(3, 3))
    for gone in ((2, 2), (3, 3), (1, 1)):
        assert bench.find(*gone) == 2
        assert bench.cache.evict(1) == 1
        assert bench.find(*gone) == 0
        bench.check()
    with pytest.raises(ValueError, match="lru"):
        RadixCache(bench.indexes, PAGE, "random")


def test_fifo_goes_by_the_beginning_of_an_edge() -> None:
    bench = Bench("fifo", num_groups=2)
    pages = {token: bench.put(token, token) for token in (1, 2, 3)}
    bench.put(1, 1)  # used again: no younger for that
    bench.put(2, 2, 2, 2)  # longer, but as old as it was
    for gone in ((1, 1), (2, 2, 2, 2)):
        assert bench.find(*gone) == len(gone)
        assert bench.cache.evict(1) == 1
        assert bench.find(*gone) == len(gone) - 2
        bench.check()
    assert bench.cache.evict(1) == 1
    assert [bench.find(token, token) for token in (1, 2, 3)] == [0, 0, 2]
    assert [bench.indexes[1].is_free(page) for (page,) in pages.values()] == [True, True, False]


def test_priority_of_the_requests_decides_and_use_among_equals() -> None:
    bench = Bench("priority", num_groups=2)
    bench.put(1, 1, priority=2)
    bench.put(2, 2)
    bench.put(3, 3, priority=-1)
    bench.put(4, 4)
    bench.put(2, 2)  # used again
    bench.put(5, 5, priority=-1)
    bench.release(bench.lock(5, 5, priority=1))  # the highest of those that used it counts
    for gone in (3, 4, 2, 5, 1):
        assert bench.find(gone, gone) == 2
        assert bench.cache.evict(1) == 1
        assert bench.find(gone, gone) == 0
        bench.check()


def test_a_longer_request_passes_its_priority_to_what_it_stands_on() -> None:
    bench = Bench("priority")
    bench.put(1, 1, 2, 2)
    bench.put(1, 1, 3, 3, priority=7)
    bench.put(4, 4, priority=1)
    bench.put(1, 1, 5, 5, priority=-7)
    ranks = {
        tuple(node.tokens.view().tolist()): node.priority
        for node in bench.cache.tree.nodes()
        if not node.is_root
    }
    assert ranks == {(1, 1): 7, (2, 2): 0, (3, 3): 7, (4, 4): 1, (5, 5): -7}
    order = [(1, 1, 5, 5), (1, 1, 2, 2), (4, 4), (1, 1, 3, 3), (1, 1)]
    for gone in order:
        before = bench.find(*gone)
        assert bench.cache.evict(1) == 1
        assert bench.find(*gone) == before - 2, gone
        bench.check()


def test_an_emptied_segment_never_outweighs_a_priority() -> None:
    bench = Bench("priority", per_segment=2)
    pages = [bench.put(token, token, priority=token // 3) for token in (1, 2, 3)]
    assert pages == [[2], [3], [4]]  # segment 2 holds the third alone
    assert bench.cache.evict(2) == 2
    assert [bench.find(token, token) for token in (1, 2, 3)] == [0, 0, 2]


def test_eviction_prefers_a_leaf_that_empties_a_segment() -> None:
    bench = Bench(per_segment=2)
    pages = [bench.put(token, token) for token in (1, 2, 3)]
    assert pages == [[2], [3], [4]]  # segment 1 holds the first two, segment 2 the third alone
    assert bench.cache.evict(2) == 2
    found = {token: bench.find(token, token) for token in (1, 2, 3)}
    assert found == {1: 0, 2: 2, 3: 0}, "the third first, though the youngest; then by age"
    bench.check()


def test_idle_prefixes_go_by_the_time_of_their_last_use() -> None:
    bench = Bench("lfu")
    bench.cache.evict_idle(10.0, 300.0)
    bench.put(1, 1, 2, 2)
    bench.cache.evict_idle(200.0, 300.0)
    bench.put(3, 3)
    locked = bench.lock(1, 1)
    assert bench.cache.evict_idle(309.0, 300.0) == 0
    assert bench.cache.evict_idle(310.0, 300.0) == 1, "only [2, 2]: [1, 1] is in use"
    assert bench.cache.evict_idle(10_000.0, -1) == 0
    assert bench.cache.evict_idle(10_000.0, 300.0) == 1
    bench.release(locked)
    assert bench.find(1, 1) == 2, "released just now"
    assert bench.cache.evict_idle(10_300.0, 300.0) == 1
    assert bench.cache.num_pages == 0
    bench.check()


def test_one_idle_call_is_bounded() -> None:
    bench = Bench(per_segment=128)
    for token in range(300):
        bench.put(token, token)
    freed = [bench.cache.evict_idle(1000.0, 1.0) for _ in range(3)]
    assert freed == [256, 44, 0]


def test_the_tree_is_not_walked_to_evict() -> None:
    bench = Bench(per_segment=128)
    for token in range(500):
        bench.put(token, token)
    bench.cache.tree.nodes = None  # type: ignore[method-assign, assignment]
    visits = bench.cache.tree.num_visits
    assert bench.cache.evict(100) == 100
    assert bench.cache.tree.num_visits == visits


def test_the_choice_looks_at_a_bounded_part_of_a_long_leaf(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(per_segment=10_000)
    bench.put(7, 7)
    bench.put(*range(2 * 9_000))
    seen: list[int] = []
    index = bench.indexes[0]
    real = index.segments_emptied_by
    monkeypatch.setattr(
        index, "segments_emptied_by", lambda pages: seen.append(len(pages)) or real(pages)
    )
    assert bench.cache.evict(9_001) == 9_001
    assert max(seen) == 4096
    assert len(seen) <= 2 * 8
    bench.check()


def test_check_finds_a_wrong_order() -> None:
    bench = Bench()
    bench.put(1, 1, 2, 2)
    bench.put(1, 1, 3, 3)
    leaf = bench.lock(1, 1, 2, 2).node
    leaf.priority = 1
    with pytest.raises(InvariantError, match="would stay longer"):
        bench.check()


def test_check_finds_a_wrong_count() -> None:
    bench = Bench()
    handle = bench.lock(1, 1)
    bench.add(handle, 1, 1)
    with pytest.raises(InvariantError, match="not locked by that many"):
        bench.cache.check([])
    bench.check()
    handle.node.lock_ref += 1
    with pytest.raises(InvariantError, match="not locked by that many"):
        bench.check()
    handle.node.lock_ref -= 1
    bench.indexes[0].node[handle.node.pages[0].view()] = 99
    with pytest.raises(InvariantError, match="does not own"):
        bench.check()

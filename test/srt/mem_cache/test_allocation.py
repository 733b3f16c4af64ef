"""KVMemory as the scheduler uses it: exact pages, slots, states and numbers."""

from __future__ import annotations

import random

import numpy as np
import pytest

from sglang.srt.errors import BackingError, InvariantError
from sglang.srt.mem_cache.allocation import DecodeRows, KVLease, KVMemory, PageNeed
from sglang.srt.mem_cache.segment_backing import make_backing
from srt.mem_cache.fake_backing import FakeBacking
from srt.mem_cache.memory_driver import (
    MemoryDriver,
    make_memory,
    tiny_spec,
    tokens_of,
)


@pytest.fixture
def memory() -> KVMemory:
    """One group, pages of 4 tokens, segments of 4 pages, at most 6 of them, 8 rows."""
    return make_memory()[0]


def open_lease(memory: KVMemory, tokens: np.ndarray, key: str | None = None) -> KVLease:
    lease = memory.open(tokens, extra_key=key, max_prefix=len(tokens) - 1)
    assert lease is not None
    return lease


def slots_of(memory: KVMemory, *needs: tuple[KVLease, int]) -> list[int]:
    placement = memory.alloc_for_extend([PageNeed(lease, count) for lease, count in needs])
    assert placement is not None
    assert all(loc.dtype == np.int64 for loc in placement.out_cache_loc)
    return placement.out_cache_loc[0].tolist()


def decode(memory: KVMemory, *leases: KVLease) -> list[int] | None:
    placement = memory.alloc_for_decode([PageNeed(lease, 1) for lease in leases])
    return None if placement is None else placement.out_cache_loc[0].tolist()


def test_slots_of_a_first_prompt(memory: KVMemory) -> None:
    lease = open_lease(memory, np.arange(10, dtype=np.int32))
    assert repr(lease) == "KVLease(row=1, tokens=0, cached=0, locked=0, closed=False)"
    assert slots_of(memory, (lease, 6)) == [16, 17, 18, 19, 20, 21]
    assert slots_of(memory, (lease, 4)) == [22, 23, 24, 25]
    assert decode(memory, lease) == [26]
    assert decode(memory, lease) == [27]
    assert decode(memory, lease) == [28], "the next page of its own run"
    assert lease.num_tokens == 13
    assert lease.tables[0].runs == [(16, 16)]
    memory.audit()


def test_slots_of_several_requests_come_in_order(memory: KVMemory) -> None:
    one, two = (open_lease(memory, np.arange(9, dtype=np.int32)) for _ in range(2))
    assert slots_of(memory, (one, 5), (two, 2)) == [16, 17, 18, 19, 20, 24, 25]
    assert slots_of(memory, (two, 3), (one, 4)) == [26, 27, 28, 21, 22, 23, 36]
    assert one.tables[0].runs == [(16, 8), (36, 4)]
    assert two.tables[0].runs == [(24, 8)]
    memory.audit()


def test_decode_of_a_batch_takes_only_the_pages_that_begin(memory: KVMemory) -> None:
    leases = [open_lease(memory, np.arange(9, dtype=np.int32)) for _ in range(3)]
    slots_of(memory, *((lease, count) for lease, count in zip(leases, (4, 3, 8), strict=True)))
    pages = [lease.tables[0].num_pages for lease in leases]
    decode(memory, *leases)
    assert [lease.tables[0].num_pages for lease in leases] == [2, 1, 3]
    assert pages == [1, 1, 2]
    last = [lease.tables[0].slot_of(lease.num_tokens - 1) for lease in leases]
    decode(memory, *leases)
    now = [lease.tables[0].slot_of(lease.num_tokens - 1) for lease in leases]
    assert [now[0] - last[0], now[2] - last[2]] == [1, 1]
    assert leases[1].tables[0].num_pages == 2
    assert memory.alloc_for_decode([]).out_cache_loc[0].tolist() == []  # type: ignore[union-attr]
    memory.audit()


def test_a_decode_without_page_border_asks_no_allocator(
    memory: KVMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = open_lease(memory, np.arange(9, dtype=np.int32))
    slots_of(memory, (lease, 5))
    monkeypatch.setattr(memory.ladder, "ensure", None)
    monkeypatch.setattr(memory.allocators[0], "alloc_each", None)
    assert decode(memory, lease) == [21]


def test_a_hit_shares_pages_and_never_the_last_token(memory: KVMemory) -> None:
    tokens = np.arange(12, dtype=np.int32)
    first = open_lease(memory, tokens)
    slots_of(memory, (first, 12))
    memory.cache_prefix(first, tokens, 12)
    assert memory.match_len(tokens) == 12
    second = open_lease(memory, tokens)
    assert second.num_cached_tokens == 8, "at least one token must be computed"
    assert second.tables[0].page_ids.tolist() == first.tables[0].page_ids.tolist()[:2]
    assert memory.allocators[0].index.rows[[4, 5, 6]].tolist() == [2, 2, 1]
    memory.audit()
    memory.close(first, None, 0)
    memory.close(second, tokens, 8)
    memory.audit()
    assert memory.memory_object()["pages"] == {"free": 1, "used": 0, "cached": 3}


def test_namespaces_do_not_hit_each_other(memory: KVMemory) -> None:
    tokens = np.arange(12, dtype=np.int32)
    first = open_lease(memory, tokens, "a")
    slots_of(memory, (first, 12))
    memory.close(first, tokens, 12)
    assert open_lease(memory, tokens, "b").num_cached_tokens == 0
    assert memory.match_len(tokens, "a") == 12
    assert memory.match_len(tokens) == 0


def test_close_caches_whole_pages_and_frees_the_rest(memory: KVMemory) -> None:
    tokens = np.arange(11, dtype=np.int32)
    lease = open_lease(memory, tokens)
    slots_of(memory, (lease, 11))
    memory.close(lease, tokens, 9)
    assert memory.match_len(tokens) == 8
    assert memory.memory_object()["pages"] == {"free": 2, "used": 0, "cached": 2}
    with pytest.raises(InvariantError, match="closed twice"):
        memory.close(lease, tokens, 9)
    with pytest.raises(InvariantError, match="is closed"):
        memory.alloc_for_extend([PageNeed(lease, 1)])
    memory.audit()


def test_tokens_without_a_slot_can_not_be_cached(memory: KVMemory) -> None:
    tokens = np.arange(11, dtype=np.int32)
    lease = open_lease(memory, tokens)
    slots_of(memory, (lease, 4))
    for action in (memory.cache_prefix, memory.close):
        with pytest.raises(InvariantError, match="no 5 computed"):
            action(lease, tokens, 5)
    with pytest.raises(InvariantError, match="decode need of 2"):
        memory.alloc_for_decode([PageNeed(lease, 2)])


def test_rows_run_out(memory: KVMemory) -> None:
    tokens = tokens_of(1, 2, 3)
    leases = [open_lease(memory, tokens) for _ in range(8)]
    assert memory.open(tokens, max_prefix=2) is None
    memory.close(leases[3], None, 0)
    assert open_lease(memory, tokens).row == 4
    memory.audit()


def test_headroom_is_the_budget_less_used_and_locked(memory: KVMemory) -> None:
    tokens = np.arange(40, dtype=np.int32)
    assert (memory.headroom_pages(), memory.headroom_tokens()) == ((24,), (96,))
    lease = open_lease(memory, tokens)
    slots_of(memory, (lease, 20))
    assert memory.headroom_pages() == (19,)
    memory.cache_prefix(lease, tokens, 20)
    assert memory.headroom_pages() == (19,), "locked"
    memory.close(lease, tokens, 20)
    assert memory.headroom_pages() == (24,), "an unlocked prefix can go at any time"
    assert memory.capacity_tokens == 96


def test_all_needs_or_none(memory: KVMemory) -> None:
    one = open_lease(memory, np.arange(50, dtype=np.int32))
    two = open_lease(memory, np.arange(60, dtype=np.int32))
    before = repr(memory)
    assert memory.alloc_for_extend([PageNeed(one, 48), PageNeed(two, 49)]) is None
    assert (repr(memory), one.num_tokens, two.num_tokens) == (before, 0, 0)
    assert memory.alloc_for_extend([PageNeed(one, 48), PageNeed(two, 48)]) is not None
    assert decode(memory, one, two) is None
    assert (one.num_tokens, two.num_tokens) == (48, 48)
    memory.audit()


def test_duplicates_stay_the_rows_own_until_it_closes(memory: KVMemory) -> None:
    tokens = np.arange(17, dtype=np.int32)
    fast, slow = open_lease(memory, tokens), open_lease(memory, tokens)
    slots_of(memory, (fast, 16), (slow, 16))
    own = slow.tables[0].page_ids.tolist()
    memory.cache_prefix(fast, tokens, 16)
    memory.cache_prefix(slow, tokens, 16)
    assert slow.tables[0].page_ids.tolist() == own, "a table that may be read is never patched"
    assert memory.memory_object()["pages"] == {"free": 0, "used": 4, "cached": 4}
    memory.audit()
    memory.close(fast, tokens, 16)
    assert memory.headroom_pages() == (20,), "the slow one locks nothing that it does not read"
    memory.close(slow, tokens, 16)
    assert memory.memory_object()["pages"] == {"free": 4, "used": 0, "cached": 4}
    memory.audit()


def test_looks_at_a_duplicate_prefix_cost_linear_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two equal prompts in lockstep: the second one's looks double their distance."""
    memory, _ = make_memory(budget_segments=200, max_segments=300)
    tokens = np.arange(1000, dtype=np.int32)
    fast, slow = open_lease(memory, tokens), open_lease(memory, tokens)
    looks: list[int] = []
    insert = memory.cache.insert

    def counting(handle, ids, count, pages):  # type: ignore[no-untyped-def]
        if handle is slow.handle:
            looks.append(count - handle.num_tokens)
        return insert(handle, ids, count, pages)

    monkeypatch.setattr(memory.cache, "insert", counting)
    for end in range(10, 1001, 10):
        slots_of(memory, (fast, 10), (slow, 10))
        memory.cache_prefix(fast, tokens, end)
        memory.cache_prefix(slow, tokens, end)
    assert looks == [10, 20, 40, 80, 160, 320, 640]
    memory.audit()
    memory.close(slow, tokens, 1000)
    memory.close(fast, tokens, 1000)
    memory.audit()


def test_a_long_prefill_shares_as_it_runs(memory: KVMemory) -> None:
    tokens = np.arange(80, dtype=np.int32)
    lease = open_lease(memory, tokens)
    for end in range(8, 81, 8):
        slots_of(memory, (lease, 8))
        memory.cache_prefix(lease, tokens, end)
        assert memory.match_len(tokens) == end
        memory.audit()
    nodes = [node for node in memory.cache.tree.nodes() if not node.is_root]  # type: ignore[attr-defined]
    assert len(nodes) == 1
    assert lease.tables[0].runs == [(16, 80)]


def test_flush_refuses_while_a_lease_is_open(memory: KVMemory) -> None:
    tokens = np.arange(9, dtype=np.int32)
    lease = open_lease(memory, tokens)
    slots_of(memory, (lease, 8))
    memory.cache_prefix(lease, tokens, 8)
    assert not memory.flush()
    memory.close(lease, tokens, 8)
    assert memory.match_len(tokens) == 8
    assert memory.flush()
    assert memory.match_len(tokens) == 0
    memory.audit()


def test_the_cache_is_bounded_and_grows_old() -> None:
    memory, backing = make_memory(max_cached_tokens=20, prefix_idle_s=300.0)
    driver = MemoryDriver(memory, backing)
    request = driver.open(list(range(40)))
    assert request is not None
    driver.extend([(request, 40)])
    driver.cache_prefix(request, 40)
    driver.boundary(1.0)
    assert memory.cache.num_pages == 10, "what is in use is not bounded"
    driver.close(request, insert=True)
    driver.boundary(1.0)
    assert memory.cache.num_pages == 5
    driver.boundary(298.0)
    assert memory.cache.num_pages == 5
    driver.boundary(1.0)
    assert memory.cache.num_pages == 0
    assert memory.manager.mapped_bytes > 0
    driver.boundary(30.0)
    assert memory.manager.mapped_bytes == 0
    driver.check()


def test_memory_object_adds_up() -> None:
    memory, _ = make_memory(num_groups=2, reserve_segments=1)
    lease = open_lease(memory, np.arange(9, dtype=np.int32))
    slots_of(memory, (lease, 9))
    memory.close(lease, np.arange(9, dtype=np.int32), 8)
    told = memory.memory_object()
    assert told["bytes_per_token"] == 24
    assert told["capacity_tokens"] == 96
    assert told["budget_bytes"] == 2 * 6 * 12 * 16
    assert told["mapped_bytes"] == 2 * 12 * 16
    assert told["segments"] == {"reserved": 46, "mapping": 0, "mapped": 2, "draining": 0}
    assert told["pages"] == {"free": 4, "used": 0, "cached": 4}
    assert (told["cached_tokens"], told["locked_cached_tokens"]) == (8, 0)
    groups = told["groups"]
    assert isinstance(groups, list)
    assert [group["pages"] for group in groups] == [{"free": 2, "used": 0, "cached": 2}] * 2
    assert sum(group["mapped_bytes"] for group in groups) == told["mapped_bytes"]


def test_a_budget_too_small_for_the_reserve_is_refused_at_start() -> None:
    with pytest.raises(ValueError, match="KV budget"):
        make_memory(budget_segments=1, reserve_segments=2)
    backing = FakeBacking()
    backing.fail_all_maps = True
    with pytest.raises(BackingError):
        make_memory(reserve_segments=1, backing=backing)
    assert backing.closed


def test_a_smaller_budget_shows_in_the_headroom_at_once(memory: KVMemory) -> None:
    lease = open_lease(memory, np.arange(90, dtype=np.int32))
    slots_of(memory, (lease, 60))
    memory.manager.set_budget(memory.manager.layouts[0].segment_bytes * 4)
    assert memory.headroom_pages() == (1,)
    assert memory.capacity_tokens == 64
    assert memory.alloc_for_extend([PageNeed(lease, 5)]) is None
    assert memory.alloc_for_extend([PageNeed(lease, 4)]) is not None
    memory.audit()


def test_huge_contexts_cost_nothing_until_used() -> None:
    """A slot space of 2^31 tokens at page size 1 and ten thousand rows: no arrays to match."""
    memory = KVMemory.create(
        tiny_spec(page_size=1),
        HollowBacking(),
        budget_bytes=1 << 40,
        machine_bytes=1 << 50,
        max_requests=10_000,
        slots_per_segment=1024,
    )
    assert memory.manager.layouts[0].num_slots == 1 << 31
    lease = open_lease(memory, np.arange(2000, dtype=np.int32))
    slots_of(memory, (lease, 2000))
    assert len(memory.allocators[0].index.state) <= 8 * 1024
    memory.audit()


class HollowBacking(FakeBacking):
    """Views without memory behind them."""

    def view(self, layer, plane):  # type: ignore[no-untyped-def]
        del layer, plane


def test_no_page_is_lost_in_thousands_of_random_moves() -> None:
    """Real memory (mmap where the system has it): requests come, share, starve, end, abort."""
    spec = tiny_spec(page_size=16, layers_per_group=2)
    memory = KVMemory.create(
        spec,
        make_backing("auto"),
        budget_bytes=3 * 2 * 12 * 1024,
        machine_bytes=1 << 18,
        max_requests=12,
        slots_per_segment=1024,
    )
    source = random.Random(2024)
    driver = MemoryDriver(memory, FakeBacking())
    idle = memory.manager.backing.resident_bytes()
    for number in range(250):
        _random_life(driver, source)
        if number % 20 == 0:
            driver.check()
            driver.boundary(source.choice([0.0, 1.0, 400.0]), source.randrange(3))
            driver.check()
    while driver.requests:
        driver.close(driver.requests[0], insert=source.random() < 0.5)
    memory.audit()
    assert driver.num_none > 0, "memory did run out"
    for _ in range(4):
        driver.boundary(1000.0)
    assert memory.memory_object()["pages"] == {"free": 0, "used": 0, "cached": 0}
    assert memory.manager.mapped_bytes == 0
    assert memory.manager.backing.resident_bytes() == idle
    memory.audit()
    memory.close_pool()


def _random_life(driver: MemoryDriver, source: random.Random) -> None:
    """One new request (often the continuation of an old prompt), and a move of every other one."""
    subject = source.randrange(30)
    prompt = [subject] * (16 * source.randrange(24)) + [source.randrange(3)] * 20
    request = driver.open(prompt)
    if request is None:
        driver.close(source.choice(driver.requests), insert=source.random() < 0.8)
    for request in list(driver.requests):
        left = len(request.tokens) - request.num_computed
        chance = source.random()
        if left:
            if driver.extend([(request, source.randint(1, left))]):
                driver.cache_prefix(request, request.num_computed)
            elif chance < 0.5:
                driver.close(request, insert=True)
        elif chance < 0.05:
            driver.close(request, insert=chance < 0.04)
        else:
            driver.decode([(request, source.randrange(3))])


@pytest.mark.parametrize("page_size", [1, 4])
def test_the_rows_of_a_decode_batch_serve_many_steps(page_size: int) -> None:
    memory, _ = make_memory(page_size=page_size, pages_per_segment=16)
    leases = [open_lease(memory, tokens_of(i)) for i in range(3)]
    for i, lease in enumerate(leases):
        slots_of(memory, (lease, 1 + i))
    rows = DecodeRows.of(leases[::-1])
    assert rows.rows.tolist() == [3, 2, 1]
    for step in range(8):
        placement = memory.alloc_for_decode(rows)
        assert placement is not None
        assert [lease.num_tokens for lease in leases] == [2 + step, 3 + step, 4 + step]
        last = [lease.tables[0].slot_of(lease.num_tokens - 1) for lease in reversed(leases)]
        assert placement.out_cache_loc[0].tolist() == last
        memory.audit()


def test_a_closed_lease_can_not_decode() -> None:
    memory, _ = make_memory()
    lease = open_lease(memory, tokens_of(1))
    slots_of(memory, (lease, 2))
    rows = DecodeRows.of([lease])
    memory.close(lease, None, 0)
    assert lease.num_tokens == 0
    with pytest.raises(InvariantError, match="is closed"):
        DecodeRows.of([lease])
    with pytest.raises(InvariantError, match="row 1 has no block table"):
        memory.alloc_for_decode(rows)

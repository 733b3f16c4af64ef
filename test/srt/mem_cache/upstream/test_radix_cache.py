"""SGLang's prefix-cache API against a plain model: a set of cached beginnings with their slots."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang.srt.errors import InvariantError
from sglang.srt.mem_cache.evict_policy import EVICTION_KEYS
from sglang.srt.mem_cache.upstream import (
    EvictParams,
    FIFOStrategy,
    InsertParams,
    LFUStrategy,
    LRUStrategy,
    MatchPrefixParams,
    MatchResult,
    NodeRef,
    PagedTokenToKVPoolAllocator,
    PriorityStrategy,
    RadixCache,
    RadixKey,
)


def make_cache(page_size: int = 4, num_pages: int = 40, policy: str = "lru") -> RadixCache:
    allocator = PagedTokenToKVPoolAllocator(
        num_pages * page_size, page_size, torch.float32, "cpu", None
    )
    return RadixCache(allocator, policy)


def match(cache: RadixCache, key: RadixKey) -> MatchResult:
    return cache.match_prefix(MatchPrefixParams(key))


def put(cache: RadixCache, key: RadixKey, priority: int = 0) -> list[int]:
    """What a caller does: allocate, compute, insert, free what the cache had already."""
    allocator = cache.token_to_kv_pool_allocator
    aligned = len(key.page_aligned(cache.page_size))
    slots = allocator.alloc(aligned)
    assert slots is not None
    result = cache.insert(InsertParams(key, slots, priority))
    allocator.free(slots[: result.prefix_len])
    return slots.tolist()


def test_keys() -> None:
    key = RadixKey(array("q", [1, 2, 3, 4, 5]), "tenant", "salt")
    assert (len(key), len(key.page_aligned(2)), len(key[1:4])) == (5, 4, 3)
    assert key[1:].token_ids.tolist() == [2, 3, 4, 5]
    assert key[1:].namespace == key.namespace == "4:salttenant"
    assert RadixKey([1]).namespace is None
    assert RadixKey([1], "4:salttenant").namespace != key.namespace
    assert RadixKey([1], "b", "a").namespace != RadixKey([1], "", "ab").namespace
    assert key.match(RadixKey([1, 2, 3, 9], "tenant", "salt")) == 3
    assert key.match(RadixKey([1, 2, 3, 9], "tenant", "salt"), page_size=2) == 2
    assert key.match(RadixKey([1, 2, 3], "tenant")) == 0


def test_a_match_gives_slots_and_locks_nothing() -> None:
    cache = make_cache()
    slots = put(cache, RadixKey(range(10)))
    found = match(cache, RadixKey([*range(6), 0, 0]))
    assert found.device_indices.tolist() == slots[:4]
    assert (found.device_prefix_len, found.host_hit_length) == (4, 0)
    assert found.last_host_node is found.best_match_node is found.last_device_node
    assert len(found.last_device_node.key) == 4
    assert match(cache, RadixKey(range(8))).device_indices.tolist() == slots
    assert (cache.total_size(), cache.evictable_size(), cache.protected_size()) == (8, 8, 0)
    cache.inner.check([])


def test_what_was_there_stays_the_callers() -> None:
    cache = make_cache(num_pages=8)
    allocator = cache.token_to_kv_pool_allocator
    put(cache, RadixKey(range(8)))
    slots = allocator.alloc(12)
    assert slots is not None
    result = cache.insert(InsertParams(RadixKey(range(12)), slots))
    assert result.prefix_len == 8
    assert allocator.available_size() == 8 * 4 - 8 - 12
    allocator.free(slots[:8])
    assert allocator.available_size() == 8 * 4 - 12
    with pytest.raises(InvariantError):
        allocator.free(slots[8:])  # the cache's
    assert match(cache, RadixKey(range(12))).device_indices.tolist()[8:] == slots[8:].tolist()
    with pytest.raises(ValueError, match="slots for"):
        cache.insert(InsertParams(RadixKey(range(100)), slots))
    with pytest.raises(ValueError, match="whole pages"):
        cache.insert(InsertParams(RadixKey(range(12)), slots.flip(0)))


def test_locks_hold_until_the_last_is_taken_back() -> None:
    cache = make_cache()
    put(cache, RadixKey(range(12)))
    node = match(cache, RadixKey(range(8))).last_device_node
    cache.inc_lock_ref(node)
    cache.inc_lock_ref(node)
    assert node.lock_ref == 2
    assert (cache.protected_size(), cache.evictable_size()) == (8, 4)
    assert cache.evict(EvictParams(100)).num_tokens_evicted == 4
    cache.dec_lock_ref(node)
    assert cache.evict(EvictParams(100)).num_tokens_evicted == 0
    cache.dec_lock_ref(node)
    with pytest.raises(InvariantError, match="not locked"):
        cache.dec_lock_ref(node)
    assert cache.evict(EvictParams(5)).num_tokens_evicted == 8
    with pytest.raises(InvariantError, match="evicted before"):
        cache.inc_lock_ref(node)
    cache.inner.check([])
    assert cache.token_to_kv_pool_allocator.available_size() == 160


def test_nothing_can_be_locked_too() -> None:
    cache = make_cache()
    node = match(cache, RadixKey([1, 2], "nobody")).last_device_node
    cache.inc_lock_ref(node)
    cache.dec_lock_ref(node)
    assert isinstance(node, NodeRef)
    assert list(cache.inner.tree.nodes()) == []


def test_priorities_reach_the_policy() -> None:
    cache = make_cache(policy="priority")
    for token, priority in ((1, 3), (2, 1), (3, 2)):
        put(cache, RadixKey([token] * 4), priority)
    for gone in (2, 3, 1):
        assert len(match(cache, RadixKey([gone] * 4)).device_indices) == 4
        assert cache.evict(EvictParams(1)).num_tokens_evicted == 4
        assert len(match(cache, RadixKey([gone] * 4)).device_indices) == 0


def test_strategies_are_views_of_the_caches_own_keys() -> None:
    cache = make_cache(policy="lfu")
    put(cache, RadixKey([1] * 4))
    put(cache, RadixKey([2] * 4), 5)
    match(cache, RadixKey([1] * 4))
    first, second = (node for node in cache.inner.tree.nodes() if not node.is_root)
    if first.created > second.created:
        first, second = second, first
    strategies = (LRUStrategy(), LFUStrategy(), FIFOStrategy(), PriorityStrategy())
    assert {strategy.policy for strategy in strategies} == set(EVICTION_KEYS)
    before = [s.get_priority(first) < s.get_priority(second) for s in strategies]
    assert before == [False, False, True, True]


BLOCKS = st.lists(st.integers(0, 1), min_size=1, max_size=5)
ACTION = st.one_of(
    st.tuples(st.just("put"), BLOCKS, st.sampled_from(["", "salt"]), st.integers(0, 70)),
    st.tuples(st.just("lock"), BLOCKS, st.sampled_from(["", "salt"])),
    st.tuples(st.just("unlock"), st.integers(0, 9)),
    st.tuples(st.just("evict"), st.integers(0, 400)),
    st.tuples(st.just("reset")),
)


class PlainModel:
    """What the cache ought to hold: the slots of each whole page, by the tokens up to its end."""

    def __init__(self, cache: RadixCache, page_size: int) -> None:
        self.cache = cache
        self.page_size = page_size
        self.slots: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        self.locks: list[NodeRef] = []

    def key_of(self, blocks: list[int], salt: str, tail: int = 0) -> RadixKey:
        tokens = [t for block in blocks for t in [*[7] * (self.page_size - 1), block]]
        return RadixKey(tokens + [9] * (tail % self.page_size), None, salt)

    def beginnings(self, key: RadixKey) -> list[tuple[str, tuple[int, ...]]]:
        size = self.page_size
        tokens, salt = tuple(key.token_ids.tolist()), key.cache_salt or ""
        whole = len(tokens) // size * size
        return [(salt, tokens[:end]) for end in range(size, whole + 1, size)]

    def check_match(self, key: RadixKey) -> MatchResult:
        found, wanted = match(self.cache, key), []
        for beginning in self.beginnings(key):
            if beginning not in self.slots:
                break
            wanted += self.slots[beginning]
        assert found.device_indices.tolist() == wanted
        return found

    def put(self, key: RadixKey, known: int) -> None:
        """Put a key into both; the first `known` tokens keep their slots."""
        slots = put(self.cache, key)
        for number, beginning in enumerate(self.beginnings(key)):
            first, end = number * self.page_size, (number + 1) * self.page_size
            if end > known:
                self.slots[beginning] = slots[first:end]

    def forget_what_is_gone(self) -> int:
        """Drop from the model what the cache evicted; what is left must hold together."""
        count = 0
        for salt, tokens in sorted(self.slots, key=lambda item: -len(item[1])):
            if len(match(self.cache, RadixKey(tokens, None, salt)).device_indices) < len(tokens):
                del self.slots[salt, tokens]
                count += self.page_size
        for lock in self.locks:
            assert all(beginning in self.slots for beginning in self.beginnings(lock.key))
        return count

    def check(self) -> None:
        locked = {b for lock in self.locks for b in self.beginnings(lock.key)}
        assert self.cache.total_size() == len(self.slots) * self.page_size
        assert self.cache.protected_size() == len(locked) * self.page_size
        free = self.cache.token_to_kv_pool_allocator.available_size()
        assert free == (60 - len(self.slots)) * self.page_size
        self.cache.inner.check([handle for lock in self.locks for handle in lock._handles])


@settings(max_examples=120, deadline=None)
@given(
    page_size=st.sampled_from([1, 16, 64]),
    policy=st.sampled_from(sorted(EVICTION_KEYS)),
    actions=st.lists(ACTION, max_size=20),
)
def test_against_a_plain_model(page_size: int, policy: str, actions: list[tuple]) -> None:
    cache = make_cache(page_size, 60, policy)
    model = PlainModel(cache, page_size)
    for name, *args in actions:
        if name == "put":
            key = model.key_of(*args)
            known = len(model.check_match(key).device_indices)
            if cache.token_to_kv_pool_allocator.available_size() < len(key):
                continue
            model.put(key, known)
        elif name == "lock":
            node = model.check_match(model.key_of(*args)).last_device_node
            cache.inc_lock_ref(node)
            model.locks.append(node)
        elif name == "unlock" and model.locks:
            cache.dec_lock_ref(model.locks.pop(args[0] % len(model.locks)))
        elif name == "evict":
            able = cache.evictable_size()
            freed = cache.evict(EvictParams(args[0])).num_tokens_evicted
            assert freed == min(able, -(-args[0] // page_size) * page_size)
            assert model.forget_what_is_gone() == freed
        elif name == "reset":
            cache.reset()
            model.forget_what_is_gone()
            assert cache.evictable_size() == 0
        model.check()
    assert np.sum([len(slots) for slots in model.slots.values()]) == cache.total_size()

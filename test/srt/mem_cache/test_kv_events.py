"""A mirror that hears only the events must hold what the cache holds, whatever happens to it."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang.srt.mem_cache.kv_events import hash_pages
from sglang.srt.mem_cache.radix_cache import RadixCache
from srt.mem_cache.event_mirror import PAGE, Mirror, blocks_of, live
from srt.mem_cache.memory_driver import MemoryDriver, finish_background, make_memory


def make_driver(num_groups: int = 1, **options: object) -> tuple[MemoryDriver, Mirror]:
    mirror = Mirror()
    memory, backing = make_memory(
        num_groups=num_groups, page_size=PAGE, event_sink=mirror, **options
    )
    return MemoryDriver(memory, backing), mirror


@pytest.mark.parametrize("num_groups", [1, 2])
def test_events_say_what_enters_and_what_leaves(num_groups: int) -> None:
    driver, mirror = make_driver(num_groups)
    live(driver, [1] * 8 + [2] * 4)
    driver.boundary(1.0)
    assert mirror.kinds == ["BlockStored"]
    live(driver, [1] * 8 + [3] * 4)
    live(driver, [1] * 4, "tenant")
    assert mirror.kinds == ["BlockStored"], "told at a step boundary"
    driver.boundary(1.0)
    assert set(mirror.blocks.values()) == blocks_of(driver.memory)
    assert len(mirror.blocks) == 5
    driver.memory.cache.evict(1)
    driver.boundary(1.0)
    assert mirror.kinds[3:] == ["BlockRemoved"]
    assert (None, (1,) * 8 + (2,) * 4) not in mirror.blocks.values()
    assert driver.memory.flush()
    assert mirror.kinds[4:] == ["AllBlocksCleared"], "told at once, and in one"
    assert mirror.blocks == {}


def test_a_clear_that_leaves_something_removes_block_by_block() -> None:
    driver, mirror = make_driver()
    live(driver, [1] * 8)
    live(driver, [2] * 8)
    held = driver.open([1] * 8 + [5])
    assert held is not None
    driver.memory.cache.clear()
    driver.boundary(1.0)
    assert "AllBlocksCleared" not in mirror.kinds
    assert set(mirror.blocks.values()) == blocks_of(driver.memory) != set()


def test_hashes_are_chained_and_no_namespace_shares_one() -> None:
    tokens = np.array([1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4], np.int32)
    hashes = hash_pages(tokens, 4, None, None)
    page = tokens[:4].tobytes()
    first = hashlib.sha256(page).digest()[:8]
    second = hashlib.sha256(first + page).digest()[:8]
    assert [int(h).to_bytes(8, "big", signed=True) for h in hashes[:2]] == [first, second]
    assert len(set(hashes.tolist())) == 3, "equal pages at different places differ"
    assert hash_pages(tokens[4:], 4, int(hashes[0]), None).tolist() == hashes[1:].tolist()
    salted = [hash_pages(tokens, 4, None, key).tolist() for key in ("a", "b", "")]
    assert len({block for some in salted for block in some} | set(hashes.tolist())) == 12


def test_nothing_is_kept_without_a_listener() -> None:
    memory, backing = make_memory(page_size=PAGE)
    driver = MemoryDriver(memory, backing)
    live(driver, [1] * 8)
    live(driver, [1] * 4 + [2] * 4)
    assert isinstance(memory.cache, RadixCache)
    assert all(node.hashes is None for node in memory.cache.tree.nodes())


BLOCKS = st.lists(st.integers(0, 1), min_size=1, max_size=6)
STEP = st.one_of(
    st.tuples(st.just("live"), BLOCKS, st.sampled_from([None, "a", "b"])),
    st.tuples(st.just("hold"), BLOCKS, st.sampled_from([None, "a"])),
    st.tuples(st.just("drop")),
    st.tuples(st.just("evict"), st.integers(1, 6)),
    st.tuples(st.just("boundary"), st.sampled_from([0.0, 400.0])),
    st.tuples(st.just("flush")),
)


@settings(max_examples=80, deadline=None)
@given(steps=st.lists(STEP, max_size=25), num_groups=st.integers(1, 2))
def test_replayed_events_give_the_caches_content(steps: list[tuple], num_groups: int) -> None:
    driver, mirror = make_driver(num_groups, budget_segments=4, max_cached_tokens=48)
    for name, *args in steps:
        if name in ("live", "hold"):
            tokens = [token for block in args[0] for token in [9, 9, 9, block]] + [7]
            request = driver.open(tokens, args[1])
            if request is None:
                continue
            for divisor in (2, 1):  # two chunks, shared in between
                left = len(tokens) - request.num_computed
                driver.extend([(request, -(-left // divisor))])
                driver.cache_prefix(request, request.num_computed)
            if name == "live":
                driver.close(request, insert=True)
        elif name == "drop" and driver.requests:
            driver.close(driver.requests[0], insert=True)
        elif name == "evict":
            driver.memory.cache.evict(args[0])
        elif name == "boundary":
            driver.boundary(args[0])
        elif name == "flush":
            driver.memory.flush()
            finish_background(driver.memory)
        driver.check()
    driver.boundary(0.0)
    assert set(mirror.blocks.values()) == blocks_of(driver.memory)
    assert len(mirror.blocks) == driver.memory.cache.num_pages

from __future__ import annotations

import gc
import random
import tracemalloc

import pytest

from sglang.srt.mem_cache.evict_policy import (
    LeafQueue,
    fifo_key,
    lfu_key,
    lru_key,
    priority_key,
)
from sglang.srt.mem_cache.id_array import IdArray
from sglang.srt.mem_cache.radix_tree import TreeNode
from sglang.srt.mem_cache.window_cache import SnapshotQueue


def node(node_id: int, tick: int = 0, hits: int = 0) -> TreeNode:
    made = TreeNode(node_id, None, IdArray(), (IdArray(),), None)
    made.tick, made.hits = tick, hits
    return made


def test_order_is_that_of_the_key() -> None:
    nodes = [node(0, tick=5, hits=1), node(1, tick=3, hits=2), node(2, tick=9, hits=1)]
    by_age, by_use = LeafQueue(lru_key), LeafQueue(lfu_key)
    for each in nodes:
        by_age.put(each)
        by_use.put(each)
    assert [n.id for n in by_age.coldest(9)] == [1, 0, 2]
    assert [n.id for n in by_use.coldest(9)] == [0, 2, 1]
    assert [n.id for n in by_age.coldest(2)] == [1, 0], "looking takes nothing out"


def test_fifo_and_priority_order() -> None:
    nodes = [node(i, tick=tick) for i, tick in enumerate((5, 9, 3, 7))]
    for each, created, priority in zip(nodes, (2, 1, 4, 3), (0, -1, 0, 5), strict=True):
        each.created, each.priority = created, priority
    by_birth, by_rank = LeafQueue(fifo_key), LeafQueue(priority_key)
    for each in nodes:
        by_birth.put(each)
        by_rank.put(each)
    assert [n.id for n in by_birth.coldest(9)] == [1, 0, 3, 2]
    assert [n.id for n in by_rank.coldest(9)] == [1, 2, 0, 3]


def test_same_rank_leaves_only_age_to_differ() -> None:
    nodes = [node(0, tick=4, hits=1), node(1, tick=2, hits=1), node(2, tick=1, hits=2)]
    by_use, by_age = LeafQueue(lfu_key), LeafQueue(lru_key)
    for each in nodes:
        by_use.put(each)
        by_age.put(each)
    assert [n.id for n in by_use.coldest(9, same_rank=True)] == [1, 0]
    assert [n.id for n in by_age.coldest(9, same_rank=True)] == [2, 1, 0]
    assert LeafQueue(lru_key).coldest(9, same_rank=True) == []


def test_a_leaf_that_left_or_moved_is_skipped() -> None:
    queue = LeafQueue(lru_key)
    nodes = [node(i, tick=i) for i in range(4)]
    for each in nodes:
        queue.put(each)
    queue.discard(nodes[0])
    queue.discard(nodes[0])
    nodes[1].tick = 10
    queue.put(nodes[1])
    assert [n.id for n in queue.coldest(9)] == [2, 3, 1]
    assert len(queue) == 3
    assert nodes[0] not in queue
    assert nodes[1] in queue


def test_stale_entries_do_not_pile_up() -> None:
    queue = LeafQueue(lru_key)
    nodes = [node(i) for i in range(10)]
    for tick in range(10_000):
        chosen = nodes[tick % 10]
        chosen.tick = tick
        queue.put(chosen)
    assert len(queue._heap) <= 2 * 10 + 65
    assert [n.id for n in queue.coldest(10)] == list(range(10))


def test_against_sorting() -> None:
    source = random.Random(7)
    queue, present = LeafQueue(lfu_key), {}
    for step in range(3000):
        node_id = source.randrange(40)
        if node_id in present and source.random() < 0.4:
            queue.discard(present.pop(node_id))
        else:
            each = present.setdefault(node_id, node(node_id))
            each.tick, each.hits = step, source.randrange(4)
            queue.put(each)
        expected = sorted(present.values(), key=lambda n: (n.hits, n.tick))
        assert queue.coldest(3) == expected[:3]


def test_a_leaf_that_went_away_is_not_kept_alive() -> None:
    queue = LeafQueue(lru_key)
    for number in range(20):
        gone = node(number)
        queue.put(gone)
        queue.discard(gone)
    del gone
    queue.put(node(99))
    gc.collect()
    alive = [each.id for each in gc.get_objects() if type(each) is TreeNode and each.id < 20]
    assert alive == []


@pytest.mark.parametrize("make", [lambda: LeafQueue(lru_key), SnapshotQueue])
def test_coming_and_going_leaves_nothing_behind(make: type[SnapshotQueue]) -> None:
    queue, nodes = make(), [node(number) for number in range(10)]

    def come_and_go(times: int) -> None:
        for tick in range(times):
            each = nodes[tick % 10]
            each.tick = tick
            queue.put(each)
            queue.discard(each)

    come_and_go(1000)
    tracemalloc.start()
    try:
        come_and_go(20_000)
        grown, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(queue) == 0
    assert grown < 50_000, "entries of 20,000 visits would take over 2 MB"

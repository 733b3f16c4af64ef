"""In which order unlocked leaves go: an ordered structure kept up to date, never a walk.

`RadixCache` adds a leaf when it becomes evictable and drops it when it no longer is. A heap with
lazy invalidation: an update pushes a new entry, an old one is skipped when it surfaces. A linked
list would do for lru alone, but not for the others, nor for a parent that becomes a leaf with an
old time of use. A key may only change while its node is locked, and so not in a queue.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sized

from sglang.srt.mem_cache.radix_tree import TreeNode

SortKey = tuple[int, ...]
_Entry = tuple[SortKey, int]


def lru_key(node: TreeNode) -> SortKey:
    """Least recently used first."""
    return (node.tick,)


def lfu_key(node: TreeNode) -> SortKey:
    """Least often used first, the least recently used among equals."""
    return (node.hits, node.tick)


def fifo_key(node: TreeNode) -> SortKey:
    """First begun first; an edge that grows later, or is split, keeps the time of its beginning."""
    return (node.created,)


def priority_key(node: TreeNode) -> SortKey:
    """Lowest request priority first, the least recently used among equals."""
    return (node.priority, node.tick)


EVICTION_KEYS: dict[str, Callable[[TreeNode], SortKey]] = {
    "lru": lru_key,
    "lfu": lfu_key,
    "fifo": fifo_key,
    "priority": priority_key,
}


class LeafQueue:
    """Evictable leaves, coldest first. All operations amortised O(log leaves).

    What is left in the heap of a leaf that went away is two numbers: it keeps no node alive.
    """

    def __init__(self, key: Callable[[TreeNode], SortKey]) -> None:
        self._key = key
        self._heap: list[_Entry] = []
        # node id -> its one valid entry, and the node
        self._entries: dict[int, tuple[_Entry, TreeNode]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, node: TreeNode) -> bool:
        return node.id in self._entries

    def put(self, node: TreeNode) -> None:
        """Add a leaf, or move it to where its present key belongs."""
        entry = (self._key(node), node.id)
        self._entries[node.id] = entry, node
        heapq.heappush(self._heap, entry)
        if is_mostly_stale(self._heap, self._entries):
            self._heap = [valid for valid, _ in self._entries.values()]
            heapq.heapify(self._heap)

    def discard(self, node: TreeNode) -> None:
        """Take a leaf out if it is in."""
        self._entries.pop(node.id, None)

    def coldest(self, count: int = 1, *, same_rank: bool = False) -> list[TreeNode]:
        """Up to `count` leaves, coldest first; they stay in.

        `same_rank`: only those whose keys differ from the first's in the last, finest part.
        """
        found: list[tuple[_Entry, TreeNode]] = []
        while self._heap and len(found) < count:
            entry = heapq.heappop(self._heap)
            held = self._entries.get(entry[1])
            if held is not None and held[0] is entry:
                found.append(held)
        for entry, _ in found:
            heapq.heappush(self._heap, entry)
        rank = found[0][0][0][:-1] if found else ()
        return [node for (key, _), node in found if not same_rank or key[:-1] == rank]


def is_mostly_stale(heap: Sized, valid: Sized) -> bool:
    """Whether a heap with lazy removal holds more stale entries than valid ones, and some more."""
    return len(heap) > 2 * len(valid) + 64

"""SGLang's names of the eviction strategies, each a view of the key that the cache sorts by."""

from __future__ import annotations

from typing import ClassVar

from sglang.srt.mem_cache.evict_policy import EVICTION_KEYS, SortKey
from sglang.srt.mem_cache.radix_tree import TreeNode


class EvictionStrategy:
    """`get_priority` orders leaves, smallest first out; `policy` is the flag's word for it."""

    policy: ClassVar[str]

    def get_priority(self, node: TreeNode) -> SortKey:
        """The node's place in the order, as it is now."""
        return EVICTION_KEYS[self.policy](node)


class LRUStrategy(EvictionStrategy):
    policy = "lru"


class LFUStrategy(EvictionStrategy):
    policy = "lfu"


class FIFOStrategy(EvictionStrategy):
    policy = "fifo"


class PriorityStrategy(EvictionStrategy):
    policy = "priority"

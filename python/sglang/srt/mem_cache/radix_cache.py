"""The radix cache: shared prefixes, locked while they are read, evicted coldest first.

The facade in `allocation.py` calls it with token arrays, pages and handles; it marks in each
group's `PageIndex` which pages are the tree's. It never sees a request, never maps memory and
never patches a running row's table. See docs/kv_segments.md, Note [A running prefill is shared]
and Note [Eviction cuts tails].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set
from itertools import islice

import numpy as np
import numpy.typing as npt

from sglang.srt.errors import InvariantError
from sglang.srt.mem_cache.base_prefix_cache import (
    BasePrefixCache,
    CachedRest,
    MatchResult,
    PrefixHandle,
)
from sglang.srt.mem_cache.evict_policy import EVICTION_KEYS, LeafQueue, lru_key
from sglang.srt.mem_cache.kv_events import KVEventRecorder
from sglang.srt.mem_cache.page_owner import PageIndex, PageState
from sglang.srt.mem_cache.radix_tree import RadixTree, TreeNode

Int32Array = npt.NDArray[np.int32]

# Coldest leaves among which eviction prefers one that empties a segment.
_EVICT_CHOICE = 8
# Pages of a leaf that this choice looks at, so that its cost does not follow the leaf's length.
_EVICT_SCORE_PAGES = 4096
# A copy of less than this part of a page costs as much as computing it, on a small model.
_LEAST_REST = 1 / 8
# Continuations of a prefix among which the one that agrees longest is looked for.
_REST_CHOICE = 4096
# Leaves that one call of `evict_idle` drops, so that no step boundary is long.
_IDLE_LEAVES_PER_CALL = 256


class RadixCache(BasePrefixCache):
    """A page-aligned compressed tree per namespace.

    Invariants: a node's `lock_ref` is the number of handles at it or below; a page of an edge is
    CACHED in its group's index with that node's id; `num_pages` and `num_locked_pages` are the
    sums over nodes; exactly the unlocked leaves are in the queues; no node is younger or of lower
    priority than one below it. `policy` is one of `EVICTION_KEYS`.
    """

    def __init__(
        self,
        indexes: Sequence[PageIndex],
        page_size: int,
        policy: str = "lru",
        events: KVEventRecorder | None = None,
    ) -> None:
        if policy not in EVICTION_KEYS:
            raise ValueError(f"unknown eviction policy {policy}: one of {sorted(EVICTION_KEYS)}")
        self.tree = RadixTree(page_size, len(indexes))
        self._events = events
        self._indexes = tuple(indexes)
        self._page_size = page_size
        self._by_policy = LeafQueue(EVICTION_KEYS[policy])
        self._by_age = self._by_policy if policy == "lru" else LeafQueue(lru_key)
        self._queues = tuple({id(q): q for q in (self._by_policy, self._by_age)}.values())
        self._num_pages = 0
        self._num_locked_pages = 0
        self._num_handles = 0
        self._tick = 0
        self._now = 0.0

    @property
    def num_pages(self) -> int:
        return self._num_pages

    @property
    def num_locked_pages(self) -> int:
        return self._num_locked_pages

    def pages_locked_by(self, handles: Sequence[PrefixHandle]) -> int:
        locks: Counter[TreeNode] = Counter()
        for handle in handles:
            locks.update(handle.node.path_up())
        return sum(node.num_pages for node, count in locks.items() if node.lock_ref == count)

    # ---- finding ----------------------------------------------------------------------------

    def match_len(self, token_ids: Int32Array, extra_key: str | None, max_tokens: int) -> int:
        root = self.tree.find_root(extra_key)
        if root is None:
            return 0
        end = min(max_tokens, len(token_ids))
        _, position, _, inside = self.tree.walk(root, token_ids, 0, end)
        return position + inside

    def match(
        self,
        token_ids: Int32Array,
        extra_key: str | None,
        max_tokens: int,
        *,
        priority: int = 0,
    ) -> MatchResult:
        root = self.tree.get_root(extra_key)
        end = min(max_tokens, len(token_ids))
        node, position, child, inside = self.tree.walk(root, token_ids, 0, end)
        if child is not None and inside > 0:
            node, position = self._split(child, inside), position + inside
        path = list(node.path_up())
        self._touch(path, is_hit=True)
        self._lock(path, priority)
        pages = tuple(
            np.concatenate([step.pages[g].view() for step in reversed(path)])
            for g in range(len(self._indexes))
        )
        self._num_handles += 1
        return MatchResult(position, pages, PrefixHandle(node, position, priority))

    def find_rest(
        self, handle: PrefixHandle, token_ids: Int32Array, max_tokens: int
    ) -> CachedRest | None:
        at: TreeNode = handle.node
        rest = token_ids[handle.num_tokens : max_tokens][: self._page_size]
        least = max(1, int(self._page_size * _LEAST_REST))
        if len(rest) < least:
            return None
        head = rest[:least].tobytes()
        best, found = 0, None
        for key, child in islice(at.children.items(), _REST_CHOICE):
            if key.startswith(head):
                same = np.frombuffer(key, np.int32)[: len(rest)] == rest
                count = len(rest) if same.all() else int(same.argmin())
                if count > best:
                    best, found = count, child
        if found is None:
            return None
        return CachedRest(best, tuple(int(array.view(0, 1)[0]) for array in found.pages))

    # ---- entering ---------------------------------------------------------------------------

    def insert(
        self,
        handle: PrefixHandle,
        token_ids: Int32Array,
        num_tokens: int,
        page_ids: tuple[Int32Array, ...],
    ) -> int:
        if handle.released:
            raise InvariantError("insert with a released handle")
        end = num_tokens - num_tokens % self._page_size
        if end <= handle.num_tokens:
            return handle.num_tokens
        at: TreeNode = handle.node
        node, position, child, inside = self.tree.walk(at, token_ids, handle.num_tokens, end)
        if position + inside >= end:
            return end  # another row computed all of it: ours stay our own until we close
        if child is not None and inside > 0:
            node, position = self._split(child, inside), position + inside
        tokens = token_ids[position:end]
        first, last = position // self._page_size, end // self._page_size
        pages = tuple(ids[first:last] for ids in page_ids)
        if node is at and not at.children and not at.is_root and at.lock_ref == 1:
            self._grow(at, tokens, pages)
        else:
            self._take_over(at, node, position, page_ids)
            leaf = self._add_leaf(node, tokens, pages, handle.priority)
            self._move_lock(at, leaf, handle.priority)
            handle.node = leaf
        handle.num_tokens = end
        return end

    def release(self, handle: PrefixHandle) -> None:
        handle.mark_released()
        self._num_handles -= 1
        path = list(handle.node.path_up())
        self._touch(path, is_hit=False)
        for node in path:
            if node.lock_ref < 1:
                raise InvariantError(f"{node!r} was unlocked more often than locked")
            node.lock_ref -= 1
            if node.lock_ref == 0:
                self._num_locked_pages -= node.num_pages
                self._queue_if_evictable(node)
        self.tree.drop_root_if_bare(path[-1])

    # ---- leaving ----------------------------------------------------------------------------

    def evict(self, num_pages: int) -> int:
        freed = 0
        while freed < num_pages:
            leaf = self._choose_leaf(num_pages - freed)
            if leaf is None:
                break
            freed += self._evict_from(leaf, num_pages - freed)
        return freed

    def evict_idle(self, now: float, idle_seconds: float) -> int:
        self._now = max(self._now, now)
        if idle_seconds < 0:
            return 0
        freed = 0
        for _ in range(_IDLE_LEAVES_PER_CALL):
            oldest = self._by_age.coldest()
            if not oldest or self._now - oldest[0].last_used < idle_seconds:
                break
            freed += self._evict_from(oldest[0], oldest[0].num_pages)
        return freed

    def clear(self) -> int:
        freed = num_leaves = 0
        while leaves := self._by_policy.coldest():
            freed += self._evict_from(leaves[0], leaves[0].num_pages)
            num_leaves += 1
        if self._events is not None and freed and self._num_pages == 0:
            self._events.cleared(num_leaves)
        return freed

    def move_pages(self, group: int, nodes: Set[int], moved_to: Int32Array) -> None:
        self.tree.move_pages(group, nodes, moved_to)

    def _choose_leaf(self, wanted: int) -> TreeNode | None:
        """The coldest leaf, or one hardly warmer whose end would empty more segments."""
        leaves = self._by_policy.coldest(_EVICT_CHOICE, same_rank=True)
        if not leaves or leaves[0].num_pages >= wanted:
            return leaves[0] if leaves else None
        whole = [leaf for leaf in leaves if leaf.num_pages <= wanted]
        return max(whole, key=self._segments_emptied)  # the first, so the coldest, among equals

    def _segments_emptied(self, leaf: TreeNode) -> int:
        """Segments that the end of the leaf would empty, as far as its last pages tell."""
        first = max(0, leaf.num_pages - _EVICT_SCORE_PAGES)
        pairs = zip(self._indexes, leaf.pages, strict=True)
        return sum(index.segments_emptied_by(array.view(first)) for index, array in pairs)

    def _evict_from(self, leaf: TreeNode, wanted: int) -> int:
        """Drop a leaf, or only its tail when it has more pages than wanted; returns pages freed."""
        count = min(wanted, leaf.num_pages)
        if self._events is not None:
            self._events.removed(leaf, count)
        if count < leaf.num_pages:
            dropped = self.tree.cut_tail(leaf, count)
        else:
            dropped = tuple(array.view() for array in leaf.pages)
            parent = self.tree.remove_leaf(leaf)
            for queue in self._queues:
                queue.discard(leaf)
            self._queue_if_evictable(parent)
            if parent.is_root:
                self.tree.drop_root_if_bare(parent)
        for index, pages in zip(self._indexes, dropped, strict=True):
            index.release(pages)
        self._num_pages -= count
        return count

    # ---- inside -----------------------------------------------------------------------------

    def _split(self, node: TreeNode, num_tokens: int) -> TreeNode:
        upper = self.tree.split(node, num_tokens)
        for index, array in zip(self._indexes, upper.pages, strict=True):
            index.rename_node(array.view(), upper.id)
        return upper

    def _take_over(
        self, above: TreeNode, below: TreeNode, end: int, page_ids: tuple[Int32Array, ...]
    ) -> None:
        """On edges that a row computed again and nobody reads, put its pages in place of theirs.

        They are those below `above` down to `below`, which ends after `end` tokens. The row is
        about to lock them: both copies would be kept for it, and only one was counted.
        """
        for node in below.path_up():
            if node is above:
                return
            first, last = (end - len(node.tokens)) // self._page_size, end // self._page_size
            end -= len(node.tokens)
            if node.lock_ref:
                continue
            for index, array, ids in zip(self._indexes, node.pages, page_ids, strict=True):
                own = ids[first:last]
                if own[0] >= 0:  # else a window group's holes, where the tree keeps what it has
                    index.release(array.view().copy())
                    index.adopt(own, node.id)
                    array.overwrite(0, own)

    def _grow(self, node: TreeNode, tokens: Int32Array, pages: tuple[Int32Array, ...]) -> None:
        self.tree.grow_leaf(node, tokens, pages)
        self._num_locked_pages += len(pages[0])
        self._own(node, pages)

    def _add_leaf(
        self, parent: TreeNode, tokens: Int32Array, pages: tuple[Int32Array, ...], priority: int
    ) -> TreeNode:
        for queue in self._queues:
            queue.discard(parent)
        leaf = self.tree.add_leaf(parent, tokens, pages)
        leaf.tick, leaf.last_used = self._tick, self._now
        leaf.created, leaf.priority = self._tick, priority
        self._own(leaf, pages)
        return leaf

    def _own(self, node: TreeNode, pages: tuple[Int32Array, ...]) -> None:
        self._num_pages += len(pages[0])
        for index, ids in zip(self._indexes, pages, strict=True):
            index.adopt(ids, node.id)
        if self._events is not None:
            self._events.stored(node, len(pages[0]))

    def _touch(self, path: list[TreeNode], *, is_hit: bool) -> None:
        self._tick += 1
        for node in path:
            node.tick, node.last_used = self._tick, self._now
            node.hits += is_hit

    def _lock(self, path: Sequence[TreeNode], priority: int) -> None:
        for node in path:
            node.priority = max(node.priority, priority)
            if node.lock_ref == 0:
                self._num_locked_pages += node.num_pages
                for queue in self._queues:
                    queue.discard(node)
            node.lock_ref += 1

    def _move_lock(self, above: TreeNode, below: TreeNode, priority: int) -> None:
        """A handle at `above` goes down to `below`: lock what lies between, `below` included."""
        path = []
        for node in below.path_up():
            if node is above:
                break
            path.append(node)
        self._touch(path, is_hit=False)
        self._lock(path, priority)

    def _queue_if_evictable(self, node: TreeNode) -> None:
        if node.is_evictable_leaf:
            for queue in self._queues:
                queue.put(node)

    # ---- audit ------------------------------------------------------------------------------

    def check(self, handles: Sequence[PrefixHandle]) -> None:
        locks = Counter(node.id for handle in handles for node in handle.node.path_up())
        total = locked = num_leaves = 0
        for node in self.tree.nodes():
            self._check_node(node)
            if node.lock_ref != locks.pop(node.id, 0):
                raise InvariantError(f"{node!r} is not locked by that many handles")
            total += node.num_pages
            locked += node.num_pages if node.lock_ref else 0
            num_leaves += node.is_evictable_leaf
        if locks:
            raise InvariantError(f"handles point at nodes {sorted(locks)} outside the tree")
        found = (total, locked, len(handles), num_leaves)
        kept = (self._num_pages, self._num_locked_pages, self._num_handles, len(self._by_policy))
        if found != kept:
            raise InvariantError(f"tree pages, locked, handles, leaves: {kept} kept, {found} found")
        for group in range(len(self._indexes)):
            self._check_total(group, total)
        for handle in handles:
            held = sum(len(node.tokens) for node in handle.node.path_up())
            if handle.released or held != handle.num_tokens:
                raise InvariantError(f"{handle!r} stands at the end of {held} tokens")

    def _check_node(self, node: TreeNode) -> None:
        for key, child in node.children.items():
            first = child.tokens.view(0, self._page_size).tobytes()
            if child.parent is not node or first != key or child.extra_key != node.extra_key:
                raise InvariantError(f"{child!r} hangs wrong below {node!r}")
            early = child.created < node.created or child.priority > node.priority
            if early and not node.is_root:
                raise InvariantError(f"{child!r} would stay longer than {node!r} above it")
        if len(node.tokens) != node.num_pages * self._page_size:
            raise InvariantError(f"{node!r} has {node.num_pages} pages")
        if self._events is not None:
            self._events.check(node)
        if not node.is_root and node.num_pages == 0:
            raise InvariantError(f"{node!r} is empty")
        for queue in self._queues:
            if (node in queue) != node.is_evictable_leaf:
                raise InvariantError(f"{node!r} is wrong in the queue of leaves")
        for group in range(len(self._indexes)):
            self._check_pages(node, group)

    def _check_total(self, group: int, total: int) -> None:
        """`total` pages are on the edges of the tree."""
        if self._indexes[group].num_cached != total:
            raise InvariantError(f"{self._indexes[group]!r} but the tree owns {total} pages")

    def _check_pages(self, node: TreeNode, group: int) -> None:
        index, pages = self._indexes[group], node.pages[group].view()
        if (index.node[pages] != node.id).any() or len(pages) != node.num_pages:
            raise InvariantError(f"{node!r} does not own the pages of its edge")
        if (index.state[pages] != PageState.CACHED).any():
            raise InvariantError(f"{node!r} has pages that are not cached")
        if node.lock_ref == 0 and index.rows[pages].any():
            raise InvariantError(f"{node!r} is unlocked but a row reads it")

    def __repr__(self) -> str:
        return (
            f"RadixCache(pages={self._num_pages}, locked={self._num_locked_pages}, "
            f"leaves={len(self._by_policy)}, handles={self._num_handles})"
        )

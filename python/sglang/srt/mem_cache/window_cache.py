"""The radix cache where window groups exist: edges with holes, snapshots, and usable points.

Every edge has an entry per page and group, as in `RadixCache`; in window groups most entries say
NO_PAGE. What is held are snapshots: the windows at the ends of prompts and outputs. A match ends
where every window group still holds all that a query there may see. See docs/kv_segments.md,
Note [Where a prefix is usable].
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from sglang.srt.errors import InvariantError
from sglang.srt.mem_cache.base_prefix_cache import HeldWindow, MatchResult, PrefixHandle
from sglang.srt.mem_cache.evict_policy import is_mostly_stale
from sglang.srt.mem_cache.kv_events import KVEventRecorder
from sglang.srt.mem_cache.page_owner import PageIndex, PageState
from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.srt.mem_cache.radix_tree import TreeNode
from sglang.srt.mem_cache.window_index import NO_PAGE, WindowPageIndex, held_pages
from sglang.srt.mem_cache.window_rule import WindowRule

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


class SnapshotQueue:
    """Nodes that hold pages of windows, coldest first; keys are looked up when they surface.

    A heap, as in `LeafQueue`, but uses need not tell it: a node that was used since it was queued
    goes back with its new time when it comes to the top.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, int]] = []
        self._nodes: dict[int, TreeNode] = {}

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, node: TreeNode) -> bool:
        return node.id in self._nodes

    def put(self, node: TreeNode) -> None:
        """Add a node unless it is in."""
        if node.id not in self._nodes:
            self._nodes[node.id] = node
            heapq.heappush(self._heap, (node.tick, node.id))
            if is_mostly_stale(self._heap, self._nodes):
                self._heap = [(held.tick, number) for number, held in self._nodes.items()]
                heapq.heapify(self._heap)

    def discard(self, node: TreeNode) -> None:
        """Take a node out if it is in."""
        self._nodes.pop(node.id, None)

    def pop_coldest(self) -> TreeNode | None:
        """Take out the node that was used longest ago; None when the queue is empty."""
        while self._heap:
            tick, node_id = self._heap[0]
            node = self._nodes.get(node_id)
            if node is None:
                heapq.heappop(self._heap)
            elif node.tick != tick:
                heapq.heapreplace(self._heap, (node.tick, node_id))
            else:
                heapq.heappop(self._heap)
                del self._nodes[node_id]
                return node
        return None


class WindowRadixCache(RadixCache):
    """`rules[g]` is a window group's sight, None for a group that keeps all.

    Invariant beside those of `RadixCache`: exactly the nodes with an entry that is a page of a
    window group are in `_snapshots`.
    """

    def __init__(
        self,
        indexes: Sequence[PageIndex],
        page_size: int,
        policy: str,
        rules: Sequence[WindowRule | None],
        events: KVEventRecorder | None = None,
    ) -> None:
        super().__init__(indexes, page_size, policy, events)
        self._windows: dict[int, tuple[WindowRule, WindowPageIndex]] = {}
        for g, (rule, index) in enumerate(zip(rules, indexes, strict=True)):
            if rule is not None:
                if not isinstance(index, WindowPageIndex):
                    raise InvariantError(f"group {g} has a window but its index counts no idle")
                self._windows[g] = (rule, index)
        self._keeps_all = len(self._windows) < len(indexes)
        self._snapshots = SnapshotQueue()

    def locked_pages(self, group: int) -> int:
        """See `BasePrefixCache`: in a window group, cached pages that a row reads."""
        if group not in self._windows:
            return self._num_locked_pages
        index = self._windows[group][1]
        return index.num_cached - index.num_idle

    def evictable_pages(self, group: int) -> int:
        if group not in self._windows:
            return self.num_evictable_pages
        return self._windows[group][1].num_idle

    # ---- finding ----------------------------------------------------------------------------

    def match_len(self, token_ids: Int32Array, extra_key: str | None, max_tokens: int) -> int:
        root = self.tree.find_root(extra_key)
        if root is None:
            return 0
        end = min(max_tokens, len(token_ids))
        node, position, child, inside = self.tree.walk(root, token_ids, 0, end)
        edges = list(node.path_up())[::-1]
        return self._usable_point([*edges, *([child] if child else [])], position + inside)

    def match(
        self,
        token_ids: Int32Array,
        extra_key: str | None,
        max_tokens: int,
        *,
        priority: int = 0,
    ) -> MatchResult:
        point = self.match_len(token_ids, extra_key, max_tokens)
        hit = super().match(token_ids, extra_key, point, priority=priority)
        if hit.num_tokens != point:
            raise InvariantError(f"a prefix of {point} tokens was found, {hit.num_tokens} matched")
        pages = list(hit.page_ids)
        for g, (rule, _) in self._windows.items():
            pages[g] = pages[g][rule.first_page(point) :]
        return replace(hit, page_ids=tuple(pages))

    def _usable_point(self, edges: Sequence[TreeNode], num_tokens: int) -> int:
        """The last page border of `edges`, at most `num_tokens`, that every window group bears."""
        num_points = num_tokens // self._page_size + 1
        borders = np.arange(num_points)
        usable = np.ones(num_points, np.bool_)
        for g, (rule, _) in self._windows.items():
            entries = np.concatenate([edge.pages[g].view() for edge in edges])[: num_points - 1]
            # after_hole[i]: all pages in [after_hole[i], i) are held
            after_hole = np.zeros(num_points, np.int64)
            after_hole[1:] = np.where(entries == NO_PAGE, borders[1:], 0)
            usable &= rule.first_pages(num_points) >= np.maximum.accumulate(after_hole)
        return int(np.flatnonzero(usable)[-1]) * self._page_size

    # ---- entering ---------------------------------------------------------------------------

    def insert(
        self,
        handle: PrefixHandle,
        token_ids: Int32Array,
        num_tokens: int,
        page_ids: tuple[Int32Array, ...],
    ) -> int:
        """See `BasePrefixCache.insert`; window groups enter with holes, `keep_window` fills."""
        holes = np.broadcast_to(np.array(NO_PAGE, np.int32), (num_tokens // self._page_size,))
        entries = tuple(holes if g in self._windows else ids for g, ids in enumerate(page_ids))
        return super().insert(handle, token_ids, num_tokens, entries)

    def keep_window(
        self,
        handle: PrefixHandle,
        token_ids: Int32Array,
        num_tokens: int,
        held: Sequence[HeldWindow],
    ) -> None:
        size = self._page_size
        end = num_tokens // size
        node, position, child, inside = self.tree.walk(
            handle.node, token_ids, handle.num_tokens, end * size
        )
        if position + inside != end * size:
            raise InvariantError(f"{num_tokens} tokens were not inserted before their window")
        # A repeat computes at least one token, so it begins at the last border before the end.
        border = max(0, num_tokens - 1) // size * size
        for g, (rule, index) in self._windows.items():
            first = max(rule.first_page(border), held[g].first_page)
            if first > rule.first_page(end * size):
                continue
            for edge, begins in _edges_up(node, position // size, child):
                low, high = max(first, begins), min(end, begins + edge.num_pages)
                if low < high:
                    ids = held[g].page_ids[low - held[g].first_page : high - held[g].first_page]
                    self._fill(edge, g, index, low - begins, ids)
                if begins <= first:
                    break

    def _fill(
        self, node: TreeNode, group: int, index: WindowPageIndex, at: int, ids: Int32Array
    ) -> None:
        """Put a row's own pages where the edge has holes."""
        entries = node.pages[group].view(at, at + len(ids))
        wanted = (entries == NO_PAGE) & (index.state[ids] == PageState.USED)
        if wanted.any():
            index.adopt(ids[wanted], node.id)
            node.pages[group].overwrite(at, np.where(wanted, ids, entries))
            self._snapshots.put(node)

    def release(self, handle: PrefixHandle) -> None:
        super().release(handle)
        self._prune(handle.node)

    # ---- leaving ----------------------------------------------------------------------------

    def evict_windows(self, wanted: Sequence[int]) -> tuple[int, ...]:
        freed = [0] * len(self._indexes)
        busy: list[TreeNode] = []
        while any(have < want for have, want in zip(freed, wanted, strict=True)):
            node = self._snapshots.pop_coldest()
            if node is None:
                break
            counts = self._drop_first_run(node)
            if not any(counts) and self._holds_window(node):
                busy.append(node)  # rows read all of it
                continue
            freed = [have + more for have, more in zip(freed, counts, strict=True)]
            self._queue_snapshot(node)
            self._prune(node)
        for node in busy:
            self._snapshots.put(node)
        return tuple(freed)

    def evict_cold_windows(self) -> int:
        leaves = self._by_policy.coldest()
        busy: list[TreeNode] = []
        num_freed = 0
        while leaves and (node := self._snapshots.pop_coldest()) is not None:
            if node.tick > leaves[0].tick:
                self._snapshots.put(node)
                break
            num_freed += 1
            while any(self._drop_first_run(node)):
                pass
            if self._holds_window(node):
                busy.append(node)
            self._prune(node)
            leaves = self._by_policy.coldest()
        for node in busy:
            self._snapshots.put(node)
        return num_freed

    def _drop_first_run(self, node: TreeNode) -> list[int]:
        """Free the first idle pages in a row of every window group; pages freed by group."""
        counts = [0] * len(self._indexes)
        for g, (_, index) in self._windows.items():
            entries = node.pages[g].view()
            idle = index.idle_in(entries)
            if not idle.any():
                continue
            first = int(idle.argmax())
            after = ~idle[first:]
            count = int(after.argmax()) if after.any() else len(after)
            index.release(entries[first : first + count].copy())
            node.pages[g].overwrite(first, np.full(count, NO_PAGE, np.int32))
            counts[g] = count
        return counts

    def _holds_window(self, node: TreeNode) -> bool:
        return any((node.pages[g].view() != NO_PAGE).any() for g in self._windows)

    def _queue_snapshot(self, node: TreeNode) -> None:
        if self._holds_window(node):
            self._snapshots.put(node)
        else:
            self._snapshots.discard(node)

    def _prune(self, node: TreeNode) -> None:
        """Where no group keeps all, tokens behind the last held page are of no use: cut them."""
        while not self._keeps_all and node.is_evictable_leaf:
            held = np.zeros(node.num_pages, np.bool_)
            for g in self._windows:
                held |= node.pages[g].view() != NO_PAGE
            useless = node.num_pages if not held.any() else int(held[::-1].argmax())
            parent = node.parent
            if useless:
                self._evict_from(node, useless)
            if held.any() or parent is None:
                return
            node = parent

    def _evict_from(self, leaf: TreeNode, wanted: int) -> int:
        whole = wanted >= leaf.num_pages
        count = super()._evict_from(leaf, wanted)
        if whole:
            self._snapshots.discard(leaf)
        elif leaf in self._snapshots:
            self._queue_snapshot(leaf)
        return count

    def _split(self, node: TreeNode, num_tokens: int) -> TreeNode:
        upper = super()._split(node, num_tokens)
        for part in (upper, node):
            self._queue_snapshot(part)
        return upper

    # ---- audit ------------------------------------------------------------------------------

    def _check_pages(self, node: TreeNode, group: int) -> None:
        if group not in self._windows:
            super()._check_pages(node, group)
            return
        index = self._windows[group][1]
        if len(node.pages[group]) != node.num_pages:
            raise InvariantError(f"{node!r} has an entry too few or too many")
        pages = held_pages(node.pages[group].view())
        if (index.node[pages] != node.id).any() or (index.state[pages] != PageState.CACHED).any():
            raise InvariantError(f"{node!r} does not own the window pages of its edge")
        if self._holds_window(node) != (node in self._snapshots):
            raise InvariantError(f"{node!r} is wrong in the queue of snapshots")

    def _check_total(self, group: int, total: int) -> None:
        if group not in self._windows:
            super()._check_total(group, total)
            return
        index = self._windows[group][1]
        nodes = [node.pages[group].view() for node in self.tree.nodes()]
        held = sum(len(held_pages(entries)) for entries in nodes)
        cached = index.state == PageState.CACHED
        idle = int((cached & (index.rows == 0)).sum())
        if (held, idle) != (index.num_cached, index.num_idle):
            raise InvariantError(f"{index!r}: {held} cached and {idle} idle pages were found")


def _edges_up(
    node: TreeNode, num_pages: int, child: TreeNode | None
) -> Iterator[tuple[TreeNode, int]]:
    """(edge, pages before it) from below: `child`, then `node`, which ends after `num_pages`."""
    if child is not None:
        yield child, num_pages
    for edge in node.path_up():
        num_pages -= edge.num_pages
        yield edge, num_pages

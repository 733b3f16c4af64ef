"""The shape of the prefix tree: edges of whole pages, compared as arrays, cut and grown in place.

`RadixCache` owns one and decides everything about locks, time and eviction; this module only
knows tokens, pages and nodes. An edge is keyed by the bytes of its first page, so two edges below
one node differ within that page and a walk looks at one edge per step.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Set

import numpy as np
import numpy.typing as npt

from sglang.srt.errors import InvariantError
from sglang.srt.mem_cache.id_array import IdArray

Int32Array = npt.NDArray[np.int32]

# First block that is compared; blocks double, so a walk costs O(matched tokens) in few calls, and
# end at a size whose intermediate result stays in a core's cache.
_FIRST_COMPARE_TOKENS = 1 << 10
_MOST_COMPARE_TOKENS = 1 << 19


class TreeNode:
    """One edge and the point below it. A root has no tokens, no pages and no parent.

    `tokens` and each `pages[g]` grow and shrink together by whole pages. `lock_ref` counts the
    handles at this node and below. `tick` orders uses, `last_used` is their time in seconds,
    `created` is the tick at which the edge was begun, `priority` the highest of the requests that
    inserted or matched it. `hashes` belong to the recorder of events, two ids per page.
    """

    __slots__ = (
        "children",
        "created",
        "extra_key",
        "hashes",
        "hits",
        "id",
        "last_used",
        "lock_ref",
        "pages",
        "parent",
        "priority",
        "tick",
        "tokens",
    )

    def __init__(
        self,
        node_id: int,
        parent: TreeNode | None,
        tokens: IdArray,
        pages: tuple[IdArray, ...],
        extra_key: str | None,
    ) -> None:
        self.id = node_id
        self.parent = parent
        self.tokens = tokens
        self.pages = pages
        self.extra_key = extra_key
        self.children: dict[bytes, TreeNode] = {}
        self.lock_ref = 0
        self.hits = 0
        self.tick = 0
        self.created = 0
        self.hashes: IdArray | None = None
        self.priority = 0
        self.last_used = 0.0

    @property
    def num_pages(self) -> int:
        """Pages of this edge, the same in every group."""
        return len(self.pages[0])

    @property
    def is_root(self) -> bool:
        return self.parent is None

    @property
    def is_evictable_leaf(self) -> bool:
        """Whether its pages may go next: nothing below, no lock, not a root."""
        return self.parent is not None and not self.children and self.lock_ref == 0

    def path_up(self) -> Iterator[TreeNode]:
        """This node, then its ancestors up to and with the root."""
        node: TreeNode | None = self
        while node is not None:
            yield node
            node = node.parent

    def __repr__(self) -> str:
        return f"TreeNode({self.id}, tokens={len(self.tokens)}, locks={self.lock_ref})"


class RadixTree:
    """Nodes by namespace (`extra_key`); the two counters tell tests what a walk cost."""

    def __init__(self, page_size: int, num_groups: int) -> None:
        self.page_size = page_size
        self.num_groups = num_groups
        self.num_visits = 0
        self.num_compares = 0
        self._roots: dict[str | None, TreeNode] = {}
        self._ids = itertools.count()

    def find_root(self, extra_key: str | None) -> TreeNode | None:
        """The namespace's root, None when it holds nothing."""
        return self._roots.get(extra_key)

    def get_root(self, extra_key: str | None) -> TreeNode:
        """The namespace's root, made at need; `drop_root_if_bare` ends it."""
        root = self._roots.get(extra_key)
        if root is None:
            none = tuple(IdArray() for _ in range(self.num_groups))
            root = TreeNode(next(self._ids), None, IdArray(), none, extra_key)
            self._roots[extra_key] = root
        return root

    def drop_root_if_bare(self, root: TreeNode) -> None:
        """Forget a namespace that holds nothing and that no handle points at."""
        if not root.children and root.lock_ref == 0:
            self._roots.pop(root.extra_key, None)

    def nodes(self) -> Iterator[TreeNode]:
        """Every node, parents before children (for audits: walks the whole tree)."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def walk(
        self, start: TreeNode, tokens: Int32Array, first: int, end: int
    ) -> tuple[TreeNode, int, TreeNode | None, int]:
        """Follow tokens[first:end] down from the end of `start`; changes nothing.

        Returns (node, position, child, inside): `node` is the last one matched to its end, at
        token `position`; `child` is the edge below it of which `inside` further tokens match,
        0 < inside < its length, page-aligned; or None when no further page matches.
        """
        node, position, page = start, first, self.page_size
        while position + page <= end:
            child = node.children.get(tokens[position : position + page].tobytes())
            self.num_visits += 1
            if child is None:
                break
            length = len(child.tokens)
            limit = min(length, (end - position) // page * page)
            same = self._same_tokens(child.tokens.view(0, limit), tokens[position:][:limit])
            same -= same % page
            if same < length:
                return node, position, child, same
            node, position = child, position + length
        return node, position, None, 0

    def add_leaf(
        self, parent: TreeNode, tokens: Int32Array, pages: tuple[Int32Array, ...]
    ) -> TreeNode:
        """Hang an edge of whole pages below `parent`. Raises InvariantError when one is there."""
        key = tokens[: self.page_size].tobytes()
        if key in parent.children:
            raise InvariantError(f"{parent!r} already has an edge that begins with these tokens")
        arrays = tuple(IdArray(ids) for ids in pages)
        node = TreeNode(next(self._ids), parent, IdArray(tokens), arrays, parent.extra_key)
        parent.children[key] = node
        return node

    def grow_leaf(self, node: TreeNode, tokens: Int32Array, pages: tuple[Int32Array, ...]) -> None:
        """Lengthen a leaf's edge by whole pages in place, amortised O(new tokens)."""
        node.tokens.append(tokens)
        for array, ids in zip(node.pages, pages, strict=True):
            array.append(ids)

    def split(self, node: TreeNode, num_tokens: int) -> TreeNode:
        """Cut an edge after `num_tokens` (whole pages, inside it); returns the new upper node.

        `node` stays the lower part, so handles at it stay true; the upper part has its locks.
        """
        parent = node.parent
        if parent is None or not 0 < num_tokens < len(node.tokens):
            raise InvariantError(f"{node!r} can't be split after {num_tokens} tokens")
        key = node.tokens.view(0, self.page_size).tobytes()
        count = num_tokens // self.page_size
        head_tokens = node.tokens.split_head(num_tokens)
        head_pages = tuple(array.split_head(count) for array in node.pages)
        upper = TreeNode(next(self._ids), parent, head_tokens, head_pages, node.extra_key)
        upper.lock_ref, upper.hits = node.lock_ref, node.hits
        upper.tick, upper.last_used = node.tick, node.last_used
        upper.created, upper.priority = node.created, node.priority
        if node.hashes is not None:
            upper.hashes = node.hashes.split_head(2 * count)
        upper.children[node.tokens.view(0, self.page_size).tobytes()] = node
        node.parent = upper
        parent.children[key] = upper
        return upper

    def cut_tail(self, node: TreeNode, count: int) -> tuple[Int32Array, ...]:
        """Drop a leaf's last `count` pages (fewer than it has) and return them by group."""
        node.tokens.cut_tail(count * self.page_size)
        return tuple(array.cut_tail(count) for array in node.pages)

    def remove_leaf(self, node: TreeNode) -> TreeNode:
        """Take a leaf out; returns its parent. Raises InvariantError for a root or inner node."""
        parent = node.parent
        if parent is None or node.children:
            raise InvariantError(f"{node!r} is not a leaf")
        del parent.children[node.tokens.view(0, self.page_size).tobytes()]
        return parent

    def move_pages(self, group: int, nodes: Set[int], moved_to: Int32Array) -> None:
        """Page p of the nodes with these ids is now moved_to[p]; fresh arrays, walks the tree.

        Negative entries (a window group's holes) stay.
        """
        for node in self.nodes():
            if node.id in nodes:
                pages = list(node.pages)
                before = pages[group].view()
                pages[group] = IdArray(np.where(before < 0, before, moved_to[before]))
                node.pages = tuple(pages)

    def _same_tokens(self, edge: Int32Array, tokens: Int32Array) -> int:
        """Length of the common prefix of two arrays of one length, compared block by block."""
        first, block = 0, _FIRST_COMPARE_TOKENS
        while first < len(edge):
            differ = edge[first : first + block] != tokens[first : first + block]
            self.num_compares += 1
            if differ.any():
                return first + int(differ.argmax())
            first, block = first + block, min(2 * block, _MOST_COMPARE_TOKENS)
        return len(edge)

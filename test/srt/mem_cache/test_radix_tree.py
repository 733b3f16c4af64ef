from __future__ import annotations

import numpy as np
import pytest

from sglang.srt.errors import InvariantError
from sglang.srt.mem_cache.radix_tree import RadixTree, TreeNode


def arr(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def leaf(tree: RadixTree, parent: TreeNode, tokens: list[int], first_page: int) -> TreeNode:
    count = len(tokens) // tree.page_size
    pages = np.arange(first_page, first_page + count, dtype=np.int32)
    return tree.add_leaf(parent, arr(*tokens), (pages,) * tree.num_groups)


def test_walk_stops_at_whole_pages() -> None:
    tree = RadixTree(page_size=2, num_groups=1)
    root = tree.get_root(None)
    node = leaf(tree, root, [1, 2, 3, 4, 5, 6], 10)
    cases = {
        (): (root, 0, None, 0),
        (1,): (root, 0, None, 0),
        (1, 9): (root, 0, None, 0),
        (1, 2): (root, 0, node, 2),
        (1, 2, 3, 9): (root, 0, node, 2),
        (1, 2, 3, 4, 5): (root, 0, node, 4),
        (1, 2, 3, 4, 5, 6): (node, 6, None, 0),
        (1, 2, 3, 4, 5, 6, 7, 8): (node, 6, None, 0),
    }
    for tokens, found in cases.items():
        assert tree.walk(root, arr(*tokens), 0, len(tokens)) == found, tokens
    assert tree.walk(node, arr(1, 2, 3, 4, 5, 6, 7, 8), 6, 8) == (node, 6, None, 0)
    assert tree.walk(root, arr(1, 2, 3, 4), 0, 3) == (root, 0, node, 2), "`end` bounds the walk"


def test_edges_that_part_within_a_page_are_two_edges() -> None:
    tree = RadixTree(page_size=2, num_groups=1)
    root = tree.get_root(None)
    one = leaf(tree, root, [1, 2], 10)
    two = leaf(tree, root, [1, 3], 11)
    assert tree.walk(root, arr(1, 2), 0, 2)[0] is one
    assert tree.walk(root, arr(1, 3), 0, 2)[0] is two
    with pytest.raises(InvariantError):
        leaf(tree, root, [1, 3, 4, 4], 12)


def test_split_keeps_the_lower_node_and_copies_the_locks() -> None:
    tree = RadixTree(page_size=1, num_groups=2)
    root = tree.get_root(None)
    lower = leaf(tree, root, [1, 2, 3, 4, 5], 10)
    lower.lock_ref, lower.tick, lower.hits, lower.last_used = 3, 7, 2, 1.5
    lower.created, lower.priority = 5, -2
    upper = tree.split(lower, 2)
    assert upper.parent is root
    assert lower.parent is upper
    assert (upper.created, upper.priority) == (5, -2)
    assert (upper.tokens.view().tolist(), lower.tokens.view().tolist()) == ([1, 2], [3, 4, 5])
    assert [array.view().tolist() for array in upper.pages] == [[10, 11]] * 2
    assert [array.view().tolist() for array in lower.pages] == [[12, 13, 14]] * 2
    assert (upper.lock_ref, upper.tick, upper.hits, upper.last_used) == (3, 7, 2, 1.5)
    assert tree.walk(root, arr(1, 2, 3, 4, 5), 0, 5) == (lower, 5, None, 0)
    for count in (0, 3):
        with pytest.raises(InvariantError):
            tree.split(lower, count)
    with pytest.raises(InvariantError):
        tree.split(root, 0)


def test_a_leaf_grows_and_is_cut_in_place() -> None:
    tree = RadixTree(page_size=2, num_groups=1)
    root = tree.get_root(None)
    node = leaf(tree, root, [1, 2], 10)
    for step in range(1, 100):
        tree.grow_leaf(node, arr(step, step), (arr(10 + step),))
    assert [child.id for child in root.children.values()] == [node.id]
    assert node.num_pages == 100
    assert tree.cut_tail(node, 98)[0].tolist() == list(range(12, 110))
    assert node.tokens.view().tolist() == [1, 2, 1, 1]
    assert tree.remove_leaf(node) is root
    assert root.children == {}


def test_namespaces_end_with_their_last_content() -> None:
    tree = RadixTree(page_size=1, num_groups=1)
    root = tree.get_root("tenant")
    assert tree.find_root("tenant") is root
    assert tree.find_root(None) is None
    node = leaf(tree, root, [1], 10)
    tree.drop_root_if_bare(root)
    assert tree.find_root("tenant") is root
    tree.remove_leaf(node)
    root.lock_ref = 1
    tree.drop_root_if_bare(root)
    assert tree.find_root("tenant") is root
    root.lock_ref = 0
    tree.drop_root_if_bare(root)
    assert tree.find_root("tenant") is None
    with pytest.raises(InvariantError):
        tree.remove_leaf(root)


def test_a_million_tokens_are_compared_as_arrays() -> None:
    tree = RadixTree(page_size=64, num_groups=1)
    root = tree.get_root(None)
    tokens = np.arange(1 << 20, dtype=np.int32)
    tree.add_leaf(root, tokens, (np.arange(1 << 14, dtype=np.int32),))
    node, position, child, inside = tree.walk(root, tokens, 0, len(tokens))
    assert (position, child, inside) == (1 << 20, None, 0)
    assert node.num_pages == 1 << 14
    assert tree.num_visits == 1
    assert tree.num_compares <= 11


def test_a_short_match_in_a_long_edge_compares_little() -> None:
    tree = RadixTree(page_size=64, num_groups=1)
    root = tree.get_root(None)
    tokens = np.arange(1 << 20, dtype=np.int32)
    tree.add_leaf(root, tokens, (np.arange(1 << 14, dtype=np.int32),))
    other = tokens.copy()
    other[200] = -1
    assert tree.walk(root, other, 0, len(other))[3] == 192
    assert tree.num_compares == 1

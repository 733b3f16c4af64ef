"""What the prefix cache does at scale, in counts: array compares, node visits, Python lines.

Lines are counted by the interpreter itself, one event for each line that runs, loops included, so a
loop over tokens, pages or leaves can't hide; times would say the same with noise.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch

from sglang.srt.mem_cache.allocation import KVMemory, PageNeed
from sglang.srt.mem_cache.kv_layout import KVCacheSpec, KVGroupSpec
from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.srt.mem_cache.radix_tree import RadixTree
from sglang.srt.mem_cache.segment_backing.base import Plane
from srt.mem_cache.fake_backing import FakeBacking

PAGE = 64
CHUNK = 8192
SEGMENT_PAGES = 64
LONG = 10_000_000 // PAGE * PAGE


class NoPlanes(FakeBacking):
    """Only ids matter here."""

    def view(self, layer: int, plane: Plane) -> torch.Tensor:
        return torch.zeros(1)


def make_memory(
    num_groups: int, num_tokens: int, page_size: int = PAGE, segment_pages: int = SEGMENT_PAGES
) -> KVMemory:
    groups = tuple(KVGroupSpec((g,)) for g in range(num_groups))
    spec = KVCacheSpec(groups, 1, 2, 1, "float32", page_size)
    budget = 2 * num_tokens * spec.bytes_per_token
    return KVMemory.create(
        spec,
        NoPlanes(),
        budget_bytes=budget,
        machine_bytes=budget,
        max_requests=8,
        slots_per_segment=segment_pages * page_size,
    )


def tree_of(memory: KVMemory) -> RadixTree:
    assert isinstance(memory.cache, RadixCache)
    return memory.cache.tree


def lines_of(action: Callable[[], object]) -> int:
    """Lines of Python that run during `action`, in every function that it reaches."""
    count = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return count


def compute(memory: KVMemory, tokens: np.ndarray, chunk: int = CHUNK) -> None:
    """A whole life: open, prefill in chunks that are shared at once, close."""
    lease = memory.open(tokens, max_prefix=len(tokens))
    assert lease is not None
    while lease.num_tokens < len(tokens):
        count = min(chunk, len(tokens) - lease.num_tokens)
        assert memory.alloc_for_extend([PageNeed(lease, count)]) is not None
        memory.cache_prefix(lease, tokens, lease.num_tokens)
    memory.close(lease, tokens, len(tokens))


def hit(memory: KVMemory, tokens: np.ndarray) -> int:
    lease = memory.open(tokens, max_prefix=len(tokens))
    assert lease is not None
    memory.close(lease, None, 0)
    return lease.num_cached_tokens


def random_tokens(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 150_000, count).astype(np.int32)


def test_lines_are_counted_where_a_loop_hides() -> None:
    few, many = (lines_of(lambda n=n: [x + 1 for x in range(n)]) for n in (10, 1000))
    assert many - few >= 900


@pytest.mark.parametrize("num_groups", [1, 2])
def test_a_prefill_of_ten_million_tokens_is_one_edge_and_compares_nothing(num_groups: int) -> None:
    memory = make_memory(num_groups, LONG)
    tree = tree_of(memory)
    tokens = random_tokens(LONG)
    compute(memory, tokens)
    assert [len(node.tokens) for node in tree.nodes() if not node.is_root] == [LONG]
    assert tree.num_compares == 0, "what a handle stands on is never compared again"
    assert tree.num_visits <= 1 + -(-LONG // CHUNK) + 1

    # a hit of all of it: one edge, tens of compares, hundreds of lines
    tree.num_visits = tree.num_compares = 0
    found = []
    lines = lines_of(lambda: found.append(hit(memory, tokens.copy())))
    assert found == [LONG]
    assert (tree.num_visits, tree.num_compares) == (1, 28)
    assert lines < 500 * (1 + num_groups)

    # a sequence that parts in the middle splits the edge by array slices
    fork = tokens[: LONG // 2 + PAGE].copy()
    fork[-PAGE:] += 1
    half = LONG // 2 // PAGE * PAGE
    tree.num_visits = tree.num_compares = 0
    assert lines_of(lambda: compute(memory, fork)) < 2000 * num_groups
    assert tree.num_visits <= 4
    assert tree.num_compares <= 2 * 19
    assert sorted(len(n.tokens) for n in tree.nodes() if not n.is_root) == [
        len(fork) // PAGE * PAGE - half,
        half,
        LONG - half,
    ]

    # the end of a leaf goes, whatever its length, without a visit
    tree.num_visits = 0
    freed = []
    assert lines_of(lambda: freed.append(memory.cache.evict(1))) < 300 * num_groups
    lines = lines_of(lambda: freed.append(memory.cache.evict(LONG // PAGE // 4)))
    assert freed == [1, LONG // PAGE // 4]
    num_segments = freed[1] // SEGMENT_PAGES + 2
    assert lines < 300 + 30 * num_segments * num_groups, "each segment's counts, not each page"
    assert tree.num_visits == 0
    memory.audit()


@pytest.mark.parametrize("page_size", [1, 16])
def test_small_pages_cost_no_lines_either(page_size: int) -> None:
    counts = {}
    for num_tokens in (100_000, 800_000):
        memory = make_memory(1, num_tokens, page_size)
        tokens = random_tokens(num_tokens)
        compute(memory, tokens, chunk=num_tokens)
        counts[num_tokens] = lines_of(lambda m=memory, t=tokens: hit(m, t.copy()))
    assert counts[800_000] - counts[100_000] < 700_000 // 2000, "lines per block of an array"


def shared_keys(count: int, length: int) -> list[np.ndarray]:
    """Keys in families of a hundred that share three quarters; the first quarter is all alike."""
    parts = length // 4
    tokens = [np.arange(parts, dtype=np.int32)]
    keys = []
    for number in range(count):
        if number % 100 == 0:
            tokens = [tokens[0], random_tokens(2 * parts, number + 1)]
        own = random_tokens(length - 3 * parts, -number - 1 & 0xFFFFFFFF)
        keys.append(np.concatenate([*tokens, own]))
    return keys


def lines_at_scale(num_keys: int) -> dict[str, int]:
    """Most lines that one operation takes among many keys of 1,000 tokens."""
    length = 1000
    memory = make_memory(1, num_keys * 400 + 100_000, page_size=4, segment_pages=1024)
    tree = tree_of(memory)
    most = {"insert": 0, "match": 0, "evict": 0}
    keys = shared_keys(num_keys, length)
    watched = num_keys - 50
    for number, tokens in enumerate(keys):
        if number < watched:
            compute(memory, tokens)
            continue
        lease = memory.open(tokens, max_prefix=length)
        assert lease is not None
        assert memory.alloc_for_extend([PageNeed(lease, length - lease.num_tokens)]) is not None
        tree.num_visits = tree.num_compares = 0
        lines = lines_of(lambda e=lease, t=tokens: memory.cache_prefix(e, t, length))
        most["insert"] = max(most["insert"], lines)
        assert (tree.num_visits, tree.num_compares) == (1, 0)
        memory.close(lease, None, 0)
    for tokens in keys[:: max(1, num_keys // 50)]:
        tree.num_visits = tree.num_compares = 0
        lines = lines_of(lambda t=tokens: hit(memory, t))
        most["match"] = max(most["match"], lines)
        assert tree.num_visits <= 4, "root, common part, family, own"
        assert tree.num_compares <= 4
    tree.num_visits = 0
    own_pages = (length - 3 * (length // 4)) // 4
    for _ in range(50):
        freed: list[int] = []
        lines = lines_of(lambda f=freed: f.append(memory.cache.evict(own_pages)))
        most["evict"] = max(most["evict"], lines)
        assert freed == [own_pages]
    assert tree.num_visits == 0, "evicting looks at the queue, never at the tree"
    return most


def test_one_operation_takes_as_many_lines_among_few_keys_as_among_many() -> None:
    few, many = lines_at_scale(300), lines_at_scale(3000)
    for name, lines in many.items():
        assert lines <= few[name] + 60, (name, few, many)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_hundred_thousand_keys() -> None:
    few, many = lines_at_scale(300), lines_at_scale(100_000)
    for name, lines in many.items():
        assert lines <= few[name] + 60, (name, few, many)

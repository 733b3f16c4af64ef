"""The KV canary: silent while all is well, and whatever is damaged is found and named.

Each damage below is planted by hand between two steps, so a canary that can't fire fails here.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from sglang.srt.errors import InvariantError
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.block_table import BlockTable
from sglang.srt.mem_cache.compaction import compact
from sglang.srt.mem_cache.page_owner import PageState
from sglang.srt.mem_cache.radix_tree import RadixTree
from srt.managers.scheduler_harness import Harness, expected_output, make_memory

PAGE = 4


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 900, length).tolist()


def watched(mode: str = "chain", *, groups: int = 1, segments: int = 8) -> Harness:
    memory = make_memory(page_size=PAGE, pages_per_segment=16, segments=segments, groups=groups)
    return Harness(memory, page_size=PAGE, canary=mode, context_length=segments * 64)


def two_running(mode: str = "chain", *, groups: int = 1) -> tuple[Harness, Req, Req]:
    """Two requests that decode, each with a prompt of five pages, and one prefix in the cache."""
    harness = watched(mode, groups=groups)
    harness.send("done", prompt_of(20, 3), max_new=1)
    harness.run()
    harness.send("one", prompt_of(22, 1), max_new=60)
    harness.send("two", prompt_of(22, 2), max_new=60)
    harness.turn(6)
    one, two = harness.scheduler.requests()
    assert harness.control("audit").success
    return harness, one, two


@pytest.mark.parametrize("mode", ["chain", "full"])
@pytest.mark.parametrize("groups", [1, 2])
def test_it_is_silent_over_a_busy_life(mode: str, groups: int) -> None:
    rng = random.Random(groups)
    harness = watched(mode, groups=groups)
    shared, unit = prompt_of(40, 9), harness.memory.manager.budget_bytes // 8
    sent = {}
    for i in range(60):
        prompt = shared[: rng.randrange(40)] + prompt_of(rng.randrange(1, 70), i)
        sent[f"r{i}"] = prompt
        harness.send(f"r{i}", prompt, max_new=10, extra_key=rng.choice([None, "a", ""]))
        if rng.random() < 0.2:
            harness.abort(f"r{rng.randrange(i + 1)}")
        if rng.random() < 0.2:
            harness.ask("set_kv_budget", budget_bytes=rng.randrange(2, 9) * unit)
        if rng.random() < 0.2:
            harness.ask("compact_kv")
        harness.turn(rng.randrange(1, 5))
        if i % 7 == 0:
            assert harness.control("audit").success
    harness.control("set_kv_budget", budget_bytes=8 * unit)
    harness.run()
    for rid, prompt in sent.items():
        got = harness.output(rid)
        assert got == expected_output(prompt, len(got))
        assert harness.final(rid).type == "abort" or len(got) == 10
    assert harness.control("audit").success


# ---- perturbations -----------------------------------------------------------------------------


def _swap_a_table_entry(harness: Harness, one: Req, two: Req) -> str:
    """The first request reads a page of the second."""
    assert one.kv is not None
    assert two.kv is not None
    pages = one.kv.tables[-1].page_ids.copy()
    pages[2] = two.kv.tables[-1].page_ids[2]
    one.kv.tables[-1].replace_pages(pages)
    return f"page {pages[2]} .*somebody else: positions 8 to 11 of Req\\(one"


def _a_used_page_of_somebody_else(harness: Harness, one: Req, two: Req) -> str:
    assert one.kv is not None
    assert harness.memory.canary is not None
    page = one.kv.tables[-1].last_page
    assert harness.memory.allocators[-1].index.state[page] == PageState.USED
    harness.memory.canary.marks[-1][page, 1] ^= np.uint64(2)
    first = (one.kv.tables[-1].num_pages - 1) * PAGE + 1
    return f"page {page} \\(USED.*positions {first} to {first} of Req\\(one"


def _a_cached_page_of_somebody_else(harness: Harness, one: Req, two: Req) -> str:
    assert two.kv is not None
    assert harness.memory.canary is not None
    page = two.kv.tables[-1].page_ids[0]
    assert harness.memory.allocators[-1].index.state[page] == PageState.CACHED
    harness.memory.canary.marks[-1][page] = 0
    return f"page {page} \\(CACHED, node [0-9]+, rows 1\\) .*positions 0 to 3 of Req\\(two"


def _free_a_page_in_use(harness: Harness, one: Req, two: Req) -> str:
    assert one.kv is not None
    page = one.kv.tables[-1].last_page
    harness.memory.allocators[-1].index.drop_row(np.array([page], np.int32))
    return f"page {page} \\(FREE.*has no owner: .*Req\\(one"


DAMAGES = [
    _swap_a_table_entry,
    _a_used_page_of_somebody_else,
    _a_cached_page_of_somebody_else,
    _free_a_page_in_use,
]


def last_page_is_begun(harness: Harness, one: Req) -> None:
    """Turn until the request's last page holds at least two tokens and has room."""
    while one.num_scheduled % PAGE != 2:
        harness.turn()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("damage", DAMAGES)
def test_before_the_next_forward_every_damage_is_named(
    damage: Callable[[Harness, Req, Req], str], groups: int
) -> None:
    harness, one, two = two_running(groups=groups)
    last_page_is_begun(harness, one)
    text = damage(harness, one, two)
    with pytest.raises(InvariantError, match=f"canary: group {groups - 1}, {text}"):
        harness.turn()


def test_the_audit_finds_a_cached_prefix_that_nobody_reads() -> None:
    harness, _, _ = two_running()
    canary, cache = harness.memory.canary, harness.memory.cache
    assert canary is not None
    (leaf,) = (n for n in cache.tree.nodes() if n.is_evictable_leaf)  # type: ignore[attr-defined]
    page = leaf.pages[0][3]
    canary.marks[0][page, 2] = 7
    harness.turn()  # nobody reads it: forwards go on
    with pytest.raises(InvariantError, match=rf"page {page} .*positions 14 to 14 of TreeNode"):
        harness.control("audit")


def test_full_mode_sees_a_changed_byte_that_marks_can_not() -> None:
    harness, one, _ = two_running("full")
    assert one.kv is not None
    slot = one.kv.tables[0].slot_of(9)
    harness.memory.kv_pool.get_value_buffer(1)[slot] += 1
    with pytest.raises(InvariantError, match=r"has other bytes .*positions 9 to 9 of Req"):
        harness.turn()


@pytest.mark.parametrize("mode", ["chain", "full"])
def test_a_lost_copy_on_move(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Marks move with the bookkeeping; that the bytes did not is what mode full is for."""
    monkeypatch.setattr("sglang.srt.mem_cache.compaction.copy_pages", lambda *_: None)
    harness = watched(mode)
    for i in range(6):
        harness.send(f"r{i}", prompt_of(40, i), max_new=60)
    harness.turn(9)
    for i in (0, 2, 3):
        harness.abort(f"r{i}")
    harness.turn()
    harness.memory.cache.evict(1000)
    assert harness.scheduler.num_running == 3
    assert compact(harness.memory, 1 << 30) is not None
    if mode == "full":
        with pytest.raises(InvariantError, match="has other bytes than were written"):
            harness.control("audit")
    else:
        harness.memory.audit()
        with pytest.raises(AssertionError):  # of the worker, whose model is a checksum
            harness.turn()


def test_off_means_not_there() -> None:
    memory = make_memory(page_size=PAGE)
    harness = Harness(memory, page_size=PAGE)
    assert memory.canary is None
    assert harness.limits.overlap


# ---- bugs of the code itself, found before an answer is wrong ----------------------------------


def _table_not_told(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockTable, "replace_pages", lambda self, pages: None)


def _wrong_namespace(patch: pytest.MonkeyPatch) -> None:
    """A hit in another tenant's prefix: right tokens, wrong owner. Only marks can tell."""
    real = RadixTree.get_root
    patch.setattr(RadixTree, "get_root", lambda self, extra_key: real(self, None))


def _crowded_life(harness: Harness) -> None:
    """Two tenants with one prompt's beginning; gaps, a compaction, a repeat. No audit runs."""
    shared = prompt_of(30, 50)
    for i in range(6):
        harness.send(f"r{i}", [*shared, *prompt_of(10, i)], max_new=30, extra_key=f"{i % 2}")
    harness.turn(9)
    for i in (0, 2, 3):
        harness.abort(f"r{i}")
    harness.turn()
    harness.memory.cache.evict(1000)
    compact(harness.memory, 1 << 30)
    harness.send("again", [*shared, 1], max_new=3, extra_key="1")
    harness.run()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("plant", [_table_not_told, _wrong_namespace])
def test_a_planted_bug_is_named_before_the_forward_that_would_read_it(
    plant: Callable[[pytest.MonkeyPatch], None], groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _crowded_life(watched(groups=groups))
    plant(monkeypatch)
    with pytest.raises(InvariantError, match=r"^canary: group"):
        _crowded_life(watched(groups=groups))

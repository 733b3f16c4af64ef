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
from sglang.srt.mem_cache.canary_perturb import KINDS as KINDS_OF_DAMAGE
from sglang.srt.mem_cache.canary_perturb import Perturbation
from sglang.srt.mem_cache.compaction import compact
from sglang.srt.mem_cache.kv_layout import GroupKind
from sglang.srt.mem_cache.page_owner import PageState
from sglang.srt.mem_cache.radix_tree import RadixTree
from sglang.srt.mem_cache.window_index import NO_PAGE
from sglang.srt.mem_cache.window_rule import window_rules
from srt.managers.scheduler_harness import Harness, expected_output, make_memory
from srt.mem_cache.memory_driver import FULL, Window

PAGE = 4
PROMPT = 46  # ends in a page's middle, beyond the windows below

# What the layer groups keep: everything, or one of two recycles its pages.
KINDS: dict[str, tuple[Window, ...]] = {
    "one": (FULL,),
    "two": (FULL, FULL),
    "sliding": (FULL, (GroupKind.SLIDING, 16)),
    "chunked": (FULL, (GroupKind.CHUNKED, 32)),
}
GROUPS = [(kind, group) for kind, windows in KINDS.items() for group in range(len(windows))]


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 900, length).tolist()


def watched(
    mode: str = "chain", *, kind: str = "one", segments: int = 8, perturb: str | None = None
) -> Harness:
    windows = KINDS[kind]
    memory = make_memory(page_size=PAGE, pages_per_segment=16, segments=segments, windows=windows)
    length = segments * 64
    return Harness(memory, page_size=PAGE, canary=mode, perturb=perturb, context_length=length)


def two_running(mode: str = "chain", *, kind: str = "one") -> tuple[Harness, Req, Req]:
    """Two requests that decode, and one prefix in the cache that nobody reads."""
    harness = watched(mode, kind=kind)
    harness.send("done", prompt_of(PROMPT, 3), max_new=1)
    harness.run()
    harness.send("one", prompt_of(PROMPT, 1), max_new=60)
    harness.send("two", prompt_of(PROMPT, 2), max_new=60)
    harness.turn(6)
    one, two = harness.scheduler.requests()
    assert harness.control("audit").success
    return harness, one, two


@pytest.mark.parametrize("mode", ["chain", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_silent_over_a_busy_life(mode: str, kind: str) -> None:
    rng = random.Random(len(kind))
    harness = watched(mode, kind=kind)
    rules = window_rules(harness.memory.spec)
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
        assert got == expected_output(prompt, len(got), rules)
        assert harness.final(rid).type == "abort" or len(got) == 10
    assert harness.control("audit").success


# ---- perturbations -----------------------------------------------------------------------------


def _table(req: Req, group: int) -> BlockTable:
    assert req.kv is not None
    return req.kv.tables[group]


def _swap_a_table_entry(harness: Harness, one: Req, two: Req, group: int) -> str:
    """The first request reads a page of the second."""
    table = _table(one, group)
    pages = table.page_ids.copy()
    pages[1] = _table(two, group).page_ids[1]
    table.replace_pages(pages)
    first = (table.first_page + 1) * PAGE
    return f"page {pages[1]} .*somebody else: positions {first} to {first + 3} of Req\\(one"


def _a_used_page_of_somebody_else(harness: Harness, one: Req, two: Req, group: int) -> str:
    assert harness.memory.canary is not None
    page = _table(one, group).last_page
    assert harness.memory.allocators[group].index.state[page] == PageState.USED
    harness.memory.canary.marks[group][page, 1] ^= np.uint64(2)
    first = (_table(one, group).end_page - 1) * PAGE + 1
    return f"page {page} \\(USED.*positions {first} to {first} of Req\\(one"


def _a_cached_page_of_somebody_else(harness: Harness, one: Req, two: Req, group: int) -> str:
    assert harness.memory.canary is not None
    table = _table(two, group)
    index = harness.memory.allocators[group].index
    (*_, last) = np.flatnonzero(index.state[table.page_ids] == PageState.CACHED).tolist()
    page, first = table.page_ids[last], (table.first_page + last) * PAGE
    harness.memory.canary.marks[group][page] = 0
    where = f"positions {first} to {first + 3} of Req\\(two"
    return f"page {page} \\(CACHED, node [0-9]+, rows 1\\) .*{where}"


def _free_a_page_in_use(harness: Harness, one: Req, two: Req, group: int) -> str:
    page = _table(one, group).last_page
    harness.memory.allocators[group].index.drop_row(np.array([page], np.int32))
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


@pytest.mark.parametrize(("kind", "group"), GROUPS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_before_the_next_forward_every_damage_is_named(
    damage: Callable[[Harness, Req, Req, int], str], kind: str, group: int
) -> None:
    harness, one, two = two_running(kind=kind)
    last_page_is_begun(harness, one)
    assert (_table(one, group).first_page > 0) == (KINDS[kind][group] != FULL)
    text = damage(harness, one, two, group)
    with pytest.raises(InvariantError, match=f"canary: group {group}, {text}"):
        harness.turn()


@pytest.mark.parametrize(("kind", "group"), GROUPS)
@pytest.mark.parametrize("damage", KINDS_OF_DAMAGE)
def test_every_switch_makes_it_fire_in_the_group_that_it_names(
    damage: str, kind: str, group: int
) -> None:
    """What `SGLANG_KV_CANARY_PERTURB` does to a server that is otherwise in order."""
    harness = watched("full", kind=kind, perturb=f"{damage}:{group}@4")
    for i in range(3):
        harness.send(f"r{i}", prompt_of(PROMPT, i), max_new=60)
    harness.turn(2)
    with pytest.raises(InvariantError, match=f"^canary: group {group}, page"):
        harness.turn(3)


def test_a_switch_waits_for_a_step_that_it_can_damage() -> None:
    harness = watched(perturb="table:0@1")
    harness.send("short", [1, 2, 3], max_new=2)
    harness.run()  # no two whole pages are read
    harness.send("long", prompt_of(PROMPT), max_new=3)
    with pytest.raises(InvariantError, match="somebody else: positions 0 to 3 of Req"):
        harness.run()


@pytest.mark.parametrize(
    ("text", "full", "complaint"),
    [
        ("mark", True, "kind:group@step"),
        ("mark:0@x", True, "kind:group@step"),
        ("paint:0@1", True, "mark, table, free, byte"),
        ("mark:2@1", True, "has 2 layer groups"),
        ("byte:0@1", False, "--kv-canary full"),
    ],
)
def test_a_switch_that_can_not_work_is_refused(text: str, full: bool, complaint: str) -> None:
    with pytest.raises(ValueError, match=f"SGLANG_KV_CANARY_PERTURB.*{complaint}"):
        Perturbation.parse(text, 2, full=full)


@pytest.mark.parametrize(("kind", "group"), GROUPS)
def test_the_audit_finds_a_cached_prefix_that_nobody_reads(kind: str, group: int) -> None:
    harness, _, _ = two_running(kind=kind)
    canary, cache = harness.memory.canary, harness.memory.cache
    assert canary is not None
    (leaf,) = (n for n in cache.tree.nodes() if n.is_evictable_leaf)  # type: ignore[attr-defined]
    entries = leaf.pages[group].view()
    at = int(np.flatnonzero(entries != NO_PAGE)[0])
    assert (at > 0) == (KINDS[kind][group] != FULL), "a window's edge begins with holes"
    page, first = entries[at], at * PAGE + 2
    canary.marks[group][page, 2] = 7
    harness.turn()  # nobody reads it: forwards go on
    with pytest.raises(
        InvariantError, match=rf"page {page} .*positions {first} to {first} of TreeNode"
    ):
        harness.control("audit")


@pytest.mark.parametrize(("kind", "group"), GROUPS)
def test_full_mode_sees_a_changed_byte_that_marks_can_not(kind: str, group: int) -> None:
    harness, one, _ = two_running("full", kind=kind)
    position = _table(one, group).first_page * PAGE + 5
    layer = harness.memory.spec.groups[group].layers[-1]
    harness.memory.kv_pool.get_value_buffer(layer)[_table(one, group).slot_of(position)] += 1
    with pytest.raises(
        InvariantError, match=rf"has other bytes .*positions {position} to {position} of Req"
    ):
        harness.turn()


@pytest.mark.parametrize("mode", ["chain", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_lost_copy_on_move(mode: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Marks move with the bookkeeping; that the bytes did not is what mode full is for."""
    monkeypatch.setattr("sglang.srt.mem_cache.compaction.copy_pages", lambda *_: None)
    harness = watched(mode, kind=kind)
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
    for name in ("get_root", "find_root"):
        real = getattr(RadixTree, name)
        patch.setattr(RadixTree, name, lambda self, extra_key, real=real: real(self, None))


def _crowded_life(harness: Harness) -> None:
    """Two tenants with one prompt's beginning; gaps, a compaction, the prompt of the other one.

    No audit runs."""
    shared = prompt_of(30, 50)
    for i in range(6):
        harness.send(f"r{i}", [*shared, *prompt_of(10, i)], max_new=30, extra_key=f"{i % 2}")
    harness.turn(9)
    for i in (0, 2, 3):
        harness.abort(f"r{i}")
    harness.turn()
    harness.memory.cache.evict(1000)
    compact(harness.memory, 1 << 30)
    harness.send("again", [*shared, *prompt_of(10, 1), 1], max_new=3, extra_key="0")
    harness.run()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plant", [_table_not_told, _wrong_namespace])
def test_a_planted_bug_is_named_before_the_forward_that_would_read_it(
    plant: Callable[[pytest.MonkeyPatch], None], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _crowded_life(watched(kind=kind))
    plant(monkeypatch)
    with pytest.raises(InvariantError, match=r"^canary: group"):
        _crowded_life(watched(kind=kind))

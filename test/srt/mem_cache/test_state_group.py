"""Groups whose pages are states: how they are cut, which pages a request takes and what stays."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sglang.srt.mem_cache.allocation import KVLease, KVMemory, PageNeed
from sglang.srt.mem_cache.capacity import (
    effective_context_length,
    request_page_bounds,
    request_segments,
)
from sglang.srt.mem_cache.compaction import compact
from sglang.srt.mem_cache.kv_layout import (
    GroupId,
    GroupKind,
    KVCacheSpec,
    KVGroupSpec,
    StateShape,
)
from sglang.srt.mem_cache.reclaim import Reclaim, reclaim_step
from sglang.srt.mem_cache.segment_cuts import (
    make_segment_layouts,
    trim_layouts_to_budget,
)
from sglang.srt.mem_cache.state_group import clip_expected
from sglang.srt.mem_cache.state_pool import LayerState
from srt.mem_cache.fake_backing import FakeBacking
from srt.mem_cache.memory_driver import finish_background

PAGE = 4
SHAPE = StateShape(heads=2, key_dim=3, value_dim=2, conv_tokens=2, channels=5)  # 22 numbers
SPEC = KVCacheSpec(
    (KVGroupSpec((1,)), KVGroupSpec((0, 2), GroupKind.STATE, state=SHAPE)), 1, 2, 1, "float32", PAGE
)
KV_SEGMENT, STATE_BYTES = 12 * PAGE * 4, 2 * 22 * 4


def make(states: int = 12, pages: int = 24, **options: object) -> KVMemory:
    """Segments of four pages of tokens and of four states; room for so many of both."""
    budget = pages // 4 * KV_SEGMENT + states * STATE_BYTES
    return KVMemory.create(
        SPEC,
        FakeBacking(),
        budget_bytes=budget,
        machine_bytes=4 * budget,
        max_requests=8,
        slots_per_segment=4 * PAGE,
        **options,  # type: ignore[arg-type]
    )


def grow(memory: KVMemory, lease: KVLease, count: int) -> bool:
    return memory.alloc_for_extend([PageNeed(lease, count)]) is not None


def opened(memory: KVMemory, tokens: np.ndarray, max_prefix: int) -> KVLease:
    lease = memory.open(tokens, max_prefix=max_prefix)
    assert lease is not None
    return lease


def states_of(lease: KVLease) -> list[int]:
    """The entries of the table of states, 0 where there is a gap."""
    ids: list[int] = lease.tables[1].page_ids.tolist()
    return ids


def test_a_state_of_the_published_models() -> None:
    """Qwen3-Next-80B: 36 layers, 32 matrices of 128 x 128 and 3 inputs of 8,192 channels each."""
    shape = StateShape(32, 128, 128, 3, 8192)
    linear = tuple(n for n in range(48) if n % 4 != 3)
    full = tuple(range(3, 48, 4))
    spec = KVCacheSpec(
        (KVGroupSpec(full), KVGroupSpec(linear, GroupKind.STATE, state=shape)),
        2,
        256,
        256,
        "bfloat16",
        64,
    )
    assert spec.groups[1].state_bytes == 36 * (32 * 128 * 128 + 3 * 8192) * 4 == 79_036_416
    assert spec.bytes_per_token == 12 * 2 * 2 * 256 * 2 == 24_576
    for granule, padded in ((1, 79_036_416), (4096, 79_036_416), (2 << 20, 79_691_776)):
        layouts = make_segment_layouts(
            spec,
            slots_per_segment=None,
            auto_segment_bytes=32 << 20,
            auto_min_slots=8192,
            granule_bytes=granule,
            machine_bytes=1 << 40,
            budget_bytes=1 << 36,
        )
        assert layouts[1].pages_per_segment == 1
        assert layouts[1].segment_bytes == padded
        assert layouts[0].slots_per_segment == 8192
    assert request_page_bounds(spec, 2048) == (None, 3)
    assert request_segments(spec, layouts, 100_000, 2048) == (13, 3)
    clamp = effective_context_length(
        spec,
        layouts,
        budget_bytes=4 * 79_691_776 + 2 * 8192 * 24_576,
        reserve_segments=0,
        requested=10**6,
        prefill_chunk=2048,
    )
    assert clamp.capacity_tokens == 16_384
    assert "3 + 0 in reserve segments of 1 states x 79,036,416 bytes" in clamp.explanation


def test_memory_that_stays_is_divided_as_sglang_does() -> None:
    layouts = make_segment_layouts(
        SPEC,
        slots_per_segment=4 * PAGE,
        auto_segment_bytes=1 << 20,
        auto_min_slots=1,
        granule_bytes=1,
        machine_bytes=1 << 20,
        budget_bytes=1 << 16,
    )
    tokens, states = trim_layouts_to_budget(layouts, 19_000)
    assert states.max_segments - 1 == 9_000 // (4 * STATE_BYTES)
    assert tokens.max_segments - 1 == 10_000 // KV_SEGMENT


def test_a_group_of_states_says_what_they_are() -> None:
    with pytest.raises(ValueError, match="groups of states have a state"):
        KVGroupSpec((0,), GroupKind.STATE)
    with pytest.raises(ValueError, match="groups of states have a state"):
        KVGroupSpec((0,), state=SHAPE)
    with pytest.raises(ValueError, match="window groups have a window"):
        KVGroupSpec((0,), GroupKind.STATE, window=2, state=SHAPE)


def test_prompts_leave_states_at_the_last_border_and_at_their_end() -> None:
    memory = make()
    tokens = np.arange(40, dtype=np.int32)
    lease = opened(memory, tokens, 39)
    assert grow(memory, lease, 18)  # pages 0 to 4
    assert states_of(lease) == [0, 0, 0, 4, 5], "segment 0 has no pages to give"
    assert lease.tables[1].first_page == 0
    memory.audit()
    assert grow(memory, lease, 13)  # from 18 to 31, pages 5, 6 and 7
    assert states_of(lease) == [5, 0, 6, 7], "from the state after token 17, in page 4"
    assert lease.tables[1].first_page == 4
    assert grow(memory, lease, 1)  # token 31, the last of page 7
    assert states_of(lease) == [6, 7], "a step within a page takes none; the gap is gone"
    assert memory.allocators[1].index.num_used == 2
    memory.audit()
    memory.close(lease, None, 0)
    assert memory.allocators[1].index.num_used == 0
    memory.close_pool()


def test_decoding_keeps_the_last_two_borders() -> None:
    memory = make()
    tokens = np.arange(40, dtype=np.int32)
    lease = opened(memory, tokens, 39)
    assert grow(memory, lease, 7)
    kept = []
    for _ in range(9):
        assert memory.alloc_for_decode([PageNeed(lease, 1)]) is not None
        kept.append((lease.num_tokens, lease.tables[1].first_page, states_of(lease)))
        memory.audit()
    assert kept[0] == (8, 0, [4, 5])
    assert kept[1] == (9, 0, [4, 5, 6]), "the prompt's border, until its last chunk is settled"
    assert kept[2] == (10, 1, [5, 6])
    assert kept[5] == (13, 1, [5, 6, 7])
    assert kept[6] == (14, 2, [6, 7])
    memory.close(lease, tokens[:16], 16)
    assert memory.cache.match_len(tokens, None, 40) == 16
    memory.close_pool()


def test_hits_end_where_a_state_is_held() -> None:
    memory = make(states=16)
    tokens = np.arange(60, dtype=np.int32)
    first = opened(memory, tokens, 59)
    assert grow(memory, first, 22)
    memory.cache_prefix(first, tokens[:22], 22, keep_window=True)
    assert grow(memory, first, 18)
    memory.cache_prefix(first, tokens[:40], 40, keep_window=True)
    assert memory.match_len(tokens) == 40
    for asked, usable in ((39, 36), (35, 20), (20, 20), (19, 0)):
        assert memory.cache.match_len(tokens, None, asked) == usable
    memory.close(first, tokens[:40], 40)
    second = opened(memory, tokens, 39)
    assert second.num_tokens == 36
    shared = states_of(second)
    assert len(shared) == 1
    assert memory.allocators[1].index.rows[shared[0]] == 1
    assert grow(memory, second, 2)
    assert states_of(second)[0] == shared[0], "read, while the next page is written"
    assert states_of(second)[1] != shared[0]
    memory.audit()
    memory.close(second, None, 0)
    memory.close_pool()


def test_long_prompts_leave_states_as_far_apart_as_they_are_large() -> None:
    memory = make(states=16)
    assert SPEC.tokens_per_state == -(-STATE_BYTES // 12) == 15
    tokens = np.arange(64, dtype=np.int32)
    lease = opened(memory, tokens, 63)
    for end in range(8, 64, 8):
        assert grow(memory, lease, 8)
        memory.cache_prefix(lease, tokens[:end], end)
    held = [memory.cache.match_len(tokens, None, end) for end in range(0, 57, 8)]
    # Beside the chunk's end its last border, where a repeat of so many tokens would begin.
    assert held == [0, 0, 16, 16, 32, 32, 48, 48]
    assert [memory.cache.match_len(tokens, None, end) for end in (15, 31, 47)] == [12, 28, 44]
    memory.audit()
    memory.close(lease, None, 0)
    memory.close_pool()


def test_snapshots_go_before_pages_of_tokens() -> None:
    """Each prompt leaves a snapshot and takes two states for itself, of eight."""
    memory = make(states=8, pages=40)
    for number in range(9):
        tokens = np.arange(100 * number, 100 * number + 17, dtype=np.int32)
        lease = opened(memory, tokens, 16)
        assert grow(memory, lease, 17)
        memory.close(lease, tokens[:16], 16)
        memory.audit()
    assert memory.allocators[1].num_free + memory.allocators[1].index.num_cached == 8
    assert memory.cache.num_pages == 36, "no token was dropped for a state"
    held = [memory.match_len(np.arange(100 * n, 100 * n + 16, dtype=np.int32)) for n in range(9)]
    assert held[:2] == [0, 0], "the coldest snapshots went"
    assert held[2:] == [16] * 7
    memory.close_pool()


def test_a_lower_budget_takes_states_before_tokens() -> None:
    memory = make(states=16, pages=40)
    for number in range(4):
        tokens = np.arange(100 * number, 100 * number + 17, dtype=np.int32)
        lease = opened(memory, tokens, 16)
        assert grow(memory, lease, 17)
        memory.cache_prefix(lease, tokens, 17, keep_window=True)
        memory.close(lease, tokens, 17)
    assert memory.allocators[1].index.num_cached == 4
    memory.manager.set_budget(4 * KV_SEGMENT)  # the tokens alone
    steps = []
    while (state := reclaim_step(memory).state) is not Reclaim.HOLDS:
        steps.append(state)
        finish_background(memory)
        memory.audit()
        assert len(steps) < 20
    assert (memory.cache.num_pages, memory.allocators[1].index.num_cached) == (16, 0)
    memory.close_pool()


def test_what_stood_idle_for_long_goes_back_to_the_machine() -> None:
    memory = make(prefix_idle_s=20.0, idle_release_s=5.0)
    tokens = np.arange(40, dtype=np.int32)
    lease = opened(memory, tokens, 39)
    assert grow(memory, lease, 33)
    memory.cache_prefix(lease, tokens, 33, keep_window=True)
    memory.close(lease, tokens, 33)
    assert [index.num_cached for index in (one.index for one in memory.allocators)] == [8, 1]
    for now in (1.0, 22.0, 28.0):  # cached, no longer cached, no longer mapped
        memory.on_step_boundary(now)
        finish_background(memory)
        memory.audit()
    assert [one.index.num_cached for one in memory.allocators] == [0, 0]
    assert memory.manager.mapped_bytes == 0
    memory.close_pool()


def test_without_states_left_there_is_no_room() -> None:
    memory = make(states=8, pages=24, enable_prefix_cache=False)
    leases = [opened(memory, np.arange(9, dtype=np.int32), 0) for _ in range(5)]
    assert memory.can_hold((3, 8))
    assert not memory.can_hold((24, 9)), "the tokens' segments count too"
    assert [grow(memory, lease, 9) for lease in leases] == [True] * 4 + [False]
    assert leases[4].num_tokens == 0
    memory.audit()
    memory.close(leases[0], None, 0)
    assert grow(memory, leases[4], 9)
    memory.audit()
    memory.close_pool()


def test_expected_pages_of_states_are_few() -> None:
    memory = make()
    layouts = memory.manager.layouts
    assert clip_expected(layouts, (40, 40), 9) == (40, 2 + 3)
    assert clip_expected(layouts, (1, 1), 1) == (1, 1)
    memory.close_pool()


def test_states_are_read_where_they_were_written_and_move_with_their_page() -> None:
    memory = make()
    pool = memory.kv_pool.states
    assert pool is not None
    lease = opened(memory, np.arange(30, dtype=np.int32), 0)
    others = [opened(memory, np.arange(30, dtype=np.int32), 0) for _ in range(2)]
    for one in (*others, lease):
        assert grow(memory, one, 24)
    pages = torch.tensor([page for page in states_of(lease) if page])
    draw = torch.Generator().manual_seed(3)
    written = {
        layer: LayerState(
            torch.randn(2, 2, 3, 2, generator=draw), torch.randn(2, 2, 5, generator=draw)
        )
        for layer in (0, 2)
    }
    for layer, state in written.items():
        pool.store(layer, pages, state)
    for layer, state in written.items():
        for row, page in enumerate(pages.tolist()):
            there = pool.view(layer, page)
            assert torch.equal(there.matrix[0], state.matrix[row])
            assert torch.equal(there.inputs[0], state.inputs[row])
    memory.close(others[0], None, 0)
    while compact(memory, 1 << 20) is not None:
        memory.audit()
    moved = torch.tensor([page for page in states_of(lease) if page])
    assert min(moved) < min(pages), "into the segment that the other one left"
    for layer, state in written.items():
        read = pool.load(layer, moved)
        assert torch.equal(read.matrix, state.matrix)
        assert torch.equal(read.inputs, state.inputs)
    memory.close_pool()


def test_a_plane_is_one_for_all_layers() -> None:
    memory = make()
    layouts = memory.manager.layouts
    assert [layout.num_layers for layout in layouts] == [1, 1]
    assert layouts[1].segment_bytes == 4 * STATE_BYTES
    assert SPEC.plane_layers(GroupId(1)) == (0,)
    memory.close_pool()

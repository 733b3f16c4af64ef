"""Budget and context clamp: against a slow search, and the numbers in the text."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang.srt.mem_cache.capacity import (
    budget_from_headroom,
    effective_context_length,
    request_segments,
    tokens_kept,
)
from sglang.srt.mem_cache.kv_layout import (
    GroupKind,
    KVCacheSpec,
    KVGroupSpec,
    SegmentLayout,
)
from sglang.srt.mem_cache.segment_cuts import (
    make_segment_layouts,
    tiers_bytes,
)


def layouts_of(spec: KVCacheSpec, slots: int, machine_bytes: int) -> tuple[SegmentLayout, ...]:
    return make_segment_layouts(
        spec,
        slots_per_segment=slots,
        auto_segment_bytes=1,
        auto_min_slots=1,
        granule_bytes=1,
        machine_bytes=machine_bytes,
        budget_bytes=0,
    )


ONE = KVCacheSpec((KVGroupSpec((0, 1)),), 1, 4, 4, "float32", 4)  # 64 bytes a token
TWO = KVCacheSpec(
    (KVGroupSpec((0,)), KVGroupSpec((1, 2), GroupKind.SLIDING, 10)), 1, 4, 4, "float32", 4
)


def test_budget_is_a_share_of_the_headroom() -> None:
    assert budget_from_headroom(1000, 0.7) == 700
    assert budget_from_headroom(-5, 0.7) == 0
    for fraction in (0.0, -1.0, 1.5):
        with pytest.raises(ValueError, match="fraction"):
            budget_from_headroom(1000, fraction)


def test_window_need_is_bounded_and_full_need_is_not() -> None:
    full, window = TWO.groups
    assert tokens_kept(full, 1000, 16, 4) == 1000
    assert [tokens_kept(window, n, 16, 4) for n in (5, 30, 31, 1000)] == [5, 30, 30, 30]


def test_whole_segments_count() -> None:
    layouts = layouts_of(ONE, 16, 1 << 20)  # 1,024 bytes a segment
    for extra in (0, 1023):
        clamp = effective_context_length(
            ONE,
            layouts,
            budget_bytes=10 * 1024 + extra,
            reserve_segments=0,
            requested=10_000_000,
            prefill_chunk=32,
        )
        assert (clamp.effective, clamp.capacity_tokens, clamp.is_clamped) == (160, 160, True)


@pytest.mark.parametrize(
    ("upper", "lower", "tokens"),
    [(2, 3, 80), (2.9, 3, 80), (2.5, 3.5, 80), (2.5, 0, 32), (0.9, 0.9, 0), (0, 4.5, 64)],
)
def test_a_segment_lies_on_one_tier_as_a_whole(upper: float, lower: float, tokens: int) -> None:
    clamp = effective_context_length(
        ONE,
        layouts_of(ONE, 16, 1 << 20),
        budget_bytes=int(upper * 1024),
        lower_bytes=int(lower * 1024),
        reserve_segments=0,
        requested=1000,
        prefill_chunk=32,
    )
    assert clamp.effective == clamp.capacity_tokens == tokens


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    upper=st.integers(0, 60),
    lower=st.integers(0, 60),
    order=st.lists(st.integers(0, 2), max_size=40),
)
def test_tiers_hold_segments_that_come_in_any_order(
    sizes: list[int], upper: int, lower: int, order: list[int]
) -> None:
    """Each goes where there is room, the upper tier first, until the bytes told are reached."""
    layouts = [replace(layouts_of(ONE, 4, 1 << 20)[0], k_bytes_per_slot=n) for n in sizes]
    unit = layouts[0].segment_bytes // (sizes[0] + layouts[0].v_bytes_per_slot)
    room, left = [upper * unit, lower * unit], tiers_bytes(layouts, upper * unit, lower * unit)
    for number in order:
        size = layouts[number % len(layouts)].segment_bytes
        left -= size
        if left < 0:
            return
        tier = 0 if size <= room[0] else 1
        room[tier] -= size
        assert room[tier] >= 0


def test_reserve_is_taken_off() -> None:
    clamp = effective_context_length(
        ONE,
        layouts_of(ONE, 16, 1 << 20),
        budget_bytes=10 * 1024,
        reserve_segments=3,
        requested=100,
        prefill_chunk=32,
    )
    assert (clamp.effective, clamp.capacity_tokens, clamp.is_clamped) == (100, 112, False)


def test_the_slot_space_bounds_too() -> None:
    clamp = effective_context_length(
        ONE,
        layouts_of(ONE, 16, 5 * 1024),
        budget_bytes=1 << 40,
        reserve_segments=0,
        requested=1000,
        prefill_chunk=32,
    )
    assert clamp.effective == 5 * 16


def test_a_budget_below_one_segment_gives_nothing() -> None:
    for reserve in (0, 2):
        clamp = effective_context_length(
            ONE,
            layouts_of(ONE, 16, 1 << 20),
            budget_bytes=1023,
            reserve_segments=reserve,
            requested=1000,
            prefill_chunk=32,
        )
        assert (clamp.effective, clamp.capacity_tokens) == (0, 0)


def test_the_text_states_both_numbers_and_the_arithmetic() -> None:
    clamp = effective_context_length(
        ONE,
        layouts_of(ONE, 16, 1 << 20),
        budget_bytes=10 * 1024,
        reserve_segments=1,
        requested=10_000_000,
        prefill_chunk=32,
    )
    assert clamp.explanation == (
        "requested context of 10,000,000 tokens is clamped to 144 tokens; one request can have "
        "144: 9 + 1 in reserve segments of 16 tokens x 64 bytes = 10,240 bytes of a KV budget of "
        "10,240 bytes (10.0 KiB); a token that every layer keeps takes 64 bytes"
    )


def test_the_text_names_groups_when_there_are_several() -> None:
    clamp = effective_context_length(
        TWO,
        layouts_of(TWO, 8, 1 << 20),
        budget_bytes=1 << 14,
        reserve_segments=0,
        requested=5,
        prefill_chunk=8,
    )
    assert "fits: effective 5 tokens" in clamp.explanation
    assert "(full group 0)" in clamp.explanation
    assert "(sliding group 1)" in clamp.explanation


@given(
    slots=st.sampled_from([4, 12, 20]),
    budget=st.integers(0, 30_000),
    reserve=st.integers(0, 3),
    requested=st.integers(1, 700),
    chunk=st.integers(1, 40),
    two=st.booleans(),
)
def test_equals_a_slow_search(
    slots: int, budget: int, reserve: int, requested: int, chunk: int, two: bool
) -> None:
    spec = TWO if two else ONE
    layouts = layouts_of(spec, slots, 20_000)

    def fits(tokens: int) -> bool:
        need = request_segments(spec, layouts, tokens, chunk)
        held = sum((n + reserve) * one.segment_bytes for n, one in zip(need, layouts, strict=True))
        enough = all(n < one.max_segments for n, one in zip(need, layouts, strict=True))
        return enough and held <= budget

    clamp = effective_context_length(
        spec,
        layouts,
        budget_bytes=budget,
        reserve_segments=reserve,
        requested=requested,
        prefill_chunk=chunk,
    )
    slow = max((n for n in range(1, requested + 1) if fits(n)), default=0)
    assert clamp.effective == slow

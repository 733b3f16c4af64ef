"""How slot spaces are cut into segments: by what granules, machine and budget ask for. Pure.

`make_segment_layouts` cuts a group's space so that every plane's part of a segment is whole
granules; the other functions say what budgets hold of such cuts. Called when a pool is planned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from sglang.srt.mem_cache.kv_layout import (
    MAX_SLOTS,
    STATE_NUMBER_BYTES,
    GroupId,
    GroupKind,
    KVCacheSpec,
    SegmentLayout,
)

STATE_SHARE = Fraction(9, 10)  # as SGLang's --mamba-full-memory-ratio divides by default
_MOST_PADDING = Fraction(1, 8)  # of a state, so that it fills whole granules


def round_slots_per_segment(
    page_size: int, plane_bytes: tuple[int, ...], requested_slots: int, granule_bytes: int
) -> int:
    """Smallest multiple of the page size at which every plane's part is whole granules.

    At least `requested_slots` tokens and at least 1. `plane_bytes` are those of a slot in each
    plane of a layer. With a granule of 1 byte only the page size rounds.
    """
    step = page_size
    for per_slot in plane_bytes:
        step = math.lcm(step, granule_bytes // math.gcd(granule_bytes, per_slot))
    return max(1, -(-requested_slots // step)) * step


def state_bytes_per_slot(spec: KVCacheSpec, group: GroupId, granule_bytes: int) -> int:
    """A slot's share of a state in a layout, rounded up as far as that costs little.

    The rounder a page, the fewer states fill whole granules and make a segment.
    """
    least = spec.bytes_per_slot(group)
    align = granule_bytes
    while align > 1:
        step = math.lcm(align, spec.page_size * STATE_NUMBER_BYTES)
        per_slot = -(-least * spec.page_size // step) * step // spec.page_size
        if per_slot - least <= least * _MOST_PADDING:
            return per_slot
        align //= 2
    return least


def make_segment_layouts(
    spec: KVCacheSpec,
    *,
    slots_per_segment: int | None,
    auto_segment_bytes: int,
    auto_min_slots: int,
    granule_bytes: int,
    machine_bytes: int,
    budget_bytes: int,
    kv_parallel: int = 1,
) -> tuple[SegmentLayout, ...]:
    """Cut every group's slot space, generously: address space is free, slots are permanent.

    `slots_per_segment` None is `auto`: the power of two nearest to `auto_segment_bytes` over all
    planes of a rank, at least `auto_min_slots`. Segments of states are always cut so, or smaller
    where pages of that many tokens are fewer. The space holds what `machine_bytes` (all memory and
    lower tiers of a rank) could ever hold and at least twice `budget_bytes`. Segments of the group
    that keeps all tokens are dealt to `kv_parallel` ranks; the others are whole on each. Raises
    ValueError when even one segment passes 2^31 slots.
    """
    layouts = []
    for group in map(GroupId, range(spec.num_groups)):
        one, own = spec.groups[group], spec.of_group(group)
        per_slot = spec.bytes_per_slot(group)
        ranks = kv_parallel if one.kind is GroupKind.FULL else 1
        planes = (own.k_bytes_per_slot_layer, own.v_bytes_per_slot_layer)
        if one.state is not None:
            per_slot = state_bytes_per_slot(spec, group, granule_bytes)
            planes = (per_slot, 0)
            page_bytes = per_slot * spec.page_size
            states = _states_per_segment(auto_segment_bytes / page_bytes, spec, slots_per_segment)
            wanted = states * spec.page_size
        elif slots_per_segment is None:
            wanted = max(auto_min_slots, nearest_power_of_two(auto_segment_bytes / per_slot))
        else:
            wanted = -(-slots_per_segment // ranks)
        own_slots = round_slots_per_segment(
            spec.page_size, (*planes, spec.index_bytes_per_slot_layer), wanted, granule_bytes
        )
        slots = own_slots * ranks
        limit = MAX_SLOTS // slots
        if limit < 2:
            raise ValueError(f"segments of {slots} tokens leave no room below 2^31 slots")
        held = max(machine_bytes, 2 * budget_bytes) // per_slot
        max_segments = min(limit, 1 + max(1, -(-held // own_slots)))
        layouts.append(
            SegmentLayout(
                group=group,
                page_size=spec.page_size,
                pages_per_segment=slots // spec.page_size,
                kv_parallel=ranks,
                max_segments=max_segments,
                num_layers=len(spec.plane_layers(group)),
                k_bytes_per_slot=planes[0],
                v_bytes_per_slot=planes[1],
                granule_bytes=granule_bytes,
                index_bytes_per_slot=spec.index_bytes_per_slot_layer,
                num_index_layers=spec.num_index_layers(group),
                holds_states=one.state is not None,
            )
        )
    return tuple(layouts)


def _states_per_segment(wanted: float, spec: KVCacheSpec, slots_per_segment: int | None) -> int:
    states = nearest_power_of_two(wanted)
    if slots_per_segment is None:
        return states
    return min(states, max(1, slots_per_segment // spec.page_size))


def trim_layouts_to_budget(
    layouts: tuple[SegmentLayout, ...], budget_bytes: int
) -> tuple[SegmentLayout, ...]:
    """The same cuts with only as many segments as `budget_bytes` holds: for memory that stays.

    A backing that is not elastic can't move memory between groups, so the budget is divided once,
    such that every group holds about as many tokens. States get `STATE_SHARE` times as much as the
    tokens. Raises ValueError when a group gets none.
    """
    state_bytes = 0
    if any(layout.holds_states for layout in layouts):
        state_bytes = int(budget_bytes * STATE_SHARE / (1 + STATE_SHARE))
    tokens = (budget_bytes - state_bytes) / sum(
        Fraction(layout.segment_bytes, layout.slots_per_segment)
        for layout in layouts
        if not layout.holds_states
    )
    trimmed = []
    for layout in layouts:
        segments = int(tokens / layout.slots_per_segment)
        if layout.holds_states:
            segments = state_bytes // layout.segment_bytes
        segments = min(segments, layout.max_segments - 1)
        if segments < 1:
            raise ValueError(
                f"a KV budget of {budget_bytes:,} bytes does not hold one segment of "
                f"{layout.segment_bytes:,} bytes of every layer group"
            )
        trimmed.append(replace(layout, max_segments=1 + segments))
    return tuple(trimmed)


def tiers_bytes(layouts: Sequence[SegmentLayout], upper: int, lower: int) -> int:
    """Bytes of segments that two tiers of `upper` and `lower` bytes hold, however these are filled.

    A segment lies on one tier as a whole: what each has beyond whole ones holds nothing. Of groups
    whose segments differ in size, the upper tier may have no room for the larger ones first.
    """
    if not lower:
        return upper
    sizes = [layout.segment_bytes for layout in layouts]
    unit = math.gcd(*sizes)
    upper, lower = upper - upper % unit, lower - lower % unit
    return max(upper, lower, upper + lower - (max(sizes) - unit))


def nearest_power_of_two(value: float) -> int:
    """Power of two nearest to `value` by difference; at least 1."""
    low = 1 << max(0, math.floor(math.log2(max(value, 1.0))))
    return low if value - low <= 2 * low - value else 2 * low

"""Slot arithmetic: conversions, rounding to granules, the size of the logical space."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang.srt.mem_cache.kv_layout import (
    MAX_SLOTS,
    GroupId,
    GroupKind,
    KVCacheSpec,
    KVGroupSpec,
    KVHeads,
    SegmentLayout,
    num_pages_for,
)
from sglang.srt.mem_cache.segment_cuts import (
    make_segment_layouts,
    nearest_power_of_two,
    round_slots_per_segment,
    trim_layouts_to_budget,
)

MIB = 1 << 20


def make_spec(
    groups: tuple[KVGroupSpec, ...] = (KVGroupSpec((0, 1)),), page_size: int = 64
) -> KVCacheSpec:
    return KVCacheSpec(groups, 3, 64, 32, "bfloat16", page_size)


def make_layouts(spec: KVCacheSpec, **changes: int | None) -> tuple[SegmentLayout, ...]:
    arguments: dict[str, int | None] = {
        "slots_per_segment": 128,
        "auto_segment_bytes": 32 * MIB,
        "auto_min_slots": 1,
        "granule_bytes": 1,
        "machine_bytes": 64 * MIB,
        "budget_bytes": 1 * MIB,
        **changes,
    }
    return make_segment_layouts(spec, **arguments)  # type: ignore[arg-type]


def test_bytes_per_slot_and_token() -> None:
    spec = make_spec((KVGroupSpec((0, 2, 3)), KVGroupSpec((1,), GroupKind.SLIDING, 128)))
    assert spec.k_bytes_per_slot_layer == 3 * 64 * 2
    assert spec.v_bytes_per_slot_layer == 3 * 32 * 2
    assert spec.bytes_per_slot(GroupId(0)) == 3 * 576
    assert spec.bytes_per_slot(GroupId(1)) == 576
    assert spec.bytes_per_token == 4 * 576
    assert spec.group_of_layer() == (0, 1, 0, 0)


@pytest.mark.parametrize(
    "groups",
    [
        (KVGroupSpec((0, 2)),),
        (KVGroupSpec((0, 1)), KVGroupSpec((1,))),
        (KVGroupSpec((1, 2)),),
    ],
)
def test_layers_must_be_covered_exactly_once(groups: tuple[KVGroupSpec, ...]) -> None:
    with pytest.raises(ValueError, match="exactly once"):
        make_spec(groups)


def test_refused_specs() -> None:
    with pytest.raises(ValueError, match="window"):
        KVGroupSpec((0,), GroupKind.SLIDING, None)
    with pytest.raises(ValueError, match="window"):
        KVGroupSpec((0,), GroupKind.FULL, 5)
    with pytest.raises(ValueError, match="at least one layer"):
        KVGroupSpec(())
    with pytest.raises(ValueError, match="dtype"):
        KVCacheSpec((KVGroupSpec((0,)),), 1, 1, 1, "int4", 1)
    with pytest.raises(ValueError, match="positive"):
        KVCacheSpec((KVGroupSpec((0,)),), 1, 1, 1, "float32", 0)


@given(
    heads=st.integers(1, 16),
    head_dim=st.sampled_from([1, 3, 64, 80, 128]),
    page_size=st.sampled_from([1, 16, 64, 48]),
    requested=st.integers(1, 5000),
    granule=st.sampled_from([1, 4096, 16384, 2 * MIB]),
)
def test_rounding_is_the_smallest_multiple_that_fits_every_plane(
    heads: int, head_dim: int, page_size: int, requested: int, granule: int
) -> None:
    spec = KVCacheSpec((KVGroupSpec((0,)),), heads, head_dim, 2 * head_dim, "bfloat16", page_size)

    def legal(slots: int) -> bool:
        return (
            slots % page_size == 0
            and slots * spec.k_bytes_per_slot_layer % granule == 0
            and slots * spec.v_bytes_per_slot_layer % granule == 0
        )

    planes = (spec.k_bytes_per_slot_layer, spec.v_bytes_per_slot_layer)
    slots = round_slots_per_segment(page_size, planes, requested, granule)
    assert slots >= requested
    assert legal(slots)
    step = round_slots_per_segment(page_size, planes, 1, granule)
    assert slots % step == 0
    assert slots - step < requested
    assert not any(
        legal(smaller) for smaller in range(page_size, min(step, 300 * page_size), page_size)
    )


def test_auto_segment_of_smollm2_is_1024_tokens() -> None:
    spec = KVCacheSpec((KVGroupSpec(tuple(range(30))),), 3, 64, 64, "bfloat16", 64)
    (layout,) = make_layouts(spec, slots_per_segment=None, granule_bytes=4096)
    assert spec.bytes_per_token == 23_040
    assert layout.slots_per_segment == 1024
    assert layout.segment_bytes == 1024 * 23_040
    assert layout.fixed_bytes == 60 * 24_576


def test_auto_segment_of_scout_at_tp8_is_8192_tokens_and_2_mib_per_plane() -> None:
    spec = KVCacheSpec((KVGroupSpec(tuple(range(12))),), 1, 128, 128, "bfloat16", 64)
    (layout,) = make_layouts(
        spec, slots_per_segment=None, auto_min_slots=8192, granule_bytes=2 * MIB
    )
    assert layout.slots_per_segment == 8192
    assert layout.slots_per_segment * layout.k_bytes_per_slot == 2 * MIB


def test_conversions() -> None:
    (layout,) = make_layouts(make_spec(page_size=16), slots_per_segment=64)
    assert layout.pages_per_segment == 4
    assert layout.page_of(63) == 3
    assert layout.page_of(64) == 4
    assert layout.segment_of(3) == 0
    assert layout.segment_of(4) == 1
    assert layout.first_page(2) == 8
    assert layout.num_slots == layout.max_segments * 64
    assert layout.reserved_bytes == layout.max_segments * layout.segment_bytes
    assert [num_pages_for(n, 16) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_space_holds_the_machine_and_twice_the_budget() -> None:
    (by_machine,) = make_layouts(make_spec(), machine_bytes=100 * MIB, budget_bytes=10 * MIB)
    usable = (by_machine.max_segments - 1) * by_machine.segment_bytes
    assert 100 * MIB <= usable < 100 * MIB + 2 * by_machine.segment_bytes
    (by_budget,) = make_layouts(make_spec(), machine_bytes=MIB, budget_bytes=80 * MIB)
    assert (by_budget.max_segments - 1) * by_budget.segment_bytes >= 160 * MIB


def test_space_ends_below_2_to_the_31_slots() -> None:
    (layout,) = make_layouts(make_spec(), machine_bytes=1 << 50)
    assert MAX_SLOTS - layout.slots_per_segment < layout.num_slots <= MAX_SLOTS
    with pytest.raises(ValueError, match="2\\^31"):
        make_layouts(make_spec(), slots_per_segment=MAX_SLOTS)


def test_groups_have_their_own_sizes() -> None:
    spec = make_spec(
        (KVGroupSpec(tuple(range(16))), KVGroupSpec((16,), GroupKind.SLIDING, 128)), page_size=1
    )
    full, window = make_layouts(spec, slots_per_segment=None, auto_segment_bytes=MIB)
    assert (full.slots_per_segment, window.slots_per_segment) == (128, 2048)
    assert full.group == 0
    assert window.group == 1


def test_trimming_holds_the_budget_exactly_for_one_group() -> None:
    layouts = make_layouts(make_spec())
    size = layouts[0].segment_bytes
    (trimmed,) = trim_layouts_to_budget(layouts, 5 * size + size - 1)
    assert trimmed.max_segments == 6
    (bounded,) = trim_layouts_to_budget(layouts, 1 << 50)
    assert bounded.max_segments == layouts[0].max_segments
    with pytest.raises(ValueError, match="does not hold one segment"):
        trim_layouts_to_budget(layouts, size - 1)


def test_trimming_divides_between_groups_by_tokens() -> None:
    spec = make_spec((KVGroupSpec((0, 1, 2)), KVGroupSpec((3,), GroupKind.SLIDING, 128)))
    layouts = make_layouts(spec, slots_per_segment=64)
    full, window = trim_layouts_to_budget(layouts, 10 * spec.bytes_per_token * 64)
    assert full.max_segments == window.max_segments == 11


@pytest.mark.parametrize(
    ("value", "power"), [(0.1, 1), (1, 1), (3, 2), (3.1, 4), (1456, 1024), (1540, 2048)]
)
def test_nearest_power_of_two(value: float, power: int) -> None:
    assert nearest_power_of_two(value) == power


def test_a_group_of_other_heads_is_cut_by_its_own_bytes() -> None:
    other = KVGroupSpec((2, 3, 4), heads=KVHeads(2, 16, 16))
    spec = make_spec((KVGroupSpec((0, 1)), other))
    assert spec.of_group(GroupId(0)) is spec
    assert spec.of_group(GroupId(1)).k_bytes_per_slot_layer == 2 * 16 * 2
    assert spec.bytes_per_slot(GroupId(0)) == 2 * 576
    assert spec.bytes_per_slot(GroupId(1)) == 3 * 128
    assert spec.bytes_per_token == 2 * 576 + 3 * 128
    first, second = make_layouts(spec, granule_bytes=4096)
    assert (first.k_bytes_per_slot, first.v_bytes_per_slot) == (384, 192)
    assert (second.k_bytes_per_slot, second.v_bytes_per_slot) == (64, 64)
    assert second.segment_bytes == second.slots_per_segment * 3 * 128
    assert second.slots_per_segment * 64 % 4096 == 0


def test_a_part_is_the_cache_of_one_model() -> None:
    heads = KVHeads(2, 16, 16)
    groups = (
        KVGroupSpec((0, 2)),
        KVGroupSpec((1,), GroupKind.SLIDING, 128),
        KVGroupSpec((3, 4), heads=heads),
    )
    spec = make_spec(groups)
    assert spec.part([GroupId(0), GroupId(1)]) == make_spec(groups[:2])
    own = spec.part([GroupId(2)])
    assert own == KVCacheSpec((KVGroupSpec((0, 1)),), *heads, "bfloat16", 64)
    with pytest.raises(ValueError, match="heads that are alike"):
        spec.part([GroupId(0), GroupId(2)])
    with pytest.raises(ValueError, match="must be positive"):
        make_spec((KVGroupSpec((0,)), KVGroupSpec((1,), heads=KVHeads(1, 0, 1))))

from __future__ import annotations

import pytest
import torch

from sglang.srt.errors import InvariantError
from sglang.srt.mem_cache import memory_pool
from sglang.srt.mem_cache.kv_layout import (
    KVCacheSpec,
    KVGroupSpec,
    KVHeads,
)
from sglang.srt.mem_cache.memory_pool import (
    MHATokenToKVPool,
    ReqToTokenPool,
)
from sglang.srt.mem_cache.segment_backing import make_backing
from sglang.srt.mem_cache.segment_backing.segment_plane import round_to
from sglang.srt.mem_cache.segment_cuts import (
    make_segment_layouts,
)
from sglang.srt.mem_cache.segment_table_pool import (
    make_kv_pool,
)
from srt.mem_cache.fake_backing import FakeBacking
from srt.utils.fake_device import LateRuntime


def make_pool(dtype: str = "float32") -> MHATokenToKVPool:
    spec = KVCacheSpec((KVGroupSpec((0, 2)), KVGroupSpec((1,))), 2, 4, 3, dtype, 2)
    backing = FakeBacking()
    layouts = make_segment_layouts(
        spec,
        slots_per_segment=8,
        auto_segment_bytes=1,
        auto_min_slots=1,
        granule_bytes=1,
        machine_bytes=1 << 13,
        budget_bytes=1,
    )
    backing.reserve(spec, layouts)
    return MHATokenToKVPool(spec, layouts, backing)


def random_kv(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count, 2, 4), torch.randn(count, 2, 3)


@pytest.mark.parametrize(
    "slots",
    [
        [9],
        [8, 9, 10, 11],
        [20, 21, 8, 9, 10, 30],
        [8, 12, 9, 20, 16, 30, 28, 26, 24, 22],  # too many pieces: scattered
        [],
    ],
)
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("native", [True, False])
def test_new_tokens_land_in_their_slots_and_nowhere_else(
    slots: list[int], layer: int, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr(memory_pool, "native_kernels", lambda: None)
    pool = make_pool()
    k, v = random_kv(len(slots))
    pool.set_kv_buffer(layer, torch.tensor(slots, dtype=torch.int64), k, v)
    for buffer, new in ((pool.get_key_buffer(layer), k), (pool.get_value_buffer(layer), v)):
        expected = torch.zeros_like(buffer)
        for slot, row in zip(slots, new, strict=True):
            expected[slot] = row
        assert torch.equal(buffer, expected)
    for other in {0, 1, 2} - {layer}:
        assert not pool.get_key_buffer(other).any()


def test_ranges_are_found_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool()
    found = []
    inner = torch.nonzero

    def counting(mask: torch.Tensor) -> torch.Tensor:
        found.append(mask)
        return inner(mask)

    monkeypatch.setattr(torch, "nonzero", counting)
    loc = torch.tensor([8, 9, 12])
    for layer in range(3):
        pool.set_kv_buffer(layer, loc, *random_kv(3))
    assert len(found) == 1
    pool.set_kv_buffer(0, torch.tensor([10, 11, 13]), *random_kv(3))
    assert len(found) == 2


def test_scattered_slots_outside_the_pool_are_refused() -> None:
    pool = make_pool()
    slots = [8, 12, 9, 20, 16, 30, 28, 26, 24, len(pool.get_key_buffer(0))]
    with pytest.raises(InvariantError, match="outside"):
        pool.set_kv_buffer(0, torch.tensor(slots), *random_kv(len(slots)))


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("slots", [[8, 9, 10], list(range(8, 30, 2))])
def test_values_are_cast_to_the_kv_dtype(dtype: str, slots: list[int]) -> None:
    pool = make_pool(dtype)
    k, v = random_kv(len(slots))
    pool.set_kv_buffer(0, torch.tensor(slots), k, v)
    keys, values = pool.get_kv_buffer(0)
    assert torch.equal(keys[slots].float(), k.to(pool.dtype).float())
    assert torch.equal(values[slots].float(), v.to(pool.dtype).float())


@pytest.mark.parametrize(("dtype", "most"), [("fp8_e4m3", 448.0), ("fp8_e5m2", 57344.0)])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slots", [[8, 9, 10, 11], list(range(8, 30, 2))])
@pytest.mark.parametrize("native", [True, False])
def test_fp8_saturates(
    dtype: str,
    most: float,
    source: torch.dtype,
    slots: list[int],
    native: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not native:
        monkeypatch.setattr(memory_pool, "native_kernels", lambda: None)
    pool = make_pool(dtype)
    k, v = (x.to(source) for x in random_kv(len(slots)))
    k[1, 0] = torch.tensor([6e4, -float("inf"), float("nan"), -0.0], dtype=source)
    pool.set_kv_buffer(0, torch.tensor(slots), k, v)
    found = pool.get_key_buffer(0).float()[slots]
    assert found[1, 0, :2].tolist() == [most, -most]
    assert found[1, 0, 2].isnan()
    assert pool.get_key_buffer(0).view(torch.uint8)[slots[1], 0, 3] == 0x80
    assert torch.equal(found[2:], k[2:].to(pool.dtype).float())
    assert torch.equal(pool.get_value_buffer(0).float()[slots], v.to(pool.dtype).float())


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8_e4m3"])
def test_slots_of_a_range_outside_the_pool_are_refused(dtype: str) -> None:
    """A slice that ends early would take a single row without a word."""
    pool = make_pool(dtype)
    outside = len(pool.get_key_buffer(0))
    for slots in ([8, outside], list(range(outside - 3, outside + 1))):
        with pytest.raises(InvariantError, match="outside"):
            pool.set_kv_buffer(0, torch.tensor(slots), *random_kv(len(slots)))


def test_fp8_halves_what_a_token_takes() -> None:
    sizes = {
        dtype: KVCacheSpec((KVGroupSpec((0, 1)),), 2, 64, 48, dtype, 16).bytes_per_token
        for dtype in ("bfloat16", "fp8_e4m3", "fp8_e5m2")
    }
    assert sizes["bfloat16"] == 2 * 2 * 2 * (64 + 48)
    assert sizes["fp8_e4m3"] == sizes["fp8_e5m2"] == sizes["bfloat16"] // 2


def test_sizes_and_groups() -> None:
    pool = make_pool()
    slots = [layout.num_slots for layout in pool.layouts]
    keys, values = pool.get_kv_size_bytes()
    assert keys == (2 * slots[0] + slots[1]) * 2 * 4 * 4
    assert values == (2 * slots[0] + slots[1]) * 2 * 3 * 4
    assert [pool.group_of_layer(layer) for layer in range(3)] == [0, 1, 0]
    assert repr(pool) == "MHATokenToKVPool(layers=3, dtype=float32)"


def test_rows_are_given_lowest_first_and_made_when_taken() -> None:
    rows = ReqToTokenPool(size=3, num_groups=2, page_size=4)
    assert [rows.alloc_row() for _ in range(4)] == [1, 2, 3, None]
    assert rows.available_size() == 0
    rows.free_row(3)
    rows.free_row(1)
    assert rows.alloc_row() == 1
    assert [table.num_pages for table in rows.tables(1)] == [0, 0]
    assert rows.rows() == [2, 1]
    assert repr(rows) == "ReqToTokenPool(rows=2/3)"
    for action in (rows.free_row, rows.tables):
        with pytest.raises(InvariantError):
            action(3)


def test_a_huge_row_count_costs_nothing() -> None:
    rows = ReqToTokenPool(size=10**9, num_groups=1, page_size=1)
    assert rows.alloc_row() == 1
    assert len(rows._tables) == 1


def test_on_a_device_nobody_looks_at_the_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking would wait for the device; slots were checked before they went there."""

    def looks(_: torch.Tensor) -> None:
        raise AssertionError("the slots were looked at")

    monkeypatch.setattr(memory_pool, "find_pieces", looks)
    for dtype in ("float32", "fp8_e4m3"):
        pool, runtime = make_pool(dtype), LateRuntime()
        pool.serve(runtime)
        k, v = random_kv(3)
        pool.set_kv_buffer(1, torch.tensor([9, 20, 10]), k, v)
        stored = pool.get_key_buffer(1)[torch.tensor([9, 20, 10])]
        assert torch.equal(stored.float(), round_to(k, pool.dtype).float())
        pool.settle()
        assert runtime.num_syncs == 1
        with pytest.raises(InvariantError, match="slots outside"):
            pool.check_slots(1, torch.tensor([1 << 20]))


@pytest.mark.parametrize("backing", ["mmap", "static", "segment_table"])
def test_a_part_is_the_memory_of_one_of_two_models(backing: str) -> None:
    """Layers of other heads lie in groups of their own, and are numbered from 0."""
    second = KVGroupSpec((2, 3), heads=KVHeads(1, 8, 8))
    spec = KVCacheSpec((KVGroupSpec((0, 1)), second), 2, 4, 4, "float32", 2)
    memory = make_backing(backing, device="cpu")
    layouts = make_segment_layouts(
        spec,
        slots_per_segment=8,
        auto_segment_bytes=1,
        auto_min_slots=1,
        granule_bytes=memory.granule_bytes,
        machine_bytes=1 << 16,
        budget_bytes=1,
    )
    memory.reserve(spec, layouts)
    for layout in layouts:
        memory.map(layout.group, [1])  # type: ignore[list-item]
    whole = make_kv_pool(spec, layouts, memory)
    own, other = whole.part([0]), whole.part([1])
    assert whole.part([0, 1]) is whole
    assert [pool.spec.num_layers for pool in (whole, own, other)] == [4, 2, 2]
    assert (other.spec.kv_heads, other.spec.head_dim) == (1, 8)
    assert (other.layouts[0].group, other.layouts[0].k_bytes_per_slot) == (0, 32)
    slot = layouts[1].slots_per_segment
    loc = torch.tensor([slot, slot + 1])
    for pool, heads in ((own, (2, 4)), (other, (1, 8))):
        for layer in range(2):
            k, v = torch.randn(2, 2, *heads).unbind(0)
            pool.set_kv_buffer(layer, loc, k, v)
            number = layer + (2 if pool is other else 0)
            assert whole.group_of_layer(number) == (pool is other)
            for buffers, new in zip(
                (pool.get_kv_buffer(layer), whole.get_kv_buffer(number)), ((k, v),) * 2, strict=True
            ):
                for buffer, rows in zip(buffers, new, strict=True):
                    assert torch.equal(_rows(buffer, slot), rows)
    assert sum(whole.get_kv_size_bytes()) == sum(layout.reserved_bytes for layout in layouts)
    memory.close()


def _rows(buffer: object, slot: int) -> torch.Tensor:
    return buffer.narrow(0, slot, 2).clone()  # type: ignore[attr-defined, no-any-return]

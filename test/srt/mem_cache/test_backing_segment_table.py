"""The portable backing: a tensor per segment and plane, their addresses, pools on top of it."""

from __future__ import annotations

import errno
import gc
import logging
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from sglang.srt.errors import BackingError, InvariantError
from sglang.srt.mem_cache.kv_layout import (
    GroupId,
    GroupKind,
    KVCacheSpec,
    KVGroupSpec,
    SegmentId,
    SegmentLayout,
)
from sglang.srt.mem_cache.memory_pool import (
    MHATokenToKVPool,
)
from sglang.srt.mem_cache.segment_backing import Plane, make_backing
from sglang.srt.mem_cache.segment_backing.base import TableBacking
from sglang.srt.mem_cache.segment_backing.segment_plane import split_by_segment
from sglang.srt.mem_cache.segment_backing.segment_table import SegmentTableBacking
from sglang.srt.mem_cache.segment_backing.static import StaticBacking
from sglang.srt.mem_cache.segment_cuts import (
    make_segment_layouts,
)
from sglang.srt.mem_cache.segment_table_pool import (
    SegmentTableKVPool,
    make_kv_pool,
)
from srt.mem_cache.fake_backing import FakeBacking
from srt.mem_cache.fake_cuda_driver import FakeCudaDriver
from srt.mem_cache.memory_machine import MemoryMachine, machine_settings

G = GroupId(0)
SPEC = KVCacheSpec(
    (KVGroupSpec((0, 2)), KVGroupSpec((1,), GroupKind.SLIDING, 8)), 2, 4, 2, "float32", 4
)
LOTS = 1 << 40


def layouts_of(spec: KVCacheSpec) -> tuple[SegmentLayout, ...]:
    """Segments of 8 slots (two pages); at least six usable ones per group."""
    return make_segment_layouts(
        spec,
        slots_per_segment=8,
        auto_segment_bytes=1,
        auto_min_slots=1,
        granule_bytes=1,
        machine_bytes=6 * 8 * spec.bytes_per_slot(G),
        budget_bytes=0,
    )


def make(spec: KVCacheSpec = SPEC, available_bytes: int = LOTS) -> SegmentTableBacking:
    backing = SegmentTableBacking(available_bytes=lambda: available_bytes, margin_bytes=0)
    backing.reserve(spec, layouts_of(spec))
    return backing


def ids(*segments: int) -> tuple[SegmentId, ...]:
    return tuple(SegmentId(segment) for segment in segments)


def test_only_page_zero_has_memory_at_first() -> None:
    backing = make()
    assert isinstance(backing, TableBacking)
    assert backing.resident_bytes() == sum(layout.fixed_bytes for layout in layouts_of(SPEC))
    for layer in range(3):
        for plane in (Plane.KEY, Plane.VALUE):
            made = backing.plane(layer, plane)
            assert made is backing.plane(layer, plane)
            assert made.narrow(0, 0, 4).count_nonzero() == 0
            assert made.pointers[0] == made.part(0).data_ptr()
            assert not made.pointers[1:].any()
            with pytest.raises(InvariantError, match="segment 1 is read or written"):
                made.narrow(0, 8, 1)
    assert backing.plane(0, Plane.KEY).shape == (layouts_of(SPEC)[0].num_slots, 2, 4)
    assert backing.plane(0, Plane.VALUE).shape[1:] == (2, 2)
    with pytest.raises(InvariantError, match="no contiguous view"):
        backing.view(0, Plane.KEY)
    backing.close()
    assert backing.resident_bytes() is None


@pytest.mark.parametrize("group", [0, 1])
def test_mapped_segments_read_zero_and_unmapped_ones_are_freed(group: int) -> None:
    backing = make()
    layout = layouts_of(SPEC)[group]
    layers = SPEC.groups[group].layers
    fixed = backing.resident_bytes()
    backing.map(GroupId(group), ids(3, 1))
    assert backing.resident_bytes() == fixed + 2 * layout.segment_bytes
    parts = []
    for layer in layers:
        for plane in (Plane.KEY, Plane.VALUE):
            made = backing.plane(layer, plane)
            assert made.part(3).count_nonzero() == 0
            assert made.pointers.nonzero().flatten().tolist() == [0, 1, 3]
            assert made.pointers[3] == made.part(3).data_ptr()
            made.part(3).fill_(5.0)
            assert made.narrow(0, 3 * 8 + 2, 6).eq(5.0).all()
            assert made.part(1).count_nonzero() == 0
            parts.append(weakref.ref(made.part(3)))
            with pytest.raises(InvariantError, match="not within one segment"):
                made.narrow(0, 3 * 8 + 2, 7)
    backing.unmap(GroupId(group), ids(3))
    gc.collect()
    assert all(part() is None for part in parts)
    assert backing.resident_bytes() == fixed + layout.segment_bytes
    assert backing.plane(layers[0], Plane.KEY).pointers.nonzero().flatten().tolist() == [0, 1]
    backing.map(GroupId(group), ids(3))
    assert backing.plane(layers[0], Plane.KEY).part(3).count_nonzero() == 0
    backing.close()


def test_whichever_allocation_fails_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    real = SegmentTableBacking._allocate
    failures = 0
    for failing in range(1, 100):
        backing = make()
        backing.map(G, ids(2))
        before = backing.resident_bytes()
        calls = 0

        def allocate(self: SegmentTableBacking, *args: object) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == failing:  # noqa: B023 - used within the turn
                raise BackingError("no memory")
            return real(self, *args)  # type: ignore[arg-type]

        monkeypatch.setattr(SegmentTableBacking, "_allocate", allocate)
        try:
            backing.map(G, ids(1, 3))
        except BackingError:
            failures += 1
            assert backing.resident_bytes() == before
            backing.map(G, ids(1, 3))
        monkeypatch.setattr(SegmentTableBacking, "_allocate", real)
        backing.close()
        if calls < failing:
            break
    assert failures == 2 * 2 * 2  # layers, planes, segments


def test_whichever_mapping_the_system_refuses_nothing_is_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of `reserve`, which can be tried again, and of a map, beside segments that keep contents."""
    real, calls, failing = mmap.mmap, 0, 0

    def refuse(*args: int) -> mmap.mmap:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return real(*args)

    monkeypatch.setattr("sglang.srt.mem_cache.segment_backing.segment_table.mmap.mmap", refuse)
    backing = SegmentTableBacking(available_bytes=lambda: LOTS)
    for failing in range(1, 3 * 2 + 1):  # layers, planes
        calls = 0
        with pytest.raises(BackingError, match="Cannot allocate memory"):
            backing.reserve(SPEC, layouts_of(SPEC))
        assert calls == failing
        assert backing.resident_bytes() is None
    calls, failing = 0, 7
    backing.reserve(SPEC, layouts_of(SPEC))
    assert calls == 6
    failing = 0
    backing.map(G, ids(2))
    planes = [backing.plane(layer, plane) for layer in (0, 2) for plane in (Plane.KEY, Plane.VALUE)]
    for number, plane in enumerate(planes):
        plane.part(2).fill_(number + 1.0)
    before, pointers = backing.resident_bytes(), [plane.pointers.clone() for plane in planes]
    for failing in range(1, 2 * 2 * 2 + 1):  # layers, planes, segments
        calls = 0
        with pytest.raises(BackingError, match="Cannot allocate memory"):
            backing.map(G, ids(1, 3))
        assert calls == failing
        assert backing.resident_bytes() == before
        for number, (plane, pointer) in enumerate(zip(planes, pointers, strict=True)):
            assert torch.equal(plane.pointers, pointer)
            assert plane.part(2).eq(number + 1.0).all()
    backing.close()


def test_the_machine_is_asked_first_and_what_torch_raises_is_a_refusal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(BackingError, match=r"wanted, .* available"):
        make(available_bytes=10)
    backing = make(available_bytes=layouts_of(SPEC)[0].segment_bytes)
    with pytest.raises(BackingError, match=r"wanted, .* available"):
        backing.map(G, ids(1, 2))
    backing.map(G, ids(1))

    def refuse(*args: object) -> None:
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr("sglang.srt.mem_cache.segment_backing.segment_table.mmap.mmap", refuse)
    with pytest.raises(BackingError, match="can't allocate a KV segment: Cannot allocate"):
        backing.map(G, ids(2))
    backing.close()


def test_wrong_ids_are_a_bug_of_the_caller() -> None:
    backing = make()
    for wrong in (ids(0), ids(1, 1), ids(99)):
        with pytest.raises(InvariantError, match="wrong or repeated"):
            backing.map(G, wrong)
    backing.map(G, ids(1))
    with pytest.raises(InvariantError, match="has memory already"):
        backing.map(G, ids(1))
    with pytest.raises(InvariantError, match="no memory to take away"):
        backing.unmap(G, ids(2))
    with pytest.raises(InvariantError, match="reserved before"):
        backing.reserve(SPEC, layouts_of(SPEC))
    backing.close()
    with pytest.raises(InvariantError, match="was closed"):
        backing.map(G, ids(1))
    with pytest.raises(InvariantError, match="not been reserved"):
        backing.plane(0, Plane.KEY)


def test_slots_are_cut_at_segment_borders() -> None:
    assert split_by_segment(torch.empty(0, dtype=torch.int64), 8) == []
    assert split_by_segment(torch.arange(5, 19), 8) == [
        (0, (0, 3), (5, 3)),
        (1, (3, 8), (0, 8)),
        (2, (11, 3), (0, 3)),
    ]
    (first, second) = split_by_segment(torch.tensor([9, 2, 15, 3]), 8)
    assert first.segment == 0
    assert (first.rows.tolist(), first.local.tolist()) == ([1, 3], [2, 3])  # type: ignore[union-attr]
    assert (second.segment, second.rows.tolist()) == (1, [0, 2])  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8_e4m3"])
def test_a_pool_writes_what_a_contiguous_one_writes(dtype: str) -> None:
    spec = KVCacheSpec(SPEC.groups, 2, 4, 2, dtype, 4)
    layouts = layouts_of(spec)
    backing, contiguous = make(spec), StaticBacking(available_bytes=lambda: LOTS)
    contiguous.reserve(spec, layouts)
    for group in range(2):
        backing.map(GroupId(group), ids(1, 2, 3, 4))
    pools = make_kv_pool(spec, layouts, backing), make_kv_pool(spec, layouts, contiguous)
    assert [type(pool) for pool in pools] == [SegmentTableKVPool, MHATokenToKVPool]
    assert [pool.contiguous for pool in pools] == [False, True]
    assert pools[0].get_kv_size_bytes() == pools[1].get_kv_size_bytes()
    rng = np.random.default_rng(0)
    for loc in (
        torch.arange(10, 37),
        torch.tensor([39]),
        torch.from_numpy(rng.permutation(np.arange(8, 40))),
        torch.tensor([8, 16, 24, 32, 9, 17]),
        torch.arange(0, 4),
        torch.empty(0, dtype=torch.int64),
    ):
        for layer in range(3):
            k = torch.randn(len(loc), 2, 4)
            v = torch.randn(len(loc), 2, 2)
            for pool in pools:
                pool.set_kv_buffer(layer, loc, k, v)
            for table, plain in zip(
                pools[0].get_kv_buffer(layer), pools[1].get_kv_buffer(layer), strict=True
            ):
                got = table[loc].view(torch.uint8)
                want = plain.view(torch.uint8)[loc]  # type: ignore[union-attr]
                assert torch.equal(got, want)
    with pytest.raises(InvariantError, match="is no segment table"):
        SegmentTableKVPool(spec, layouts, contiguous)
    backing.close()


class CountingTable(SegmentTableBacking):
    """The real backing with the knobs of the fake one, for the memory machine."""

    def __init__(self) -> None:
        super().__init__(available_bytes=lambda: LOTS)
        self.mapped: set[tuple[int, int]] = set()
        self.failing_maps: set[int] = set()
        self.failing_unmaps: set[int] = set()
        self.num_maps = self.num_unmaps = 0
        self.gate = threading.Event()  # nothing waits at it here
        self.gate.set()

    def map(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        self.num_maps += 1
        if self.num_maps in self.failing_maps:
            raise BackingError("told to fail")
        super().map(group, segments)
        self.mapped |= {(group, segment) for segment in segments}

    def unmap(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        self.num_unmaps += 1
        if self.num_unmaps in self.failing_unmaps:
            raise BackingError("told to fail")
        super().unmap(group, segments)
        self.mapped -= {(group, segment) for segment in segments}


class TableMachine(MemoryMachine):
    """Random lives with real memory under them: contents are read back through the pieces."""

    num_groups = 2

    def make_backing(self) -> FakeBacking:
        return CountingTable()  # type: ignore[return-value]


TestTableMemory = TableMachine.TestCase
TestTableMemory.settings = machine_settings(15)


def test_auto_falls_back_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if sys.platform == "linux":
        assert make_backing("auto").name == "mmap"
    monkeypatch.setattr(
        "sglang.srt.mem_cache.segment_backing.mmap.unsupported_reason", lambda _: "no luck here"
    )
    with caplog.at_level(logging.WARNING):
        assert make_backing("auto").name == "segment_table"
    assert "KV memory on a segment table, not on mmap: no luck here" in caplog.text
    with pytest.raises(BackingError, match="no luck here; use --kv-backing segment_table"):
        make_backing("mmap")


def test_on_a_gpu_auto_is_virtual_memory_and_else_static(
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen: list[tuple[int, tuple[int, ...]]] = []

    def driver(device: int, streams: tuple[int, ...]) -> FakeCudaDriver:
        seen.append((device, streams))
        return FakeCudaDriver()

    for kind in ("auto", "cuda_vmm"):
        backing = make_backing(
            kind, device="cuda", device_index=3, streams=(4711, 0), make_driver=driver
        )
        assert (backing.name, backing.elastic, seen.pop()) == ("cuda_vmm", True, (3, (4711, 0)))
    table = make_backing("segment_table", device="cuda", device_index=3, available_bytes=lambda: 1)
    assert table._device == torch.device("cuda", 3)

    def none(device: int, streams: tuple[int, ...]) -> FakeCudaDriver:
        raise BackingError("there is no driver")

    with caplog.at_level(logging.WARNING):
        backing = make_backing(
            "auto", device="cuda", make_driver=none, available_bytes=lambda: 1 << 30
        )
    assert (backing.name, backing.elastic) == ("static", False)
    assert "KV memory is static, it can't grow or shrink: there is no driver" in caplog.text
    with pytest.raises(BackingError, match="there is no driver"):
        make_backing("cuda_vmm", device="cuda", make_driver=none)


def test_memory_of_another_device_is_counted_by_its_own_figure() -> None:
    """The device without values stands for one: its tensors take nothing of this machine."""
    spec, layouts = SPEC, layouts_of(SPEC)
    for kind in ("static", "segment_table"):
        backing = make_backing(kind, device="meta", available_bytes=lambda: 1 << 40)
        backing.reserve(spec, layouts)
        if kind == "static":
            assert backing.view(0, Plane.KEY).device.type == "meta"
            assert backing.resident_bytes() == sum(one.reserved_bytes for one in layouts)
        backing.close()
        full = make_backing(kind, device="meta", available_bytes=lambda: 100)
        with pytest.raises(BackingError):
            full.reserve(spec, layouts)


def test_cuda_vmm_without_a_device_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(BackingError, match="needs the package cuda-bindings"):
        make_backing("cuda_vmm")

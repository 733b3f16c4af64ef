"""Slots around 2^31, 2^32 and 2^33 elements of a plane, on reserved memory that costs nothing.

A slot has 192 elements here, so that each border lies inside a slot, and that slot's
page has elements on both sides of it. The same batch over low slots must come out bit for bit.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from _pytest.mark import ParameterSet

from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.attention.cpu_backend import CpuAttnBackend, native_kernels
from sglang.srt.layers.attention.torch_native_backend import (
    TorchNativeAttnBackend,
    TorchNativeTuning,
)
from sglang.srt.layers.attention.torch_native_table import SegmentTableAttnBackend
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.srt.mem_cache.kv_layout import (
    GroupId,
    GroupKind,
    KVCacheSpec,
    KVGroupSpec,
    SegmentLayout,
)
from sglang.srt.mem_cache.memory_pool import (
    MHATokenToKVPool,
)
from sglang.srt.mem_cache.segment_backing import Plane
from sglang.srt.mem_cache.segment_backing.base import SegmentBacking
from sglang.srt.mem_cache.segment_backing.mmap import MmapBacking
from sglang.srt.mem_cache.segment_backing.segment_table import SegmentTableBacking
from sglang.srt.mem_cache.segment_cuts import (
    make_segment_layouts,
)
from sglang.srt.mem_cache.segment_table_pool import (
    make_kv_pool,
)
from sglang.srt.utils.native import triton_kernels
from srt.layers.attention_cases import DTYPES, Case, FakeTable, make_layer, make_spec

linux = pytest.mark.skipif(sys.platform != "linux", reason="the mmap backing needs Linux")
native = pytest.mark.skipif(native_kernels() is None, reason="sgl-kernel is not installed")
has_triton = pytest.mark.skipif(triton_kernels() is None, reason="Triton is not installed")

PAGE = 16
SLOT = 3 * 64  # elements
WINDOW = 40
BORDERS = tuple(
    (1 << bits) // (PAGE * SLOT) for bits in (31, 32, 33)
)  # pages with elements of both
NEAR = (32, 64, 96)  # pages whose neighbours stand in for those of the borders
# Per request: tokens stored and new, first kept position with a window, pages from the border on.
REQUESTS = (
    (76, 1, 32, (-2, -1, 0, 1, 2)),  # decode, one run across the border
    (70, 1, 16, (5, -3, 4, -4, 3)),  # decode, scattered over both sides
    (60, 9, 16, (7, 8, 9, -9, -8)),
    (50, 30, 0, (-5, 10, -6, -7, 6)),
)
ATOL = {"float32": 4e-6, "bfloat16": 2e-2}


def torch_native(spec: KVCacheSpec, layouts: tuple[SegmentLayout, ...]) -> AttentionBackend:
    del layouts
    return TorchNativeAttnBackend(spec)


def gathering(spec: KVCacheSpec, layouts: tuple[SegmentLayout, ...]) -> AttentionBackend:
    del layouts
    tuning = TorchNativeTuning(query_block=8, min_run_bytes=1 << 20, batch_row_bytes=1 << 20)
    return TorchNativeAttnBackend(spec, tuning)


def in_runs(spec: KVCacheSpec, layouts: tuple[SegmentLayout, ...]) -> AttentionBackend:
    del layouts
    return TorchNativeAttnBackend(spec, TorchNativeTuning(min_run_bytes=1, batch_row_bytes=0))


def cpu(spec: KVCacheSpec, layouts: tuple[SegmentLayout, ...]) -> AttentionBackend:
    del layouts
    return CpuAttnBackend(spec)


def triton(spec: KVCacheSpec, layouts: tuple[SegmentLayout, ...]) -> AttentionBackend:
    del layouts
    return TritonAttnBackend(spec)


def table(spec: KVCacheSpec, layouts: tuple[SegmentLayout, ...]) -> AttentionBackend:
    return SegmentTableAttnBackend(spec, tuple(layout.slots_per_segment for layout in layouts))


def two_groups(dtype: str) -> KVCacheSpec:
    groups = (KVGroupSpec((0,)), KVGroupSpec((1,), GroupKind.SLIDING, WINDOW))
    return make_spec(page_size=PAGE, kv_heads=3, head_dim=64, dtype=dtype, groups=groups)


def make_tables(centers: tuple[int, ...], *, window: bool) -> list[FakeTable]:
    tables = []
    for center in centers:
        for _, _, kept, offsets in REQUESTS:
            first = kept if window else 0
            pages = np.array(offsets, np.int32) + center
            tables.append(FakeTable(pages[first // PAGE :], first, PAGE))
    return tables


@contextmanager
def far_pool(
    spec: KVCacheSpec, backing: SegmentBacking
) -> Iterator[tuple[MHATokenToKVPool, tuple[SegmentLayout, ...]]]:
    """A pool that reaches past the last border, with memory for the used segments alone."""
    layouts = make_segment_layouts(
        spec,
        slots_per_segment=256,
        auto_segment_bytes=1,
        auto_min_slots=1,
        granule_bytes=backing.granule_bytes,
        machine_bytes=(BORDERS[-1] + 64) * PAGE * spec.bytes_per_slot(GroupId(0)),
        budget_bytes=0,
    )
    backing.reserve(spec, layouts)
    try:
        for layout in layouts:
            pages = np.concatenate([t.page_ids for t in make_tables(NEAR + BORDERS, window=False)])
            used = sorted({layout.segment_of(int(page)) for page in pages})
            assert used[0] >= 1
            assert sum(segment > layout.segment_of(NEAR[-1]) + 1 for segment in used) >= 3
            backing.map(layout.group, used)
        yield make_kv_pool(spec, layouts, backing), layouts
    finally:
        backing.close()


def stored(pool: MHATokenToKVPool, layer: int, plane: Plane, slot: int) -> bytes:
    """The bytes of one slot, at an address that is worked out here and not by torch."""
    buffer = (pool.get_key_buffer if plane is Plane.KEY else pool.get_value_buffer)(layer)
    assert isinstance(buffer, torch.Tensor)
    size = SLOT * buffer.element_size()
    return ctypes.string_at(buffer.data_ptr() + slot * size, size)


def run(
    spec: KVCacheSpec, backend: AttentionBackend, pool: MHATokenToKVPool, layer: int, far: bool
) -> tuple[Case, torch.Tensor]:
    centers = BORDERS if far else NEAR
    full = make_tables(centers, window=False)
    window = make_tables(centers, window=True)
    case = Case(
        spec,
        [(prefix, extend) for prefix, extend, _, _ in REQUESTS] * len(centers),
        window if layer else full,
        make_layer(spec, layer_id=layer, window=WINDOW if layer else None),
        extra_tables=(tuple(full),) if layer else (),
        make_pool=lambda spec, num_slots: pool,
    )
    return case, case.run(backend)


def test_the_borders_lie_inside_slots() -> None:
    for bits, page in zip((31, 32, 33), BORDERS, strict=True):
        first = page * PAGE * SLOT
        assert first < 1 << bits < first + PAGE * SLOT
        assert (1 << bits) % SLOT


def combinations(
    makers: Sequence[ParameterSet], everyday_triton: Sequence[tuple[str, int]]
) -> list[ParameterSet]:
    """Backend, type and layer, each with each. Triton's interpreter takes its time: slow, except
    that every type and every kind of layer is met every day.
    """
    made = []
    for maker, dtype, layer in itertools.product(makers, ("float32", "bfloat16"), (0, 1)):
        (backend,) = maker.values
        late = backend is triton and (dtype, layer) not in everyday_triton
        marks = [*maker.marks, *([pytest.mark.slow] if late else [])]
        name = f"{getattr(backend, '__name__', '')}-{dtype}-{('full', 'window')[layer]}"
        made.append(pytest.param(backend, dtype, layer, marks=marks, id=name))
    return made


CONTIGUOUS = [pytest.param(one) for one in (torch_native, gathering, in_runs)]
CONTIGUOUS += [pytest.param(cpu, marks=native), pytest.param(triton, marks=has_triton)]


@linux
@pytest.mark.parametrize(
    ("make_backend", "dtype", "layer"),
    combinations(CONTIGUOUS, [("float32", 0), ("bfloat16", 1)]),
)
def test_far_slots_are_as_near_ones(
    make_backend: Callable[[KVCacheSpec, tuple[SegmentLayout, ...]], AttentionBackend],
    dtype: str,
    layer: int,
) -> None:
    spec, backing = two_groups(dtype), MmapBacking()
    with far_pool(spec, backing) as (pool, layouts):
        before = backing.resident_bytes()
        backend = make_backend(spec, layouts)
        _, near = run(spec, backend, pool, layer, far=False)
        case, far = run(spec, backend, pool, layer, far=True)
        assert torch.equal(far, near)
        torch.testing.assert_close(far.double(), case.reference(), rtol=0, atol=ATOL[dtype])
        for number, (prefix, extend) in enumerate(case.lengths):
            first = case.tables[number].first_position
            slots = case.tables[number].slots(first, prefix + extend)
            keys, values = (x[number][first:].view(torch.uint8) for x in (case.keys, case.values))
            for slot, k, v in zip(slots.tolist(), keys, values, strict=True):
                assert stored(pool, layer, Plane.KEY, slot) == k.numpy().tobytes()
                assert stored(pool, layer, Plane.VALUE, slot) == v.numpy().tobytes()
        # A wrapped offset would have committed memory where none is mapped.
        assert backing.resident_bytes() == before


@pytest.mark.parametrize(
    ("make_backend", "dtype", "layer"),
    combinations(
        [pytest.param(table), pytest.param(triton, marks=has_triton)],
        [("bfloat16", 0), ("float32", 1)],
    ),
)
def test_far_slots_of_a_segment_table(
    make_backend: Callable[[KVCacheSpec, tuple[SegmentLayout, ...]], AttentionBackend],
    dtype: str,
    layer: int,
) -> None:
    spec = two_groups(dtype)
    with far_pool(spec, SegmentTableBacking()) as (pool, layouts):
        backend = make_backend(spec, layouts)
        case, far = run(spec, backend, pool, layer, far=True)
        torch.testing.assert_close(far.double(), case.reference(), rtol=0, atol=ATOL[dtype])
        for number, (prefix, extend) in enumerate(case.lengths):
            first = case.tables[number].first_position
            slots = case.tables[number].slots(first, prefix + extend)
            for buffer, new in zip(
                pool.get_kv_buffer(layer), (case.keys, case.values), strict=True
            ):
                assert torch.equal(buffer[slots], new[number][first:].to(DTYPES[dtype]))


@linux
@pytest.mark.parametrize("count", [PAGE, 3 * PAGE], ids=["a page", "three pages"])
@pytest.mark.parametrize("scattered", [False, True])
def test_a_wide_write_across_each_border(count: int, scattered: bool) -> None:
    """Both ways of the pool to write: ranges, and one slot at a time."""
    spec, backing = two_groups("bfloat16"), MmapBacking()
    with far_pool(spec, backing) as (pool, _):
        before = backing.resident_bytes()
        for page in BORDERS:
            middle = page * PAGE + PAGE // 2
            loc = torch.arange(middle - count // 2, middle + count // 2)
            loc = loc.view(2, -1).t().flatten() if scattered else loc
            k, v = (torch.randn(count, 3, 64).bfloat16() for _ in range(2))
            pool.set_kv_buffer(0, loc, k, v)
            for i, slot in enumerate(loc.tolist()):
                for plane, new in ((Plane.KEY, k), (Plane.VALUE, v)):
                    wanted = new[i].view(torch.uint8).numpy().tobytes()
                    assert stored(pool, 0, plane, slot) == wanted
        assert backing.resident_bytes() == before

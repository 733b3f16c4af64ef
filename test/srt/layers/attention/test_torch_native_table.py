"""Attention over a segment table: the same numbers as over contiguous memory, borders included."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.attention.registry import make_attention_backend
from sglang.srt.layers.attention.torch_native_backend import (
    TorchNativeAttnBackend,
    TorchNativeTuning,
)
from sglang.srt.layers.attention.torch_native_plan import (
    PageList,
    PieceLimits,
    PlanKey,
    SlotRun,
    make_layer_plan,
)
from sglang.srt.layers.attention.torch_native_table import SegmentTableAttnBackend
from sglang.srt.mem_cache.kv_layout import (
    KVCacheSpec,
)
from sglang.srt.mem_cache.segment_backing.segment_plane import SegmentPlane, round_to
from sglang.srt.mem_cache.segment_backing.segment_table import SegmentTableBacking
from sglang.srt.mem_cache.segment_cuts import (
    make_segment_layouts,
)
from sglang.srt.mem_cache.segment_table_pool import (
    make_kv_pool,
)
from srt.layers.attention_cases import DTYPES, Case, make_layer, make_spec, make_tables

TINY = TorchNativeTuning(
    query_block=6, min_run_bytes=1024, gather_bytes=2048, piece_work=30_000, dense_bytes=4096
)
NO_GATHER = TorchNativeTuning(query_block=8, min_run_bytes=1, batch_row_bytes=0)


class TablePool:
    """K and V in segments, NaN wherever nothing was stored."""

    def __init__(self, spec: KVCacheSpec, num_slots: int, segment_slots: int) -> None:
        self.planes: dict[tuple[int, str], SegmentPlane] = {}
        segments = -(-num_slots // segment_slots)
        for layer in range(spec.num_layers):
            for name, width in (("k", spec.k_width), ("v", spec.v_width)):
                plane = SegmentPlane(
                    (segments * segment_slots, spec.kv_heads, width),
                    slots_per_segment=segment_slots,
                    page_size=spec.page_size,
                    dtype=DTYPES[spec.dtype],
                    device=torch.device("cpu"),
                )
                for segment in range(segments):
                    shape = (segment_slots, spec.kv_heads, width)
                    if plane.dtype == torch.int8:
                        part = torch.full(shape, -1, dtype=plane.dtype)  # a scale of NaN
                    else:
                        part = torch.full(shape, float("nan"), dtype=plane.dtype)
                    plane.attach(segment, part)
                self.planes[layer, name] = plane

    def get_key_buffer(self, layer: int) -> SegmentPlane:
        return self.planes[layer, "k"]

    def get_value_buffer(self, layer: int) -> SegmentPlane:
        return self.planes[layer, "v"]

    def set_kv_buffer(
        self,
        layer_id: int,
        loc: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
    ) -> None:
        for name, new, scale in (("k", k, k_scale), ("v", v, v_scale)):
            plane = self.planes[layer_id, name]
            plane[loc] = round_to(new, plane.dtype, scale)


def pool_of(segment_slots: int) -> Callable[[KVCacheSpec, int], TablePool]:
    return lambda spec, num_slots: TablePool(spec, num_slots, segment_slots)


def check(
    case: Case, segment_pages: int, tuning: TorchNativeTuning | None = None, atol: float = 2e-6
) -> None:
    segment_slots = segment_pages * case.spec.page_size
    groups = (segment_slots,) * case.spec.num_groups
    case.make_pool = pool_of(segment_slots)
    backend: AttentionBackend = SegmentTableAttnBackend(case.spec, groups, tuning)
    out = case.run(backend)
    torch.testing.assert_close(out.double(), case.reference(), rtol=0, atol=atol)
    if len(case.logits_rows):
        pruned = case.run(backend, pruned=True)
        rows = torch.tensor(case.logits_rows)
        torch.testing.assert_close(pruned.double(), case.reference()[rows], rtol=0, atol=atol)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    page_size = draw(st.sampled_from([1, 4, 16]))
    lengths = draw(
        st.lists(st.tuples(st.integers(0, 90), st.sampled_from([1, 1, 2, 7, 30])), max_size=5)
    )
    spec = make_spec(page_size=page_size, v_head_dim=draw(st.sampled_from([16, 24])))
    chunk = draw(st.sampled_from([None, None, 1, 16, 40]))
    layer = make_layer(
        spec,
        window=draw(st.sampled_from([None, None, 1, 16, 40])) if chunk is None else None,
        chunk=chunk,
        cap=draw(st.sampled_from([0.0, 0.0, 2.0])),
        sinks=draw(st.booleans()),
    )
    total = sum(extend for _, extend in lengths)
    rows = sorted(draw(st.sets(st.integers(0, total - 1), max_size=8))) if total else []
    runs = draw(st.sampled_from([[], [1], [1, 1, 1, 30], [2, 9]]))
    tables = make_tables(lengths, page_size, runs, seed=draw(st.integers(0, 99)))
    return Case(spec, lengths, tables, layer, seed=draw(st.integers(0, 99)), logits_rows=rows)


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.too_slow])
@given(
    case=cases(),
    segment_pages=st.sampled_from([1, 2, 5, 64]),
    tuning=st.sampled_from([None, TINY, NO_GATHER]),
)
def test_equals_dense_attention(
    case: Case, segment_pages: int, tuning: TorchNativeTuning | None
) -> None:
    check(case, segment_pages, tuning)


@pytest.mark.parametrize("segment_pages", [1, 7, 40])
@pytest.mark.parametrize("window", [None, 100])
def test_bfloat16_over_many_segments(segment_pages: int, window: int | None) -> None:
    lengths = [(300, 1), (0, 130), (290, 40), (999, 1)]
    spec = make_spec(page_size=16, dtype="bfloat16")
    tables = make_tables(lengths, 16, [2, 7])
    case = Case(spec, lengths, tables, make_layer(spec, window=window))
    check(case, segment_pages, atol=2e-2)


@pytest.mark.parametrize("min_run", [1, 64])
def test_no_slot_run_crosses_a_border_and_every_key_is_read_once(min_run: int) -> None:
    lengths = [(999, 1), (0, 130), (290, 40)]
    spec = make_spec(page_size=4)
    case = Case(spec, lengths, make_tables(lengths, 4, []), make_layer(spec))
    limits = PieceLimits(
        query_block=16,
        min_run_tokens=min_run,
        gather_tokens=64,
        max_keys=1 << 20,
        pair_budget=1 << 30,
        batch_tokens=0,
        segment_tokens=32,
    )
    plan = make_layer_plan(case.geometry(), PlanKey(0, None, False, limits))
    runs = [single[1:] for single in plan.singles]
    for item in plan.items:
        covered = []
        for piece in item.pieces:
            covered.append((piece.position, piece.position + piece.keys.num_tokens))
            if isinstance(piece.keys, SlotRun):
                runs.append(tuple(piece.keys))
            else:
                assert isinstance(piece.keys, PageList)
        ends = sorted(covered)
        assert ends[0][0] == 0
        assert ends[-1][1] == item.position + item.num_rows
        assert all(a[1] == b[0] for a, b in pairwise(ends))
    assert all(first // 32 == (first + count - 1) // 32 for first, count in runs)
    assert (len(runs) > 30) == (min_run == 1)


def test_the_pool_chooses_the_class() -> None:
    spec = make_spec(page_size=4)
    backing = SegmentTableBacking(available_bytes=lambda: 1 << 40)
    layouts = make_segment_layouts(
        spec,
        slots_per_segment=8,
        auto_segment_bytes=1,
        auto_min_slots=1,
        granule_bytes=1,
        machine_bytes=1 << 16,
        budget_bytes=0,
    )
    backing.reserve(spec, layouts)
    pool = make_kv_pool(spec, layouts, backing)
    assert type(make_attention_backend(TorchNativeAttnBackend, pool)) is SegmentTableAttnBackend

    class Other(TorchNativeAttnBackend.__mro__[1]):  # type: ignore[misc]
        name = "other"

    with pytest.raises(ValueError, match="other needs contiguous KV memory"):
        make_attention_backend(Other, pool)
    backing.close()


def test_gathered_pages_come_in_the_order_asked() -> None:
    spec = make_spec(page_size=2, kv_heads=1, head_dim=1)
    plane = TablePool(spec, 24, 8).get_key_buffer(0)
    slots = torch.arange(24)
    plane[slots] = slots.view(-1, 1, 1).float()
    pages = np.array([11, 0, 3, 4, 5, 1])
    target = torch.empty(6, 2, 1, 1)
    plane.gather_pages(torch.from_numpy(pages), target)
    assert target.flatten().tolist() == [float(2 * p + i) for p in pages for i in (0, 1)]
    assert plane[torch.tensor([23, 0, 8, 9])].flatten().tolist() == [23.0, 0.0, 8.0, 9.0]


@pytest.mark.parametrize("dtype", ["fp8_e4m3", "fp8_e5m2", "int8"])
@pytest.mark.parametrize("run_pages", [[], [1], [1, 3, 40]])
def test_fp8_cache(dtype: str, run_pages: list[int]) -> None:
    lengths = [(300, 1), (0, 130), (290, 40), (33, 1), (31, 1), (29, 1)]
    spec = make_spec(page_size=16, dtype=dtype)
    tables = make_tables(lengths, 16, run_pages)
    for changes in ({}, {"window": 21}, {"cap": 2.0}):
        case = Case(spec, lengths, tables, make_layer(spec, **changes), logits_rows=[0, 131])
        for tuning in (None, TINY, NO_GATHER):
            check(case, 3, tuning)

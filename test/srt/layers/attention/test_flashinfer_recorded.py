"""Recorded decode steps of the FlashInfer backend, and what else a recording asks of wrappers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang.srt.layers.attention import flashinfer_backend
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend
from sglang.srt.layers.attention.flashinfer_table import FlashInferTableBackend
from sglang.srt.layers.attention.flashinfer_wrappers import (
    WORKSPACE_BYTES,
    WRAPPER_BYTES,
)
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.srt.mem_cache.kv_layout import KVCacheSpec
from sglang.srt.mem_cache.segment_backing.segment_plane import raw
from sglang.srt.model_executor.forward_batch_info import BatchGeometry, ForwardBatch
from sglang.srt.utils.device import Replay
from srt.layers.attention.fake_flashinfer import ATOL, FakeWrappers
from srt.layers.attention_cases import Case, FakePool, make_layer, make_spec, make_tables
from srt.utils.fake_device import LateRuntime


class RecordedSteps(AttentionBackend):
    """Records the first step that it attends to and replays it, renewed, for all others."""

    name = "recorded"

    def __init__(self, spec: KVCacheSpec, wrappers: FakeWrappers) -> None:
        super().__init__(spec)
        self.inner = FlashInferAttnBackend(spec, wrappers)
        self.runtime = LateRuntime()
        self.replay: Replay | None = None

    def plan(self, geometry: BatchGeometry) -> BatchGeometry:
        assert self.inner.may_record(geometry)
        return geometry

    def forward(
        self, q: torch.Tensor, layer: Any, forward_batch: ForwardBatch, *, rows_pruned: bool
    ) -> torch.Tensor:
        geometry = forward_batch.attn_plan
        if self.replay is None:
            self.q = q.clone()
            self.step = self.inner.plan_recorded(geometry)
            batch = replace(forward_batch, attn_plan=self.step)

            def work() -> torch.Tensor:
                return self.inner.forward(self.q, layer, batch, rows_pruned=rows_pruned)

            with self.runtime.computing():
                work()
                self.replay, self.out = self.runtime.record(work)
        self.inner.renew(self.step, geometry)
        self.q.copy_(q)
        self.replay()
        forward_batch.progress.tick()
        return self.out.clone()


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_recorded_step_becomes_others(data: st.DataObject) -> None:
    page_size = data.draw(st.sampled_from([4, 16]))
    dtype = data.draw(st.sampled_from(["bfloat16", "float16", "fp8_e4m3"]))
    spec = make_spec(page_size=page_size, dtype=dtype)
    kind = data.draw(st.sampled_from(["full", "window", "chunk"]))
    layer = make_layer(
        spec,
        window=data.draw(st.sampled_from([1, 16, 40])) if kind == "window" else None,
        chunk=page_size * data.draw(st.sampled_from([1, 5])) if kind == "chunk" else None,
        cap=data.draw(st.sampled_from([0.0, 2.0])),
        sinks=data.draw(st.booleans()),
    )
    if dtype == "fp8_e4m3":
        layer.set_kv_scales(data.draw(st.sampled_from([1.0, 0.7])), 1.0)
    size = data.draw(st.integers(1, 4))
    wrappers = FakeWrappers()
    pool = FakePool(spec, 4 * 100 * 2)
    raw(pool.k[0])[:page_size] = 0  # the dump page is always backed
    raw(pool.v[0])[:page_size] = 0
    pruned = data.draw(st.booleans())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flashinfer_backend, "RECORDED_PAGES", 4 * 25)
        backend = RecordedSteps(spec, wrappers)
        for step in range(3):
            prefixes = st.lists(st.integers(0, 90), min_size=size, max_size=size)
            lengths = [(prefix, 1) for prefix in data.draw(prefixes)]
            tables = make_tables(lengths, page_size, [2, 1], seed=step)
            case = Case(
                spec,
                lengths,
                tables,
                layer,
                seed=10 * step,
                logits_rows=range(size),
                q_dtype=torch.bfloat16 if dtype == "fp8_e4m3" else None,
                make_pool=lambda *_: pool,
            )
            out = case.run(backend, pruned=pruned)
            torch.testing.assert_close(
                out.double(), case.reference(), rtol=0, atol=ATOL[spec.dtype]
            )
    (wrapper,) = wrappers.recorded
    assert wrapper.num_plans == 4  # before the recording, and for each step
    assert wrapper.num_runs == 2  # in the warm-up and the recording: Python does not come back
    assert not wrappers.made


def test_what_can_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer_backend, "RECORDED_PAGES", 5)
    spec = make_spec(page_size=4, dtype="float16")
    backend = FlashInferAttnBackend(spec, FakeWrappers())

    def geometry(lengths: list[tuple[int, int]]) -> BatchGeometry:
        return Case(spec, lengths, make_tables(lengths, 4, []), make_layer(spec)).geometry()

    assert backend.may_record(geometry([(7, 1), (11, 1)]))
    assert not backend.may_record(geometry([(7, 1), (12, 1)]))  # a page too many
    assert not backend.may_record(geometry([(5, 2)]))
    assert backend.records_steps
    assert not FlashInferTableBackend.records_steps


def test_recorded_sizes_share_the_room_for_pages() -> None:
    spec = make_spec(page_size=4, dtype="float16")
    wrappers = FakeWrappers()
    backend = FlashInferAttnBackend(spec, wrappers)
    for size in (3, 2):
        lengths = [(9, 1)] * size
        case = Case(spec, lengths, make_tables(lengths, 4, []), make_layer(spec))
        plan = backend.plan_recorded(case.geometry())
        heads = torch.zeros(size, 6, 16, dtype=torch.float16)
        # All rows of a recorded step are wanted, so the last layer needs no plan of its own.
        last = backend._planned(plan, case.layer, True, heads)
        assert backend._planned(plan, case.layer, False, heads) is last
    three, two = wrappers.recorded
    assert three.buffers.pages.data_ptr() == two.buffers.pages.data_ptr()
    assert len(three.buffers.pages) == flashinfer_backend.RECORDED_PAGES + 3
    assert three.buffers.indptr.data_ptr() != two.buffers.indptr.data_ptr()


def test_memory_that_it_takes() -> None:
    whole = FlashInferAttnBackend.device_bytes((1, 2, 4), 2)
    unrecorded = FlashInferAttnBackend.device_bytes((), 2)
    assert unrecorded == WORKSPACE_BYTES + 6 * WRAPPER_BYTES
    tables = 4 * (flashinfer_backend.RECORDED_PAGES + 4)
    assert whole - unrecorded == 2 * (3 * WRAPPER_BYTES + tables)
    assert TritonAttnBackend.device_bytes((1, 2), 2) == 0

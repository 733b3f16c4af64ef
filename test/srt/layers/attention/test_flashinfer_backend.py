"""The FlashInfer backend over wrappers that do in torch what the documentation says of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang.srt.errors import InvariantError
from sglang.srt.layers.attention import registry
from sglang.srt.layers.attention.flashinfer_backend import (
    FlashInferAttnBackend,
    LayerKind,
    make_sequences,
)
from sglang.srt.layers.attention.flashinfer_table import FlashInferTableBackend, split_sequences
from sglang.srt.layers.attention.registry import get_attention_backend
from sglang.srt.layers.attention.torch_device_backend import TorchDeviceAttnBackend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from srt.layers.attention.fake_flashinfer import ATOL, FakeWrappers
from srt.layers.attention.test_torch_native_table import pool_of
from srt.layers.attention_cases import (
    Case,
    FakeTable,
    make_layer,
    make_spec,
    make_tables,
)


def check_on_segments(case: Case, segment_pages: int) -> None:
    """The same case with K and V in segments anywhere."""
    atol = ATOL[case.spec.dtype]
    tokens = segment_pages * case.spec.page_size
    table = replace(case, make_pool=pool_of(tokens))
    backend = FlashInferTableBackend(case.spec, (tokens,), FakeWrappers())
    out = table.run(backend)
    torch.testing.assert_close(out.double(), table.reference(), rtol=0, atol=atol)
    if len(case.logits_rows):
        rows = torch.tensor(case.logits_rows)
        pruned = table.run(backend, pruned=True).double()
        torch.testing.assert_close(pruned, table.reference()[rows], rtol=0, atol=atol)


def check(case: Case) -> None:
    atol = ATOL[case.spec.dtype]
    backend = FlashInferAttnBackend(case.spec, FakeWrappers())
    out = case.run(backend)
    torch.testing.assert_close(out.double(), case.reference(), rtol=0, atol=atol)
    native = case.run(TorchNativeAttnBackend(case.spec))
    torch.testing.assert_close(out, native, rtol=0, atol=2 * atol)
    if len(case.logits_rows):
        rows = torch.tensor(case.logits_rows)
        pruned = case.run(backend, pruned=True).double()
        torch.testing.assert_close(pruned, case.reference()[rows], rtol=0, atol=atol)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    page_size = draw(st.sampled_from([1, 4, 16]))
    lengths = draw(
        st.lists(st.tuples(st.integers(0, 90), st.sampled_from([1, 1, 2, 7, 30])), max_size=5)
    )
    dtype = draw(st.sampled_from(["bfloat16", "float16", "fp8_e4m3"]))
    spec = make_spec(page_size=page_size, dtype=dtype)
    kind = draw(st.sampled_from(["full", "full", "window", "chunk"]))
    layer = make_layer(
        spec,
        group=draw(st.sampled_from([1, 3])),
        window=draw(st.sampled_from([1, 5, 16, 40])) if kind == "window" else None,
        chunk=page_size * draw(st.sampled_from([1, 2, 5])) if kind == "chunk" else None,
        cap=draw(st.sampled_from([0.0, 0.0, 2.0])),
        sinks=draw(st.booleans()),
    )
    if dtype == "fp8_e4m3":
        layer.set_kv_scales(draw(st.sampled_from([1.0, 0.7, 3.3])), 1.0)
    total = sum(extend for _, extend in lengths)
    rows = sorted(draw(st.sets(st.integers(0, total - 1), max_size=8))) if total else []
    run_pages = draw(st.sampled_from([[], [1], [2, 9]]))
    tables = make_tables(lengths, page_size, run_pages, seed=draw(st.integers(0, 99)))
    q_dtype = torch.bfloat16 if dtype == "fp8_e4m3" else None
    return Case(spec, lengths, tables, layer, logits_rows=rows, q_dtype=q_dtype)


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_equals_dense_attention(case: Case) -> None:
    check(case)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases(), segment_pages=st.sampled_from([1, 2, 5, 100]))
def test_segments_equal_dense_attention(case: Case, segment_pages: int) -> None:
    check_on_segments(case, segment_pages)


def test_runs_of_a_segment_table() -> None:
    spec = make_spec(page_size=4)
    lengths = [(20, 3), (6, 1)]
    geometry = Case(spec, lengths, make_tables(lengths, 4, []), make_layer(spec)).geometry()
    found = make_sequences(geometry, kind_of())  # pages 1 to 6, and 7 and 8
    runs = split_sequences(found, 4, 4, gathered=False)
    assert [run.segment for run in runs] == [0, 1, None]
    assert [run.rows.tolist() for run in runs] == [[0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert runs[0].parts.pages.tolist() == [1, 2, 3]
    assert runs[1].parts.pages.tolist() == [0, 1, 3]  # pages 4 and 5 of one, 7 of the other
    assert runs[1].parts.last.tolist() == [4, 4]
    assert runs[2].parts.pages.tolist() == [6, 8]
    assert runs[2].parts.last.tolist() == [3, 3]
    (all_gathered,) = split_sequences(found, 4, 4, gathered=True)
    assert all_gathered.segment is None


def test_a_table_whose_head_was_dropped() -> None:
    spec = make_spec(page_size=4, dtype="float16")
    table = FakeTable(np.array([5, 2, 9], np.int32), 16, 4)
    for lengths in ([(26, 1)], [(23, 5)]):
        check(Case(spec, lengths, [table], make_layer(spec, window=6)))


def test_a_step_plans_once_for_all_layers_of_a_kind() -> None:
    spec = make_spec(page_size=4, dtype="float16")
    wrappers = FakeWrappers()
    backend = FlashInferAttnBackend(spec, wrappers)
    decodes = Case(spec, [(9, 1), (30, 1)], make_tables([(9, 1), (30, 1)], 4, []), make_layer(spec))
    geometry = decodes.geometry()
    plan = backend.plan(geometry)
    heads = torch.zeros(2, 6, 16, dtype=torch.float16)
    layer = decodes.layer
    first = backend._planned(plan, layer, False, heads)
    assert backend._planned(plan, layer, False, heads) is first
    assert [one.single for one in wrappers.made] == [True]
    assert wrappers.made[0].num_plans == 1
    assert backend._planned(backend.plan(geometry), layer, False, heads) is first
    assert wrappers.made[0].num_plans == 2


def test_layers_of_any_scale_share_a_plan() -> None:
    spec = make_spec(page_size=4, dtype="fp8_e4m3", head_dim=16)
    wrappers = FakeWrappers()
    backend = FlashInferAttnBackend(spec, wrappers)
    lengths = [(9, 1), (30, 1)]
    case = Case(spec, lengths, make_tables(lengths, 4, []), make_layer(spec))
    plan = backend.plan(case.geometry())
    heads = torch.zeros(2, 6, 16, dtype=torch.bfloat16)
    for number in range(200):
        layer = make_layer(spec)
        layer.scaling = 1 / 11.3  # no power of two, so that products round
        layer.set_kv_scales(0.013 * (number + 1), 1.0)
        backend._planned(plan, layer, False, heads)
    assert len(wrappers.made) == 1
    assert wrappers.made[0].num_plans == 1


def kind_of(**changes: Any) -> LayerKind:
    return LayerKind(0, None, None, False, 6, 0.0, 1.0)._replace(**changes)


def test_sequences_of_a_window_begin_where_it_does() -> None:
    spec = make_spec(page_size=4)
    case = Case(spec, [(20, 3)], make_tables([(20, 3)], 4, []), make_layer(spec))
    found = make_sequences(case.geometry(), kind_of(window=6))
    assert found.rows.tolist() == [0, 3]
    assert found.pages.tolist() == [4, 5, 6]  # positions 12 to 23: 15 is the first that is seen
    assert found.last.tolist() == [3]
    chunked = make_sequences(case.geometry(), kind_of(chunk=8))
    assert chunked.pages.tolist() == [5, 6]
    two = make_sequences(
        Case(spec, [(6, 5)], make_tables([(6, 5)], 4, []), make_layer(spec)).geometry(),
        kind_of(chunk=8),
    )
    assert two.rows.tolist() == [0, 2, 5]
    assert [two.pages.tolist(), two.indptr.tolist(), two.last.tolist()] == [
        [1, 2, 3],
        [0, 2, 3],
        [4, 3],
    ]


def test_what_it_does_not_serve_is_refused() -> None:
    with pytest.raises(ValueError, match="16 bits"):
        FlashInferAttnBackend(make_spec(), FakeWrappers())
    with pytest.raises(ValueError, match="one width"):
        FlashInferAttnBackend(make_spec(dtype="float16", v_head_dim=8), FakeWrappers())
    spec = make_spec(page_size=4, dtype="float16")
    case = Case(spec, [(6, 5)], make_tables([(6, 5)], 4, []), make_layer(spec))
    with pytest.raises(ValueError, match="no whole pages"):
        make_sequences(case.geometry(), kind_of(chunk=6))
    short = Case(spec, [(9, 1)], make_tables([(3, 1)], 4, []), make_layer(spec))
    with pytest.raises(InvariantError, match="does not reach"):
        make_sequences(short.geometry(), kind_of())


def test_backends_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "triton_kernels", lambda: object())
    monkeypatch.setattr(registry, "has_flashinfer", lambda: True)
    assert get_attention_backend(None, "cuda") is TritonAttnBackend
    assert get_attention_backend("flashinfer", "cuda") is FlashInferAttnBackend
    assert get_attention_backend("torch_native", "cuda") is TorchDeviceAttnBackend
    monkeypatch.setattr(registry, "triton_kernels", lambda: None)
    monkeypatch.setattr(registry, "has_flashinfer", lambda: False)
    assert get_attention_backend("auto", "cuda") is TorchDeviceAttnBackend
    with pytest.raises(ValueError, match="pip install flashinfer-python"):
        get_attention_backend("flashinfer", "cuda")
    with pytest.raises(ValueError, match="'cpu' is not available on cuda; use torch_native"):
        get_attention_backend("cpu", "cuda")

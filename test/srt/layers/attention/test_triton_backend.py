"""The Triton backend in Triton's interpreter, against float64 and torch_native.

Checks of the kernels themselves stand in test/kernels/test_triton_attention.py.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang.srt.errors import InvariantError
from sglang.srt.layers.attention.registry import get_attention_backend, make_attention_backend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend, check_triton, query_runs
from sglang.srt.layers.attention.triton_tables import DeviceTables
from sglang.srt.mem_cache.kv_layout import GroupKind, KVGroupSpec
from sglang.srt.model_executor.forward_batch_info import BatchGeometry
from sglang.srt.utils.native import triton_kernels
from srt.crossed import crossed
from srt.layers.attention.test_torch_native_table import pool_of
from srt.layers.attention_cases import Case, FakeTable, make_layer, make_spec, make_tables
from srt.layers.drawn_layers import draw_layer

pytestmark = pytest.mark.skipif(triton_kernels() is None, reason="Triton is not installed")

ATOL = {"float32": 4e-6, "bfloat16": 2e-2, "float16": 3e-3, "fp8_e4m3": 4e-6, "fp8_e5m2": 4e-6}


def check(case: Case, backend: TritonAttnBackend | None = None) -> None:
    atol = ATOL[case.spec.dtype]
    backend = backend or TritonAttnBackend(case.spec)
    out = case.run(backend)
    expected = case.reference()
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=atol)
    if len(case.logits_rows):
        rows = torch.tensor(case.logits_rows)
        pruned = case.run(backend, pruned=True).double()
        torch.testing.assert_close(pruned, expected[rows], rtol=0, atol=atol)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    page_size = draw(st.sampled_from([1, 4, 16, 64]))
    lengths = draw(
        st.lists(st.tuples(st.integers(0, 90), st.sampled_from([1, 1, 2, 20])), max_size=3)
    )
    runs = draw(st.sampled_from([[], [1], [2, 9]]))
    spec = make_spec(
        page_size=page_size,
        v_head_dim=draw(st.sampled_from([16, 24])),
        dtype=draw(st.sampled_from(sorted(ATOL))),
    )
    layer = draw_layer(draw, spec, [None, 1, 5, 16, 40])
    total = sum(extend for _, extend in lengths)
    rows = sorted(draw(st.sets(st.integers(0, total - 1), max_size=6))) if total else []
    tables = make_tables(lengths, page_size, runs, seed=draw(st.integers(0, 99)))
    case = Case(spec, lengths, tables, layer, seed=draw(st.integers(0, 99)), logits_rows=rows)
    segment_pages = draw(st.sampled_from([None, 1, 5]))
    if segment_pages is not None:
        case.make_pool = pool_of(segment_pages * page_size)
    return case


@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_equals_dense_attention(case: Case) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_equals_dense_attention_at_length(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equals_torch_native(dtype: str) -> None:
    lengths = [(300, 1), (0, 40), (290, 9), (7, 1)]
    spec = make_spec(page_size=64, dtype=dtype)
    case = Case(spec, lengths, make_tables(lengths, 64, [1]), make_layer(spec))
    expected = case.run(TorchNativeAttnBackend(spec))
    found = case.run(TritonAttnBackend(spec))
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=2 * ATOL[dtype])


def test_a_window_group_whose_head_was_dropped() -> None:
    groups = (KVGroupSpec(layers=(0,)), KVGroupSpec((1,), GroupKind.SLIDING, 40))
    spec = make_spec(page_size=16, head_dim=32, groups=groups)
    full = FakeTable(np.arange(1, 10, dtype=np.int32), 0, 16)
    table = FakeTable(np.array([5, 2, 9, 3, 7], np.int32), 64, 16)
    layer = make_layer(spec, window=40, layer_id=1)
    check(Case(spec, [(120, 9)], [table], layer, extra_tables=((full,),), logits_rows=[0, 8]))


def test_parts_are_bounded_whatever_the_step() -> None:
    """Waves: the same rows in several launches, each with its own merge."""
    kernels = triton_kernels()
    assert kernels is not None
    spec = make_spec(page_size=4)
    lengths = [(120, 11), (90, 1)]
    case = Case(spec, lengths, make_tables(lengths, 4, [3]), make_layer(spec), logits_rows=[10, 11])
    row_bytes = 4 * 6 * (16 + 1)
    chip = kernels.Chip(1 << 20, 16)
    backend = TritonAttnBackend(spec, chip=chip, part_bytes=40 * row_bytes)
    check(case, backend)
    plan = backend.plan(case.geometry())
    layer = case.layer
    works = backend._works(plan, layer, False, case.queries, torch.float32)
    assert len(works) > 2
    assert max(work.num_parts for work in works) <= 40


def test_a_table_that_is_too_short_is_noticed() -> None:
    spec = make_spec(page_size=4)
    case = Case(spec, [(9, 1)], make_tables([(9, 1)], 4, []), make_layer(spec))
    backend = TritonAttnBackend(spec)
    case.run(backend)
    short = FakeTable(case.tables[0].page_ids[:2], 0, 4)
    plan = backend.plan(Case(spec, [(9, 1)], [short], case.layer).geometry())
    with pytest.raises(InvariantError, match="last token"):
        backend._device_tables(plan, 0, torch.device("cpu"))


@pytest.mark.parametrize(("window", "segment_pages"), crossed([None, 30], [3, None]))
def test_a_recorded_step_becomes_any_other(window: int | None, segment_pages: int | None) -> None:
    """The same launches on the same tensors, renewed in place: what a graph replays."""
    kernels = triton_kernels()
    assert kernels is not None
    spec = make_spec(page_size=4)
    layer = make_layer(spec, window=window)
    backend = TritonAttnBackend(spec, chip=kernels.Chip(16, 16))
    renewing = [[(0, 1)] * 4, [(90, 1), (3, 1), (40, 1), (0, 1)], [(7, 1)] * 4, [(200, 1)] * 4]
    plan, addresses = None, None
    for number, lengths in enumerate(renewing):
        tables = make_tables(lengths, 4, [1], seed=number)
        case = Case(spec, lengths, tables, layer, seed=number, logits_rows=range(4))
        if segment_pages is not None:
            case.make_pool = pool_of(segment_pages * 4)
        geometry = case.geometry()
        if plan is None:
            plan = backend.plan_recorded(geometry)
        else:
            assert backend.may_record(geometry)
            backend.renew(plan, geometry)
        recorded = plan
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backend, "plan", lambda geometry, recorded=recorded: recorded)
            for pruned in (False, True):
                found = case.run(backend, pruned=pruned)
                torch.testing.assert_close(found.double(), case.reference(), rtol=0, atol=4e-6)
        made = [
            *(t.data_ptr() for x in plan.tables.values() for t in (x.pages, x.starts, x.origins)),
            *(work.buffer.data_ptr() for (work,) in plan.works.values()),
            *(len(work.launches[0][1]) for (work,) in plan.works.values()),
        ]
        addresses = addresses or made
        assert made == addresses


def test_what_can_not_be_recorded() -> None:
    kernels = triton_kernels()
    assert kernels is not None
    spec = make_spec(page_size=64)

    def geometry(lengths: list[tuple[int, int]]) -> BatchGeometry:
        return Case(spec, lengths, make_tables(lengths, 64, []), make_layer(spec)).geometry()

    backend = TritonAttnBackend(spec, chip=kernels.Chip(2, 16, rounds=1))
    assert backend.may_record(geometry([((1 << 18) - 1, 1)]))
    assert not backend.may_record(geometry([(1 << 18, 1)]))  # another part than its share
    assert not backend.may_record(geometry([(5, 1), (5, 2)]))
    backend._tables[0] = DeviceTables(torch.device("cpu"), capacity=200)
    assert backend.may_record(geometry([(5, 1)] * 3))
    assert not backend.may_record(geometry([(5, 1)] * 4))  # tables might have to move


def test_once_tables_moved_nothing_recorded_is_used() -> None:
    """A prompt that is computed call by call may outgrow them; what was recorded reads the old."""
    kernels = triton_kernels()
    assert kernels is not None
    spec = make_spec(page_size=4)
    layer = make_layer(spec)
    backend = TritonAttnBackend(spec, chip=kernels.Chip(16, 16))
    backend._tables[0] = DeviceTables(torch.device("cpu"), capacity=512)

    def case_of(lengths: list[tuple[int, int]]) -> Case:
        return Case(spec, lengths, make_tables(lengths, 4, []), layer)

    step = case_of([(9, 1)] * 2)
    plan = backend.plan_recorded(step.geometry())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "plan", lambda geometry: plan)
        step.run(backend)
    assert backend.may_record(step.geometry())
    backend.renew(plan, step.geometry())
    check(case_of([(980, 20)]), backend)
    assert backend._tables[0].moves == 1
    assert not backend.may_record(step.geometry())
    check(step, backend)


def test_an_empty_batch() -> None:
    spec = make_spec(page_size=16)
    case = Case(spec, [], [], make_layer(spec))
    assert case.run(TritonAttnBackend(spec)).shape == (0, 6, 16)
    lengths = [(20, 4)]
    case = Case(spec, lengths, make_tables(lengths, 16, []), make_layer(spec))
    assert case.run(TritonAttnBackend(spec), pruned=True).shape == (0, 6, 16)


def test_rows_side_by_side_are_one_run() -> None:
    spec = make_spec(page_size=4)
    lengths = [(5, 3), (0, 4), (9, 0), (7, 1)]
    case = Case(
        spec, lengths, make_tables(lengths, 4, []), make_layer(spec), logits_rows=[1, 2, 3, 6, 7]
    )
    runs = [array.tolist() for array in query_runs(case.geometry(), pruned=True)]
    assert runs == [[0, 2, 3, 4], [2, 1, 1, 1], [6, 0, 3, 7], [0, 1, 1, 3]]
    runs = [array.tolist() for array in query_runs(case.geometry(), pruned=False)]
    assert runs == [[0, 3, 7], [3, 4, 1], [5, 0, 7], [0, 1, 3]]


def test_it_is_taken_only_by_name() -> None:
    assert get_attention_backend("triton", "cpu") is TritonAttnBackend
    assert get_attention_backend("auto", "cpu") is not TritonAttnBackend

    class Pool:
        contiguous = False
        spec = make_spec(page_size=16)
        layouts = ()

    made = make_attention_backend(TritonAttnBackend, Pool())  # type: ignore[arg-type]
    assert type(made) is TritonAttnBackend


def test_a_cpu_without_the_interpreter_is_refused() -> None:
    code = (
        "from sglang.srt.layers.attention.registry import get_attention_backend as get\n"
        "try: get('triton', 'cpu')\n"
        "except ValueError as error: print(error)"
    )
    environ = {**os.environ, "TRITON_INTERPRET": "0"}
    said = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True
    ).stdout
    assert "TRITON_INTERPRET=1" in said


def test_without_the_package_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang.srt.layers.attention.triton_backend.triton_kernels", lambda: None)
    with pytest.raises(ValueError, match="triton"):
        check_triton("cuda")
    with pytest.raises(ValueError, match="triton"):
        TritonAttnBackend(make_spec())

"""The native backend against float64 and torch_native, over the cases of the reference backend."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang.srt.layers.attention.cpu_backend import CpuAttnBackend
from sglang.srt.layers.attention.registry import get_attention_backend, make_attention_backend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.attention.torch_native_table import SegmentTableAttnBackend
from sglang.srt.mem_cache.kv_layout import GroupKind, KVGroupSpec
from sglang.srt.utils.native import native_kernels
from srt.layers.attention_cases import Case, FakeTable, make_layer, make_spec, make_tables
from srt.layers.drawn_layers import draw_layer

pytestmark = pytest.mark.skipif(native_kernels() is None, reason="sgl-kernel is not installed")

ATOL = {"float32": 4e-6, "bfloat16": 2e-2, "float16": 3e-3}


def check(case: Case, *, pairs_per_call: int = 1 << 31) -> None:
    atol = ATOL[case.spec.dtype]
    backend = CpuAttnBackend(case.spec, pairs_per_call=pairs_per_call)
    out = case.run(backend)
    torch.testing.assert_close(out.double(), case.reference(), rtol=0, atol=atol)
    torch.testing.assert_close(
        out, case.run(TorchNativeAttnBackend(case.spec)), rtol=0, atol=2 * atol
    )
    if len(case.logits_rows):
        rows = torch.tensor(case.logits_rows)
        pruned = case.run(backend, pruned=True).double()
        torch.testing.assert_close(pruned, case.reference()[rows], rtol=0, atol=atol)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    page_size = draw(st.sampled_from([1, 4, 16, 64]))
    lengths = draw(
        st.lists(st.tuples(st.integers(0, 150), st.sampled_from([1, 1, 2, 30, 70])), max_size=5)
    )
    run_pages = draw(st.sampled_from([[], [1], [1, 1, 1, 30], [2, 9]]))
    dtype = draw(st.sampled_from(["float32", "bfloat16", "bfloat16", "float16"]))
    spec = make_spec(page_size=page_size, head_dim=draw(st.sampled_from([16, 32])), dtype=dtype)
    layer = draw_layer(draw, spec, [None, 1, 5, 16, 40, 100])
    total = sum(extend for _, extend in lengths)
    rows = sorted(draw(st.sets(st.integers(0, total - 1), max_size=8))) if total else []
    tables = make_tables(lengths, page_size, run_pages, seed=draw(st.integers(0, 99)))
    return Case(spec, lengths, tables, layer, seed=draw(st.integers(0, 99)), logits_rows=rows)


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases(), pairs=st.sampled_from([1 << 31, 1, 3000]))
def test_equals_dense_attention(case: Case, pairs: int) -> None:
    check(case, pairs_per_call=pairs)


def test_wide_heads_in_bf16() -> None:
    for dim in (64, 80, 128):
        spec = make_spec(page_size=64, head_dim=dim, dtype="bfloat16")
        lengths = [(300, 1), (0, 130), (64, 64), (999, 1)]
        tables = make_tables(lengths, 64, [1, 3])
        check(Case(spec, lengths, tables, make_layer(spec, group=4), logits_rows=[0, 130, 194]))


def test_what_the_kernels_do_not_serve_is_left_to_torch() -> None:
    spec = make_spec(page_size=4, v_head_dim=24)
    lengths = [(30, 1), (0, 9)]
    check(Case(spec, lengths, make_tables(lengths, 4, [1]), make_layer(spec), logits_rows=[0, 9]))


@pytest.mark.parametrize("native", [False, True])
def test_prompts_are_left_to_torch_without_a_kernel_for_them(
    monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    calls = []
    torch_forward = TorchNativeAttnBackend.forward

    def forward(*args: object, **named: object) -> torch.Tensor:
        calls.append(args)
        return torch_forward(*args, **named)

    monkeypatch.setattr(native_kernels(), "has_prompt_kernel", lambda: native)
    monkeypatch.setattr(TorchNativeAttnBackend, "forward", forward)
    spec = make_spec(page_size=16, head_dim=32, dtype="bfloat16")
    for lengths, of_torch in (([(30, 1), (0, 9)], not native), ([(30, 1), (7, 1)], False)):
        case = Case(spec, lengths, make_tables(lengths, 16, []), make_layer(spec))
        calls.clear()
        out = case.run(CpuAttnBackend(spec))
        assert bool(calls) == of_torch
        torch.testing.assert_close(out.double(), case.reference(), rtol=0, atol=2e-2)


def test_a_window_group_whose_head_was_dropped() -> None:
    groups = (KVGroupSpec(layers=(0,)), KVGroupSpec((1,), GroupKind.SLIDING, 40))
    spec = make_spec(page_size=16, head_dim=32, groups=groups)
    full = FakeTable(np.arange(1, 10, dtype=np.int32), 0, 16)
    table = FakeTable(np.array([5, 2, 9, 3, 7], np.int32), 64, 16)
    layer = make_layer(spec, window=40, layer_id=1)
    check(Case(spec, [(120, 9)], [table], layer, extra_tables=((full,),), logits_rows=[0, 8]))


def test_queries_of_another_type_than_the_cache() -> None:
    spec = make_spec(page_size=16, head_dim=32, dtype="bfloat16")
    lengths = [(30, 1), (100, 1)]
    case = Case(spec, lengths, make_tables(lengths, 16, []), make_layer(spec))
    case.q_dtype = torch.float32
    out = case.run(CpuAttnBackend(spec))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), case.reference(), rtol=0, atol=3e-2)


@pytest.mark.parametrize("dtype", ["fp8_e4m3", "fp8_e5m2", "int8"])
@pytest.mark.parametrize(
    ("q_dtype", "atol"), [(torch.float32, 4e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)]
)
def test_fp8_cache(dtype: str, q_dtype: torch.dtype, atol: float) -> None:
    """Computed in the type of the queries."""
    lengths = [(300, 1), (0, 130), (64, 64), (999, 1)]
    for dim in (32, 48, 80, 128):
        spec = make_spec(page_size=64, head_dim=dim, dtype=dtype)
        tables = make_tables(lengths, 64, [1, 3])
        for window in (None, 100):
            case = Case(
                spec, lengths, tables, make_layer(spec, window=window), logits_rows=[0, 130]
            )
            case.q_dtype = q_dtype
            backend = CpuAttnBackend(spec)
            assert backend._serves
            out = case.run(backend)
            assert out.dtype == q_dtype
            torch.testing.assert_close(out.double(), case.reference(), rtol=0, atol=atol)
            pruned = case.run(backend, pruned=True).double()
            torch.testing.assert_close(pruned, case.reference()[[0, 130]], rtol=0, atol=atol)


def test_an_empty_batch() -> None:
    spec = make_spec(page_size=16, head_dim=32)
    case = Case(spec, [], [], make_layer(spec))
    assert case.run(CpuAttnBackend(spec)).shape == (0, 6, 32)


def test_it_is_the_default_where_it_is_installed() -> None:
    assert get_attention_backend(None, "cpu") is CpuAttnBackend
    assert get_attention_backend("auto", "cpu") is CpuAttnBackend
    assert get_attention_backend("cpu", "cpu") is CpuAttnBackend
    assert get_attention_backend("torch_native", "cpu") is TorchNativeAttnBackend


def test_a_segment_table_is_read_by_the_reference() -> None:
    class Pool:
        contiguous = False
        spec = make_spec(page_size=16)
        layouts = ()

    assert type(make_attention_backend(CpuAttnBackend, Pool())) is SegmentTableAttnBackend

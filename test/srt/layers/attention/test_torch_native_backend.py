from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang.srt.errors import InvariantError
from sglang.srt.layers.attention import registry
from sglang.srt.layers.attention.registry import get_attention_backend
from sglang.srt.layers.attention.torch_native_backend import (
    TorchNativeAttnBackend,
    TorchNativeTuning,
)
from sglang.srt.layers.attention.torch_native_plan import (
    PageList,
    PieceLimits,
    PlanKey,
    Single,
    SlotRun,
    Visibility,
    make_layer_plan,
)
from sglang.srt.mem_cache.kv_layout import GroupKind, KVGroupSpec
from srt.layers.attention_cases import Case, FakeTable, make_layer, make_spec, make_tables

TINY = TorchNativeTuning(
    query_block=6, min_run_bytes=1024, gather_bytes=2048, piece_work=30_000, dense_bytes=4096
)


def check(case: Case, tuning: TorchNativeTuning | None = None, atol: float = 2e-6) -> None:
    backend = TorchNativeAttnBackend(case.spec, tuning)
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
    run_pages = draw(st.sampled_from([[], [1], [1, 1, 1, 30], [2, 9], [5]]))
    wide = draw(st.booleans())
    spec = make_spec(page_size=page_size, v_head_dim=24 if wide else 16)
    chunk = draw(st.sampled_from([None, None, 1, 5, 16, 40]))
    layer = make_layer(
        spec,
        group=draw(st.sampled_from([1, 3])),
        window=draw(st.sampled_from([None, None, 1, 5, 16, 40])) if chunk is None else None,
        chunk=chunk,
        cap=draw(st.sampled_from([0.0, 0.0, 2.0])),
        sinks=draw(st.booleans()),
    )
    total = sum(extend for _, extend in lengths)
    rows = sorted(draw(st.sets(st.integers(0, total - 1), max_size=8))) if total else []
    tables = make_tables(lengths, page_size, run_pages, seed=draw(st.integers(0, 99)))
    return Case(spec, lengths, tables, layer, seed=draw(st.integers(0, 99)), logits_rows=rows)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases(), tiny=st.booleans())
def test_equals_dense_attention(case: Case, tiny: bool) -> None:
    check(case, TINY if tiny else None)


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("run_pages", [[], [1], [1, 3, 40]])
def test_mixed_batch_at_every_page_size(page_size: int, run_pages: list[int]) -> None:
    lengths = [(300, 1), (0, 130), (64, 64), (999, 1), (511, 70)]
    spec = make_spec(page_size=page_size)
    tables = make_tables(lengths, page_size, run_pages)
    check(Case(spec, lengths, tables, make_layer(spec), logits_rows=[0, 130, 194, 195, 265]))


@pytest.mark.parametrize(("dtype", "atol"), [("bfloat16", 2e-2), ("float16", 3e-3)])
@pytest.mark.parametrize("window", [None, 100])
def test_half_precision(dtype: str, atol: float, window: int | None) -> None:
    lengths = [(300, 1), (0, 130), (290, 40)]
    spec = make_spec(page_size=16, dtype=dtype)
    tables = make_tables(lengths, 16, [2, 7])
    check(Case(spec, lengths, tables, make_layer(spec, window=window)), atol=atol)
    check(Case(spec, lengths, tables, make_layer(spec, window=window)), TINY, atol=atol)


@pytest.mark.parametrize("window", [None, 21])
@pytest.mark.parametrize(("dtype", "atol"), [("float32", 2e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("run_pages", [[], [1], [2, 3]])
def test_many_decodes_of_all_lengths(
    window: int | None, dtype: str, atol: float, run_pages: list[int]
) -> None:
    # Batches by length, stragglers alone, and prompts between them; slots nobody wrote hold NaN.
    lengths = [(n, 1) for n in (5, 6, 700, 7, 33, 31, 30, 29, 0, 2, 90, 91, 300)]
    lengths[4:4] = [(10, 5), (0, 3)]
    spec = make_spec(page_size=4, dtype=dtype)
    rows = [0, 1, 2, 3, 8, 10, *range(12, 20)]
    layer = make_layer(spec, window=window)
    case = Case(spec, lengths, make_tables(lengths, 4, run_pages), layer, logits_rows=rows)
    check(case, atol=atol)
    check(case, TorchNativeTuning(gather_bytes=8 << 10), atol=atol)


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 2e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("shape", [{}, {"window": 21}, {"chunk": 24}, {"cap": 2.0}], ids=str)
def test_sinks_on_every_path(shape: dict[str, Any], dtype: str, atol: float) -> None:
    # Batches, singles in one run, decodes and prompts in merged pieces.
    lengths = [(n, 1) for n in (5, 6, 7, 30, 31, 33, 700, 300)] + [(290, 40), (0, 9)]
    rows = [0, 3, 6, 7, 30, 47, 56]
    spec = make_spec(page_size=4, dtype=dtype)
    for runs in ([], [1], [2, 3]):
        layer = make_layer(spec, sinks=True, **shape)
        tables = make_tables(lengths, 4, runs)
        case = Case(spec, lengths, tables, layer, logits_rows=rows)
        check(case, atol=atol)
        check(case, TINY, atol=atol)
        check(case, TorchNativeTuning(batch_row_bytes=0), atol=atol)


def test_sinks_take_nothing_at_minus_infinity_and_all_at_infinity() -> None:
    lengths = [(10, 1), (3, 4)]
    spec = make_spec()
    tables = make_tables(lengths, 4, [1])
    plain = Case(spec, lengths, tables, make_layer(spec))
    want = plain.run(TorchNativeAttnBackend(spec))
    layer = make_layer(spec, sinks=True)
    assert layer.sinks is not None
    for logit, share in ((float("-inf"), 1.0), (float("inf"), 0.0)):
        layer.sinks.fill_(logit)
        out = Case(spec, lengths, tables, layer).run(TorchNativeAttnBackend(spec))
        assert torch.equal(out, want * share)


def test_sinks_scale_in_float32() -> None:
    # Scaled in float32: queries of that type get more digits than the cache has.
    lengths = [(40, 1)]
    spec = make_spec(page_size=4, dtype="bfloat16")
    layer = make_layer(spec, sinks=True)
    case = Case(spec, lengths, make_tables(lengths, 4, []), layer, q_dtype=torch.float32)
    out = case.run(TorchNativeAttnBackend(spec))
    assert out.dtype is torch.float32
    assert not torch.equal(out, out.bfloat16().float())


def test_query_dtype_comes_back_whatever_the_cache_holds() -> None:
    lengths = [(10, 1), (3, 4)]
    spec = make_spec(dtype="bfloat16")
    case = Case(spec, lengths, make_tables(lengths, 4, [1]), make_layer(spec), q_dtype=torch.float)
    out = case.run(TorchNativeAttnBackend(spec))
    assert out.dtype is torch.float32
    torch.testing.assert_close(out.double(), case.reference(), rtol=0, atol=3e-2)


@pytest.mark.parametrize("window", [3, 64, 200, 1500])
def test_window_over_several_query_blocks_with_real_sizes(window: int) -> None:
    lengths = [(700, 1300), (2500, 1), (0, 1100)]
    spec = make_spec(page_size=16, kv_heads=1)
    tables = make_tables(lengths, 16, [3, 50])
    check(Case(spec, lengths, tables, make_layer(spec, group=2, window=window)), atol=5e-6)


def test_window_group_with_dropped_head_pages() -> None:
    # The table begins at position 32; a window of 20 seen from position 50 on needs 31.. no more.
    spec = make_spec(page_size=4)
    layer = make_layer(spec, window=18)
    table = FakeTable(np.array([9, 3, 4, 7, 8, 1, 2], np.int32), 32, 4)
    check(Case(spec, [(50, 8)], [table], layer, logits_rows=[0, 7]), TINY)
    check(Case(spec, [(57, 1)], [table], layer))


@pytest.mark.parametrize("run_pages", [[1], [2], [50]])
@pytest.mark.parametrize("window", [1, 3, 4, 5, 17])
@pytest.mark.parametrize("page_size", [1, 4])
def test_tables_hold_no_more_than_the_step_sees(
    page_size: int, window: int, run_pages: list[int]
) -> None:
    # What recycling leaves: every table begins with the page of the first key that is seen.
    lengths = [(n, count) for n in (0, 3, 4, 16, 17, 40, 41) for count in (1, 5, 23)]
    tables = []
    for table, (prefix, _) in zip(make_tables(lengths, page_size, run_pages), lengths, strict=True):
        first = max(0, prefix - window + 1) // page_size
        tables.append(FakeTable(table.page_ids[first:], first * page_size, page_size))
    spec = make_spec(page_size=page_size)
    starts = np.cumsum([0, *(count for _, count in lengths)])
    rows = sorted({*(starts[1:] - 1).tolist(), 1, 2, 30})
    case = Case(spec, lengths, tables, make_layer(spec, window=window), logits_rows=rows)
    check(case)
    check(case, TINY)


def test_layers_use_their_own_group() -> None:
    groups = (
        KVGroupSpec(layers=(0,)),
        KVGroupSpec(layers=(1,), kind=GroupKind.SLIDING, window=8),
    )
    spec = make_spec(groups=groups)
    wrong = FakeTable(np.zeros(30, np.int32), 0, 4)
    lengths = [(20, 3)]
    layer = make_layer(spec, window=8, layer_id=1)
    tables = make_tables(lengths, 4, [1])
    check(Case(spec, lengths, tables, layer, extra_tables=((wrong,),)))


# Exact for prompts and for lone decodes; decodes that are computed together agree to rounding.
@pytest.mark.parametrize("lengths", [[(333, 1)], [(333, 20)], [(3, 40)]])
def test_result_does_not_depend_on_the_batch(lengths: list[tuple[int, int]]) -> None:
    spec = make_spec(page_size=16, dtype="bfloat16")
    layer = make_layer(spec)
    table = make_tables(lengths, 16, [2, 5])
    alone = Case(spec, lengths, table, layer).run(TorchNativeAttnBackend(spec))
    others = [FakeTable(np.array([40 + i], np.int32), 0, 16) for i in range(3)]
    mates = [(5, 9), (8, 1), (15, 1)]
    batch = Case(spec, [*lengths, *mates], [*table, *others], layer)
    together = batch.run(TorchNativeAttnBackend(spec))
    assert torch.equal(together[: lengths[0][1]], alone)


def test_empty_batch_gives_no_rows() -> None:
    spec = make_spec()
    out = Case(spec, [], [], make_layer(spec)).run(TorchNativeAttnBackend(spec))
    assert out.shape == (0, 6, 16)


def test_no_wanted_rows_gives_no_rows() -> None:
    spec = make_spec()
    lengths = [(4, 9)]
    case = Case(spec, lengths, make_tables(lengths, 4, []), make_layer(spec))
    assert case.run(TorchNativeAttnBackend(spec), pruned=True).shape == (0, 6, 16)


def plan_of(case: Case, *, pruned: bool = False, **limits: int) -> object:
    bounds = {
        "query_block": 1024,
        "min_run_tokens": 8,
        "gather_tokens": 64,
        "max_keys": 1 << 31,
        "pair_budget": 1 << 40,
        "batch_tokens": 0,
    }
    layer = case.layer
    bound = PieceLimits(**{**bounds, **limits})
    key = PlanKey(0, layer.sliding_window, pruned, bound, layer.attention_chunk)
    return make_layer_plan(case.geometry(), key)


def test_plan_of_contiguous_tables_reads_in_place() -> None:
    spec = make_spec()
    lengths = [(20, 1), (8, 5)]
    case = Case(spec, lengths, make_tables(lengths, 4, []), make_layer(spec), logits_rows=[0, 5])
    plan = plan_of(case)
    assert plan.singles == (Single(row=0, first_slot=4, num_tokens=21),)
    assert plan.single_rows.tolist() == [0]
    (item,) = plan.items
    assert (item.row, item.num_rows, item.position) == (1, 5, 8)
    assert [(p.keys, p.visibility) for p in item.pieces] == [
        (SlotRun(28, 8), Visibility.FULL),
        (SlotRun(36, 5), Visibility.CAUSAL),
    ]
    pruned = plan_of(case, pruned=True)
    assert pruned.singles == (Single(0, 4, 21), Single(1, 28, 13))
    assert pruned.items == ()


def test_plan_batches_single_queries_of_similar_length() -> None:
    spec = make_spec()
    lengths = [(40, 1), (9, 1), (2, 3), (10, 1), (43, 1), (12, 1), (70, 1)]
    tables = make_tables(lengths, 4, [])
    case = Case(spec, lengths, tables, make_layer(spec))
    plan = plan_of(case, batch_tokens=60)
    # 10, 11 and 13 tokens go together; two of 41 and 44 are too few, 71 are too many.
    (batch,) = plan.batches
    assert batch.rows.tolist() == [1, 5, 7]
    short = [tables[i].page_ids.tolist() for i in (1, 3, 5)]
    assert batch.pages.tolist() == [*short[0], short[0][-1], *short[1], short[1][-1], *short[2]]
    visible = (batch.mask == 0).view(3, 16)
    assert visible.sum(-1).tolist() == [10, 11, 13]
    assert visible[:, :10].all()
    hidden = (~visible.flatten()).nonzero().flatten()
    assert batch.padding.tolist() == hidden.tolist()
    assert sorted(single.row for single in plan.singles) == [0, 6, 8]
    assert [(item.row, item.num_rows) for item in plan.items] == [(2, 3)]
    # The gather bound cuts a batch; what is left over of it stands alone.
    plan = plan_of(case, batch_tokens=60, gather_tokens=32)
    assert plan.batches == ()
    assert sorted(single.row for single in plan.singles) == [0, 1, 5, 6, 7, 8]


def test_windowed_batch_starts_inside_a_page() -> None:
    spec = make_spec()
    lengths = [(40, 1), (41, 1), (43, 1)]
    case = Case(spec, lengths, make_tables(lengths, 4, []), make_layer(spec, window=6))
    (batch,) = plan_of(case, batch_tokens=60).batches
    # Positions 36..41, 38..43 and 35..40: from a page's start, slot 2, and slot 3 of three pages.
    assert batch.rows.tolist() == [1, 2, 0]
    visible = (batch.mask == 0).view(3, 12)
    assert [row.nonzero().flatten().tolist() for row in visible] == [
        [0, 1, 2, 3, 4, 5],
        [2, 3, 4, 5, 6, 7],
        [3, 4, 5, 6, 7, 8],
    ]


def test_plan_gathers_short_runs_and_keeps_long_ones_in_place() -> None:
    spec = make_spec()
    # Two lone pages, a run of three pages, one page, then a last run of two.
    table = FakeTable(np.array([9, 5, 20, 21, 22, 7, 30, 31], np.int32), 0, 4)
    case = Case(spec, [(30, 1)], [table], make_layer(spec))
    (item,) = plan_of(case, min_run_tokens=8).items
    keys = [piece.keys for piece in item.pieces]
    assert isinstance(keys[0], PageList)
    assert (keys[0].pages.tolist(), keys[0].skip, keys[0].num_tokens) == ([9, 5], 0, 8)
    assert keys[1:] == [SlotRun(80, 12), SlotRun(28, 4), SlotRun(120, 7)]
    assert [piece.position for piece in item.pieces] == [0, 8, 20, 24]


def test_plan_bounds_queries_keys_and_gathers() -> None:
    spec = make_spec()
    lengths = [(200, 50)]
    scattered = make_tables(lengths, 4, [1])
    case = Case(spec, lengths, scattered, make_layer(spec))
    plan = plan_of(case, query_block=20, gather_tokens=40, pair_budget=100_000)
    assert [(i.row, i.num_rows, i.position) for i in plan.items] == [
        (0, 20, 200),
        (20, 20, 220),
        (40, 10, 240),
    ]
    for item in plan.items:
        full = [p for p in item.pieces if p.visibility is Visibility.FULL]
        assert sum(p.keys.num_tokens for p in full) == item.position
        assert max(p.keys.num_tokens for p in full) <= 40
        assert item.pieces[-1].keys.num_tokens == item.num_rows
    contiguous = Case(spec, lengths, make_tables(lengths, 4, []), make_layer(spec))
    plan = plan_of(contiguous, pair_budget=50 * 64)
    assert [p.keys.num_tokens for p in plan.items[0].pieces] == [64, 64, 64, 8, 50]


def test_window_plan_reads_only_the_window() -> None:
    spec = make_spec()
    lengths = [(1000, 1), (1000, 10)]
    tables = make_tables(lengths, 4, [])
    case = Case(spec, lengths, tables, make_layer(spec, window=32))
    plan = plan_of(case)
    assert plan.singles == (Single(0, 4 + 1001 - 32, 32),)
    pieces = plan.items[0].pieces
    assert [(p.position, p.keys.num_tokens, p.visibility) for p in pieces] == [
        (969, 9, Visibility.BAND),
        (978, 22, Visibility.FULL),
        (1000, 10, Visibility.CAUSAL),
    ]


def test_whole_chunks_are_plain_causal_pieces() -> None:
    spec = make_spec()
    lengths = [(32, 64), (70, 60), (95, 1), (96, 1)]
    case = Case(spec, lengths, make_tables(lengths, 4, []), make_layer(spec, chunk=32))
    plan = plan_of(case)
    causal, full = Visibility.CAUSAL, Visibility.FULL
    assert [
        (item.row, item.position, [(p.position, p.keys.num_tokens, p.visibility) for p in item[3]])
        for item in plan.items
    ] == [
        (0, 32, [(32, 32, causal)]),
        (32, 64, [(64, 32, causal)]),
        (64, 70, [(64, 6, full), (70, 26, causal)]),  # up to the border at 96
        (90, 96, [(96, 32, causal)]),
        (122, 128, [(128, 2, causal)]),
    ]
    # The last position of a chunk sees all of it, the first only itself.
    assert [(single.row, single.num_tokens) for single in plan.singles] == [(124, 32), (125, 1)]


@pytest.mark.parametrize("num_tokens", [4096, 16384])
def test_chunks_read_a_number_of_keys_linear_in_the_prompt(num_tokens: int) -> None:
    spec = make_spec(page_size=16)
    read = 0
    for start in range(0, num_tokens, 1000):  # prefill chunks that align with nothing
        lengths = [(start, min(1000, num_tokens - start))]
        tables = make_tables(lengths, 16, [])
        plan = plan_of(Case(spec, lengths, tables, make_layer(spec, chunk=256)), query_block=128)
        read += sum(p.keys.num_tokens for item in plan.items for p in item.pieces)
    assert read <= 3 * num_tokens  # a block of 128 reads itself and at most its chunk before it


def test_chunked_group_with_dropped_head_pages() -> None:
    spec = make_spec()
    # Chunks of 20: position 50 sees from 40 on; the page that holds 40 is the table's first.
    table = FakeTable(np.array([7, 3, 4, 9, 2, 8, 5], np.int32), 40, 4)
    case = Case(spec, [(50, 17)], [table], make_layer(spec, chunk=20), logits_rows=[0, 9, 10, 16])
    check(case)
    check(case, TINY)


@pytest.mark.parametrize("chunk", [3, 64, 1024, 1500])
def test_chunks_over_several_query_blocks_with_real_sizes(chunk: int) -> None:
    lengths = [(700, 1300), (2500, 1), (0, 1100)]
    spec = make_spec(page_size=16, kv_heads=1)
    tables = make_tables(lengths, 16, [3, 50])
    check(Case(spec, lengths, tables, make_layer(spec, group=2, chunk=chunk)), atol=5e-6)


def test_table_that_misses_positions_is_a_bug() -> None:
    spec = make_spec()
    short = FakeTable(np.array([1, 5], np.int32), 0, 4)
    with pytest.raises(InvariantError, match="outside a block table"):
        plan_of(Case(spec, [(8, 1)], [short], make_layer(spec)))
    dropped = FakeTable(np.array([1, 5], np.int32), 4, 4)
    with pytest.raises(InvariantError, match="outside a block table"):
        plan_of(Case(spec, [(8, 1)], [dropped], make_layer(spec)))


def test_gather_buffer_is_bounded_and_kept() -> None:
    spec = make_spec()
    lengths = [(400, 1), (395, 6)]
    case = Case(spec, lengths, make_tables(lengths, 4, [1]), make_layer(spec))
    backend = TorchNativeAttnBackend(spec, TINY)
    case.run(backend)
    kept = backend._scratch["k"]
    assert kept.nbytes <= TINY.gather_bytes
    case.run(backend)
    assert backend._scratch["k"] is kept


def test_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "has_native_kernels", lambda: False)
    assert get_attention_backend(None, "cpu") is TorchNativeAttnBackend
    assert get_attention_backend("auto", "cpu") is TorchNativeAttnBackend
    assert get_attention_backend("torch_native", "cpu").preferred_page_size == 64
    with pytest.raises(ValueError, match="'flashinfer' is not available on cpu; use torch_native"):
        get_attention_backend("flashinfer", "cpu")
    with pytest.raises(ValueError, match="no attention backend for device 'tpu'"):
        get_attention_backend(None, "tpu")
    with pytest.raises(ValueError, match="needs the native kernels: pip install"):
        get_attention_backend("cpu", "cpu")

"""Attention over keys that several ranks hold: the same numbers as one rank, whoever has what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang.srt.errors import InvariantError
from sglang.srt.layers.attention.cpu_backend import CpuAttnBackend, has_native_kernels
from sglang.srt.layers.attention.kv_parallel_backend import KVParallelAttnBackend
from sglang.srt.layers.attention.own_pages import OwnPages
from sglang.srt.layers.attention.torch_native_backend import (
    TorchNativeAttnBackend,
    TorchNativeTuning,
)
from sglang.srt.mem_cache.kv_layout import GroupKind, KVCacheSpec, KVGroupSpec
from sglang.srt.mem_cache.kv_share import KVShare
from srt.crossed import mostly_slow
from srt.distributed.thread_ranks import ThreadRanks
from srt.layers.attention_cases import (
    Case,
    FakePool,
    FakeTable,
    make_layer,
    make_spec,
    make_tables,
)

TINY = TorchNativeTuning(
    query_block=6, min_run_bytes=1024, gather_bytes=2048, piece_work=30_000, dense_bytes=4096
)
WORLDS = {size: ThreadRanks(size) for size in (2, 3, 4)}


@pytest.fixture(scope="module", autouse=True)
def worlds() -> Iterator[None]:
    yield
    for world in WORLDS.values():
        world.close()


class SharedPool(FakePool):
    """One rank's pool: NaN wherever this rank did not store, its dump page aside."""

    def __init__(self, spec: KVCacheSpec, num_slots: int, share: KVShare) -> None:
        super().__init__(spec, num_slots)
        self.spec, self.share = spec, share

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
        group = self.spec.group_of_layer()[layer_id]
        places = torch.from_numpy(self.share.write_slots(group, loc.numpy()))
        super().set_kv_buffer(layer_id, places, k, v, k_scale=k_scale, v_scale=v_scale)


def attend(
    case: Case,
    size: int,
    tuning: TorchNativeTuning | None = None,
    *,
    pruned: bool = False,
    backend: type[TorchNativeAttnBackend] = TorchNativeAttnBackend,
) -> list[torch.Tensor]:
    """What each of `size` ranks computes. Page ids move up behind the dump segment."""
    world = WORLDS[size]
    full = [group.kind is GroupKind.FULL for group in case.spec.groups]
    sizes = tuple(size if kept else 1 for kept in full)
    tables = [replace(t, page_ids=t.page_ids + np.int32(size)) for t in case.tables]

    def act(rank: int) -> torch.Tensor:
        share = KVShare(rank, sizes, case.spec.page_size)
        mine = replace(
            case,
            tables=tables,
            keys=[],
            values=[],
            make_pool=lambda spec, slots: SharedPool(spec, slots, share),
        )
        inner = backend(case.spec, tuning)
        joined = KVParallelAttnBackend(inner, share, world.links(rank).compute)
        out = mine.run(joined, pruned=pruned)
        case.queries, case.keys, case.values = mine.queries, mine.keys, mine.values
        return out

    return world.run(act)


def check(case: Case, size: int, tuning: TorchNativeTuning | None = None) -> None:
    outs = attend(case, size, tuning)
    for out in outs:
        assert torch.equal(out, outs[0]), "every rank has the same bits"
        torch.testing.assert_close(out.double(), case.reference(), rtol=0, atol=2e-6)
    if len(case.logits_rows):
        pruned = attend(case, size, tuning, pruned=True)[-1]
        rows = torch.tensor(case.logits_rows)
        torch.testing.assert_close(pruned.double(), case.reference()[rows], rtol=0, atol=2e-6)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    page_size = draw(st.sampled_from([1, 4, 16]))
    lengths = draw(
        st.lists(st.tuples(st.integers(0, 90), st.sampled_from([1, 1, 2, 7, 30])), max_size=5)
    )
    run_pages = draw(st.sampled_from([[], [1], [1, 1, 1, 30], [2, 9], [5]]))
    spec = make_spec(page_size=page_size, v_head_dim=draw(st.sampled_from([16, 16, 24])))
    layer = make_layer(
        spec,
        group=draw(st.sampled_from([1, 3])),
        cap=draw(st.sampled_from([0.0, 0.0, 2.0])),
        sinks=draw(st.booleans()),
    )
    total = sum(extend for _, extend in lengths)
    rows = sorted(draw(st.sets(st.integers(0, total - 1), max_size=8))) if total else []
    tables = make_tables(lengths, page_size, run_pages, seed=draw(st.integers(0, 99)))
    return Case(spec, lengths, tables, layer, seed=draw(st.integers(0, 99)), logits_rows=rows)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases(), size=st.sampled_from([2, 3, 4]), tiny=st.booleans())
def test_ranks_together_equal_dense_attention(case: Case, size: int, tiny: bool) -> None:
    check(case, size, TINY if tiny else None)


@pytest.mark.parametrize("run_pages", mostly_slow([[1, 3, 40]], [[], [1]]), ids=str)
def test_long_prompts_and_decodes_together(run_pages: list[int]) -> None:
    lengths = [(3000, 1), (0, 1300), (2999, 64), (64, 1100)]
    spec = make_spec(page_size=64)
    case = Case(spec, lengths, make_tables(lengths, 64, run_pages), make_layer(spec, sinks=True))
    check(case, 4)


def test_a_rank_without_keys_adds_nothing() -> None:
    lengths = [(0, 3), (2, 1)]
    spec = make_spec(page_size=4)
    case = Case(spec, lengths, make_tables(lengths, 4, []), make_layer(spec, sinks=True))
    check(case, 4)


def test_a_window_group_is_whole_on_each_rank_and_sends_nothing() -> None:
    groups = (KVGroupSpec((0,)), KVGroupSpec((1,), GroupKind.SLIDING, 5))
    spec = make_spec(groups=groups)
    lengths = [(20, 1), (0, 9)]
    tables = make_tables(lengths, 4, [1])
    layer = make_layer(spec, window=5, layer_id=1)
    case = Case(spec, lengths, tables, layer, extra_tables=(tuple(tables),))
    before = len(WORLDS[2].compute.calls[0])
    for out in attend(case, 2):
        torch.testing.assert_close(out.double(), case.reference(), rtol=0, atol=2e-6)
    assert len(WORLDS[2].compute.calls[0]) == before


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8_e4m3"])
def test_narrow_types_are_near(dtype: str) -> None:
    lengths = [(200, 1), (30, 50)]
    spec = make_spec(page_size=16, dtype=dtype)
    case = Case(spec, lengths, make_tables(lengths, 16, [2, 1]), make_layer(spec))
    for out in attend(case, 4):
        torch.testing.assert_close(out.double(), case.reference(), rtol=0, atol=2e-2)


def test_one_message_a_layer() -> None:
    lengths = [(20, 1), (0, 9)]
    spec = make_spec()
    case = Case(spec, lengths, make_tables(lengths, 4, [1]), make_layer(spec))
    calls = WORLDS[2].compute.calls[0]
    before = len(calls)
    attend(case, 2)
    heads, rows = case.layer.num_heads, 10
    assert calls[before:] == [f"all_gather {(1, rows, heads, spec.v_head_dim + 1)} 0"]


@pytest.mark.skipif(not has_native_kernels(), reason="needs sgl-kernel")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8_e4m3"])
@pytest.mark.parametrize("sinks", [False, True])
def test_single_queries_go_to_the_native_kernels(
    dtype: str, sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decode steps, and the last layer of a prompt; a rank without a request's keys among them."""
    spec = make_spec(page_size=16, head_dim=64, dtype=dtype)
    layer = make_layer(spec, sinks=sinks)
    lengths = [(700, 1), (0, 1), (47, 1), (200, 1)]
    decode = Case(spec, lengths, make_tables(lengths, 16, [1, 3]), layer)
    lengths = [(300, 90), (5, 1)]
    prompt = Case(spec, lengths, make_tables(lengths, 16, [2]), layer, logits_rows=[89, 90])

    def not_here(*_: object) -> None:
        raise AssertionError("torch was asked")

    monkeypatch.setattr(TorchNativeAttnBackend, "_attend", not_here)
    atol = 2e-6 if dtype == "float32" else 2e-2
    for out in attend(decode, 4, backend=CpuAttnBackend):
        torch.testing.assert_close(out.double(), decode.reference(), rtol=0, atol=atol)
    for out in attend(prompt, 4, pruned=True, backend=CpuAttnBackend):
        expected = prompt.reference()[[89, 90]]
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=atol)
    with pytest.raises(AssertionError, match="torch was asked"):
        attend(prompt, 2, backend=CpuAttnBackend)
    WORLDS.pop(2).close()  # its ranks have parted
    WORLDS[2] = ThreadRanks(2)


def own_pages(*pages: int, rank: int = 1, size: int = 4) -> OwnPages:
    table = FakeTable(np.array(pages, np.int32), 0, 4)
    return OwnPages(table, KVShare(rank, (size,), 4), 0, 4)


def test_places_of_own_pages() -> None:
    own = own_pages(8, 9, 10, 11, 12, 13)
    assert own.page_ids.tolist() == [2, 3]
    assert own.first_run == (8, 8)
    assert [own.num_before(p) for p in (0, 4, 5, 8, 20, 23, 24)] == [0, 0, 1, 4, 4, 7, 8]
    assert own.positions(0, 8).tolist() == [4, 5, 6, 7, 20, 21, 22, 23]
    assert own.positions(3, 5).tolist() == [7, 20]
    with pytest.raises(InvariantError, match="position 25 is outside 6 pages"):
        own.num_before(25)
    assert own_pages(8, 10).first_run == (0, 0)
    assert own_pages(9, 21).first_run == (8, 4)


def test_a_table_without_its_head_is_refused() -> None:
    table = FakeTable(np.array([9], np.int32), 4, 4)
    with pytest.raises(InvariantError, match="without its head"):
        OwnPages(table, KVShare(1, (4,), 4), 0, 4)

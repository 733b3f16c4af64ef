"""The backend of plain tensor operations, on a CPU: equal to dense attention and torch_native."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from sglang.srt.errors import InvariantError
from sglang.srt.layers.attention import torch_device_backend
from sglang.srt.layers.attention.torch_device_backend import (
    RECORDED_TOKENS,
    TorchDeviceAttnBackend,
)
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from srt.layers.attention.test_torch_native_backend import cases
from srt.layers.attention_cases import Case, FakeTable, make_layer, make_spec, make_tables


def check(case: Case, atol: float = 4e-6) -> None:
    backend = TorchDeviceAttnBackend(case.spec)
    out = case.run(backend)
    torch.testing.assert_close(out.double(), case.reference(), rtol=0, atol=atol)
    other = case.run(TorchNativeAttnBackend(case.spec))
    torch.testing.assert_close(out, other, rtol=0, atol=2 * atol)
    if len(case.logits_rows):
        rows = torch.tensor(case.logits_rows)
        pruned = case.run(backend, pruned=True).double()
        torch.testing.assert_close(pruned, case.reference()[rows], rtol=0, atol=atol)


@settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.differing_executors],
)
@given(case=cases())
def test_equals_dense_attention(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("block_bytes", [1, 4096])
@pytest.mark.parametrize("shape", [{}, {"window": 21}, {"chunk": 24}, {"sinks": True}], ids=str)
def test_small_blocks_merge(
    shape: dict[str, Any], block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_device_backend, "_BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(torch_device_backend, "_QUERY_BLOCK", 7)
    spec = make_spec(page_size=4)
    for lengths in ([(90, 1), (3, 1), (0, 1)], [(50, 30), (0, 9), (77, 1)]):
        tables = make_tables(lengths, 4, [1, 2])
        total = sum(extend for _, extend in lengths)
        layer = make_layer(spec, **shape)
        check(Case(spec, lengths, tables, layer, logits_rows=[0, total - 1]))


@pytest.mark.parametrize(
    ("dtype", "atol"), [("bfloat16", 2e-2), ("float16", 3e-3), ("fp8_e4m3", 4e-6)]
)
def test_other_kv_types(dtype: str, atol: float) -> None:
    spec = make_spec(page_size=16, dtype=dtype)
    lengths = [(33, 1), (0, 40), (80, 3)]
    check(Case(spec, lengths, make_tables(lengths, 16, [1]), make_layer(spec)), atol)


def test_a_table_whose_head_was_dropped() -> None:
    spec = make_spec(page_size=4)
    table = FakeTable(np.array([5, 2, 9], np.int32), 16, 4)
    for lengths in ([(26, 1)], [(23, 5)]):
        check(Case(spec, lengths, [table], make_layer(spec, window=6)))


def test_a_table_that_misses_positions_is_a_bug() -> None:
    spec = make_spec(page_size=4)
    case = Case(spec, [(6, 1)], make_tables([(6, 1)], 4, []), make_layer(spec))
    case.run(TorchDeviceAttnBackend(spec))
    backend = TorchDeviceAttnBackend(spec)
    short = make_tables([(3, 1)], 4, [])
    plan = backend.plan(Case(spec, [(6, 1)], short, make_layer(spec)).geometry())
    with pytest.raises(InvariantError, match="ends at position 4 for 7 tokens"):
        backend._tables(plan, 0, torch.device("cpu"))


def test_a_recorded_plan_becomes_another_step_in_place() -> None:
    spec = make_spec(page_size=64)
    backend = TorchDeviceAttnBackend(spec)

    def geometry(lengths: list[tuple[int, int]], seed: int) -> Any:
        tables = make_tables(lengths, 64, [1], seed=seed)
        return Case(spec, lengths, tables, make_layer(spec)).geometry()

    first, second = geometry([(5, 1), (9, 1)], 0), geometry([(700, 1), (64, 1)], 1)
    assert backend.may_record(first)
    assert not backend.may_record(geometry([(5, 2)], 0))
    assert not backend.may_record(geometry([(RECORDED_TOKENS, 1)], 0))
    plan = backend.plan_recorded(first)
    tables = backend._tables(plan, 0, torch.device("cpu"))
    address = tables.pages.data_ptr()
    backend.renew(plan, second)
    assert tables.pages.data_ptr() == address
    assert tables.pages[0, :11].tolist() == second.block_tables[0][0].page_ids.tolist()
    assert tables.last.tolist() == [700, 64]

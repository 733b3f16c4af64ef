"""Sparse attention of one layer on every backend: what is chosen, in any blocks, and its attention.

The reference scores in float64, sorts by score and position, and attends to what comes first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from sglang.srt.errors import InvariantError
from sglang.srt.layers.attention.cpu_backend import CpuAttnBackend, has_native_kernels
from sglang.srt.layers.attention.sparse_backend import SparseAttnBackend
from sglang.srt.layers.attention.sparse_cpu_backend import ScoreLimits, SparseCpuBackend
from sglang.srt.layers.attention.sparse_device_backend import SparseDeviceBackend
from sglang.srt.layers.attention.token_choice import IndexQuery
from sglang.srt.layers.attention.torch_device_backend import TorchDeviceAttnBackend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.index_planes import IndexPlanes
from sglang.srt.mem_cache.kv_layout import KVCacheSpec, KVGroupSpec
from sglang.srt.model_executor.forward_batch_info import BatchGeometry, ForwardBatch, ForwardMode
from sglang.srt.utils.progress import Progress
from srt.layers.attention_cases import FakePool, make_tables

D, E, X, HEADS, INDEX_HEADS, TOPK, PAGE = 48, 32, 16, 6, 4, 10, 4
# A short prompt, one that grows past the limit, decodes of several lengths, none, a long prompt.
LENGTHS = [(0, 7), (6, 9), (40, 1), (TOPK - 1, 1), (TOPK, 1), (90, 1), (30, 0), (11, 23)]

Make = Callable[[KVCacheSpec, KVCacheSpec], SparseAttnBackend]
BACKENDS: dict[str, Make] = {
    "torch_native": lambda spec, one: SparseCpuBackend(
        TorchNativeAttnBackend(spec), TorchNativeAttnBackend(one), TOPK
    ),
    "tiny blocks": lambda spec, one: SparseCpuBackend(
        *(TorchNativeAttnBackend(spec), TorchNativeAttnBackend(one), TOPK),
        ScoreLimits(score_bytes=4 * INDEX_HEADS * 2 * 11),
    ),
    "device": lambda spec, one: SparseDeviceBackend(TorchDeviceAttnBackend(spec), TOPK),
    "device in tiny blocks": lambda spec, one: SparseDeviceBackend(
        TorchDeviceAttnBackend(spec), TOPK, block_bytes=4 * X * 40
    ),
}
if has_native_kernels():
    BACKENDS["cpu"] = lambda spec, one: SparseCpuBackend(
        CpuAttnBackend(spec), CpuAttnBackend(one), TOPK
    )


@dataclass
class Layer:
    """One layer's numbers of all requests, in float32 but rounded to the pool's type."""

    keys: list[torch.Tensor]
    index: list[torch.Tensor]
    q: torch.Tensor
    query: IndexQuery
    batch: ForwardBatch
    layer: RadixAttention


def make(make_backend: Make, dtype: str, *, ties: bool = False) -> Layer:
    spec = KVCacheSpec((KVGroupSpec((0,)),), 1, D, E, dtype, PAGE, True, X, (0,))
    one = KVCacheSpec(spec.groups, 1, D, E, dtype, 1, True, X, (0,))
    backend = make_backend(spec, one)
    layer = RadixAttention(HEADS, D, 0.2, 1, 0, v_head_dim=E, values_in_keys=True)
    prefix, extend = (np.array(column, np.int64) for column in zip(*LENGTHS, strict=True))
    starts = np.cumsum(extend) - extend
    rows = np.array([3, 12, 15, 16, 17, 18, 19, 30, 41])
    tables = make_tables(LENGTHS, PAGE, [1, 3, 2])
    geometry = BatchGeometry(
        *(prefix + extend, prefix, extend, starts, rows), (tuple(tables),), PAGE
    )
    num_slots = PAGE * (
        2 + max(int(table.page_ids.max()) for table in tables if len(table.page_ids))
    )
    pool = FakePool(spec, num_slots)
    kv = pool.k[0].dtype
    plane = torch.full((num_slots, 1, X), float("nan")).to(kv)
    pool.index_planes = IndexPlanes({0: plane})  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(4)
    keys, index = [], []
    for (before, new), table in zip(LENGTHS, tables, strict=True):
        slots = table.slots(0, before + new)
        k = torch.randn(before + new, 1, D, generator=generator).to(kv)
        x = torch.randn(before + new, 1, X, generator=generator)
        x = (x.sign() if ties else x).to(kv)
        pool.k[0][slots], plane[slots] = k, x
        keys.append(k[:, 0].double())
        index.append(x[:, 0].double())
    total = int(extend.sum())
    batch = ForwardBatch(
        forward_mode=ForwardMode.MIXED,
        input_ids=torch.zeros(total, dtype=torch.long),
        positions=torch.zeros(total, dtype=torch.long),
        geometry=geometry,
        out_cache_loc=(torch.zeros(total, dtype=torch.long),),
        logits_rows=torch.from_numpy(rows),
        token_to_kv_pool=pool,
        attn_backend=backend,
        attn_plan=backend.plan(geometry),
        progress=Progress(),
    )
    q = torch.randn(total, HEADS, D, generator=generator).to(kv).float()
    heads = torch.randn(total, INDEX_HEADS, X, generator=generator)
    weights = torch.rand(total, INDEX_HEADS, generator=generator)
    if ties:
        heads, weights = heads.sign(), weights.mul(2).ceil()
    return Layer(keys, index, q, IndexQuery(heads, weights), batch, layer)


def expected(one: Layer) -> torch.Tensor:
    """Attention of every packed row in float64."""
    outs, row = [], 0
    for (before, new), keys, index in zip(LENGTHS, one.keys, one.index, strict=True):
        for position in range(before, before + new):
            heads, weights = one.query.heads[row].double(), one.query.weights[row].double()
            scores = weights @ (heads @ index[: position + 1].t()).relu()
            order = sorted(range(position + 1), key=lambda at, s=scores: (-float(s[at]), at))
            seen = keys[order[:TOPK]]
            share = (one.q[row].double() @ seen.t() * 0.2).softmax(-1)
            outs.append(share @ seen[:, :E])
            row += 1
    return torch.stack(outs)


def attend(one: Layer, *, pruned: bool) -> torch.Tensor:
    backend: SparseAttnBackend = one.batch.attn_backend
    q, query = one.q, one.query
    if pruned:
        q, query = q[one.batch.logits_rows], query.rows(one.batch.logits_rows)
    assert backend.chooses(one.batch, rows_pruned=pruned)
    backend.choose(query, one.layer, one.batch, rows_pruned=pruned)
    out = backend.forward(q, one.layer, one.batch, rows_pruned=pruned)
    return out.view(len(q), HEADS, E)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8_e4m3"])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_mixed_batch(name: str, dtype: str) -> None:
    one = make(BACKENDS[name], dtype)
    reference = expected(one)
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    torch.testing.assert_close(
        attend(one, pruned=False).double(), reference, rtol=0, atol=tolerance
    )
    pruned = attend(one, pruned=True).double()
    wanted = reference[one.batch.logits_rows]
    torch.testing.assert_close(pruned, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", BACKENDS)
def test_of_equal_scores_the_earliest(name: str) -> None:
    """Scores are small whole numbers, most of them equal."""
    one = make(BACKENDS[name], "float32", ties=True)
    out = attend(one, pruned=False).double()
    torch.testing.assert_close(out, expected(one), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", BACKENDS)
def test_layers_behind_see_what_was_chosen_last(name: str) -> None:
    one = make(BACKENDS[name], "float32")
    backend: SparseAttnBackend = one.batch.attn_backend
    with pytest.raises(InvariantError, match="layer 0 attends before any tokens were chosen"):
        backend.forward(one.q, one.layer, one.batch, rows_pruned=False)
    whole = attend(one, pruned=False)
    rows = one.batch.logits_rows
    again = backend.forward(one.q[rows], one.layer, one.batch, rows_pruned=True)
    torch.testing.assert_close(again.view(-1, HEADS, E), whole[rows], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_query_of_nan_reads_nothing_unwritten(name: str) -> None:
    """Its own result is NaN or not; those of others stay."""
    one, spoilt = make(BACKENDS[name], "float32"), make(BACKENDS[name], "float32")
    spoilt.query.heads[16] = float("nan")
    out, other = attend(one, pruned=False), attend(spoilt, pruned=False)
    assert other.isfinite().all()  # of the first tokens, which are written
    kept = torch.arange(len(out)) != 16
    torch.testing.assert_close(other[kept], out[kept], rtol=0, atol=1e-6)

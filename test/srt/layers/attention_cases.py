"""Batches over a fake KV pool, and the float64 attention that every backend is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.kv_layout import KVCacheSpec, KVGroupSpec
from sglang.srt.mem_cache.segment_backing.base import KV_TORCH_DTYPES as DTYPES
from sglang.srt.mem_cache.segment_backing.segment_plane import raw, round_to, widen
from sglang.srt.model_executor.forward_batch_info import (
    BatchGeometry,
    ForwardBatch,
    ForwardMode,
    Int32Array,
)
from sglang.srt.utils.progress import Progress

__all__ = ["DTYPES", "Case", "FakePool", "FakeTable", "make_layer", "make_spec", "make_tables"]


@dataclass(frozen=True)
class FakeTable:
    page_ids: Int32Array
    first_position: int
    page_size: int

    @property
    def first_run(self) -> tuple[int, int]:
        pages, count = self.page_ids.tolist(), 0
        while count < len(pages) and pages[count] == pages[0] + count:
            count += 1
        return (pages[0] * self.page_size if pages else 0, count * self.page_size)

    def slots(self, lo: int, hi: int) -> torch.Tensor:
        points = np.arange(lo, hi) - self.first_position
        pages = self.page_ids[points // self.page_size].astype(np.int64)
        return torch.from_numpy(pages * self.page_size + points % self.page_size)


class FakePool:
    """K and V of every layer, NaN wherever nothing was stored: reading too far shows."""

    def __init__(self, spec: KVCacheSpec, num_slots: int) -> None:
        dtype = DTYPES[spec.dtype]
        k_shape = (num_slots, spec.kv_heads, spec.head_dim)
        v_shape = (num_slots, spec.kv_heads, spec.v_head_dim)
        nan = float("nan")
        self.k = [round_to(torch.full(k_shape, nan), dtype) for _ in range(spec.num_layers)]
        self.v = [round_to(torch.full(v_shape, nan), dtype) for _ in range(spec.num_layers)]
        if spec.values_in_keys:
            self.v = [keys[..., : spec.v_head_dim] for keys in self.k]

    def get_key_buffer(self, layer: int) -> torch.Tensor:
        return self.k[layer]

    def get_value_buffer(self, layer: int) -> torch.Tensor:
        return self.v[layer]

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
        raw(self.k[layer_id])[loc] = raw(round_to(k, self.k[layer_id].dtype, k_scale))
        raw(self.v[layer_id])[loc] = raw(round_to(v, self.v[layer_id].dtype, v_scale))


@dataclass
class Case:
    """One batch: per request (prefix, extend) lengths, tables, and what is stored for them."""

    spec: KVCacheSpec
    lengths: Sequence[tuple[int, int]]
    tables: Sequence[FakeTable]
    layer: RadixAttention
    seed: int = 0
    logits_rows: Sequence[int] = ()
    extra_tables: tuple[tuple[FakeTable, ...], ...] = ()
    q_dtype: torch.dtype | None = None
    queries: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    make_pool: Callable[[KVCacheSpec, int], Any] = FakePool
    value_factor: float = 1.0  # by which values are larger than what their scale is for

    def geometry(self) -> BatchGeometry:
        prefix = np.array([p for p, _ in self.lengths], np.int64)
        extend = np.array([e for _, e in self.lengths], np.int64)
        return BatchGeometry(
            seq_lens=prefix + extend,
            extend_prefix_lens=prefix,
            extend_seq_lens=extend,
            q_starts=np.cumsum(extend) - extend,
            logits_rows=np.array(self.logits_rows, np.int64),
            block_tables=(*self.extra_tables, tuple(self.tables)),
            page_size=self.spec.page_size,
        )

    def run(self, backend: AttentionBackend, *, pruned: bool = False) -> torch.Tensor:
        """Store prefixes, call the layer as a model does, and return its output [R, H, E]."""
        spec, layer = self.spec, self.layer
        dtype = DTYPES[spec.dtype]
        num_slots = spec.page_size * (
            2 + max((int(t.page_ids.max()) for t in self.tables if len(t.page_ids)), default=0)
        )
        pool = self.make_pool(spec, num_slots)
        total = sum(extend for _, extend in self.lengths)
        # K and V of fp8 come in what a model computes in, as numbers that need no rounding.
        computed = dtype if dtype.itemsize > 1 else self.q_dtype or torch.float32
        q_dtype = self.q_dtype or computed
        new_q, new_k, new_v, locs = [], [], [], []
        self.keys.clear()
        self.values.clear()
        for i, ((prefix, extend), table) in enumerate(zip(self.lengths, self.tables, strict=True)):
            # A generator each: a request's numbers do not depend on its batch.
            generator = torch.Generator().manual_seed(self.seed + i)
            new_q.append(torch.randn(extend, layer.num_heads, spec.head_dim, generator=generator))
            k = torch.randn(prefix + extend, spec.kv_heads, spec.head_dim, generator=generator)
            v = torch.randn(prefix + extend, spec.kv_heads, spec.v_head_dim, generator=generator)
            k, v = (widen(round_to(x, dtype), computed) for x in (k, v))
            k, v = k * layer.k_scale, v * layer.v_scale * self.value_factor
            if spec.values_in_keys:
                v = k[..., : spec.v_head_dim]
            kept = table.first_position
            old = table.slots(kept, prefix) if prefix > kept else torch.empty(0, dtype=torch.long)
            scales = {"k_scale": layer.k_scale, "v_scale": layer.v_scale}
            pool.set_kv_buffer(layer.layer_id, old, k[kept:prefix], v[kept:prefix], **scales)
            new_k.append(k[prefix:])
            new_v.append(v[prefix:])
            locs.append(table.slots(prefix, prefix + extend))
            self.keys.append(k)
            self.values.append(v)
        geometry = self.geometry()
        loc = torch.cat(locs) if locs else torch.empty(0, dtype=torch.long)
        rows = torch.from_numpy(geometry.logits_rows)
        batch = ForwardBatch(
            forward_mode=ForwardMode.MIXED,
            input_ids=torch.zeros(total, dtype=torch.long),
            positions=torch.zeros(total, dtype=torch.long),
            geometry=geometry,
            out_cache_loc=(*(loc for _ in self.extra_tables), loc),
            logits_rows=rows,
            token_to_kv_pool=pool,
            attn_backend=backend,
            attn_plan=backend.plan(geometry),
            progress=Progress(),
        )
        width_q = layer.num_heads * layer.head_dim
        q = torch.cat(new_q).reshape(-1, width_q) if new_q else torch.empty(0, width_q)
        q = q.to(q_dtype)
        self.queries = q
        width_k, width_v = spec.kv_heads * spec.head_dim, spec.kv_heads * spec.v_head_dim
        flat_k = torch.cat(new_k).reshape(-1, width_k) if new_k else torch.empty(0, width_k)
        flat_v = torch.cat(new_v).reshape(-1, width_v) if new_v else torch.empty(0, width_v)
        out = layer(q[rows] if pruned else q, flat_k, flat_v, batch, rows_pruned=pruned)
        assert batch.progress.count > 0
        return out.view(-1, layer.num_heads, layer.v_head_dim)

    def reference(self) -> torch.Tensor:
        """Attention of every packed row in float64, after `run`: [T, H, E]."""
        layer, row, outs = self.layer, 0, []
        for (prefix, extend), k, v in zip(self.lengths, self.keys, self.values, strict=True):
            q = self.queries[row : row + extend].double()
            q = q.view(extend, layer.num_heads, layer.head_dim).transpose(0, 1)
            group = layer.num_heads // layer.num_kv_heads
            keys = k.double().transpose(0, 1).repeat_interleave(group, 0)
            values = v.double().transpose(0, 1).repeat_interleave(group, 0)
            scores = q @ keys.transpose(1, 2) * (layer.scaling / layer.k_scale)
            if layer.logit_cap:
                scores = layer.logit_cap * torch.tanh(scores / layer.logit_cap)
            at = torch.arange(prefix, prefix + extend).unsqueeze(1)
            key_at = torch.arange(prefix + extend)
            visible = key_at <= at
            if layer.sliding_window is not None:
                visible &= key_at > at - layer.sliding_window
            if layer.attention_chunk is not None:
                visible &= key_at >= at - at % layer.attention_chunk
            scores = scores.masked_fill(~visible, float("-inf"))
            if layer.sinks is not None:  # one more key, whose value is zero
                sink = layer.sinks.double().view(-1, 1, 1).expand(-1, extend, 1)
                scores = torch.cat((scores, sink), -1)
                values = torch.cat((values, torch.zeros_like(values[:, :1])), 1)
            outs.append((scores.softmax(-1) @ values).transpose(0, 1))
            row += extend
        if not outs:
            return torch.empty(0, layer.num_heads, layer.v_head_dim, dtype=torch.float64)
        return torch.cat(outs)


def make_spec(
    *,
    page_size: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    v_head_dim: int | None = None,
    dtype: str = "float32",
    groups: tuple[KVGroupSpec, ...] = (KVGroupSpec(layers=(0,)),),
    values_in_keys: bool = False,
) -> KVCacheSpec:
    widths = (head_dim, v_head_dim or head_dim)
    return KVCacheSpec(groups, kv_heads, *widths, dtype, page_size, values_in_keys)


def make_layer(
    spec: KVCacheSpec,
    *,
    group: int = 3,
    window: int | None = None,
    chunk: int | None = None,
    cap: float = 0.0,
    sinks: bool = False,
    layer_id: int = 0,
) -> RadixAttention:
    num_heads = spec.kv_heads * group
    logits = torch.linspace(-2.0, 6.0, num_heads)  # from next to no share to most of it
    return RadixAttention(
        num_heads,
        spec.head_dim,
        spec.head_dim**-0.5,
        spec.kv_heads,
        layer_id,
        sliding_window=window,
        attention_chunk=chunk,
        v_head_dim=spec.v_head_dim,
        logit_cap=cap,
        sinks=nn.Parameter(logits, requires_grad=False) if sinks else None,
        values_in_keys=spec.values_in_keys,
    )


def make_tables(
    lengths: Sequence[tuple[int, int]], page_size: int, run_pages: Sequence[int], seed: int = 0
) -> list[FakeTable]:
    """Tables whose pages come in shuffled runs of the given lengths (repeated); [] is contiguous.

    Page 0 is never used.
    """
    counts = [-(-(prefix + extend) // page_size) for prefix, extend in lengths]
    total = sum(counts)
    if not run_pages:
        order = np.arange(1, total + 1)
    else:
        cuts, at, step = [], 0, 0
        while at < total:
            at += run_pages[step % len(run_pages)]
            cuts.append(min(at, total))
            step += 1
        pieces = np.split(np.arange(1, total + 1), cuts[:-1])
        shuffled = np.random.default_rng(seed).permutation(len(pieces))
        order = np.concatenate([pieces[i] for i in shuffled]) if pieces else np.empty(0, np.int64)
    tables, at = [], 0
    for count in counts:
        tables.append(FakeTable(order[at : at + count].astype(np.int32), 0, page_size))
        at += count
    return tables

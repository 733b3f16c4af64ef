"""One layer's attention through a backend as a server calls it, and in float64 beside it.

Legend: B requests, T new tokens, H query heads, G kv heads, D head dim, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from gpu_check.shapes import AttentionShape, Heads
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.block_table import BlockTableSnapshot
from sglang.srt.mem_cache.kv_layout import GroupKind, KVCacheSpec, KVGroupSpec
from sglang.srt.mem_cache.segment_backing.base import KV_TORCH_DTYPES
from sglang.srt.mem_cache.segment_backing.segment_plane import raw, round_to
from sglang.srt.model_executor.forward_batch_info import BatchGeometry, ForwardBatch
from sglang.srt.model_executor.forward_mode import ForwardMode
from sglang.srt.utils.progress import Progress

_FILL_SLOTS = 1 << 20
_QUERY_BLOCK = 64
_FP8_SCALES = (0.7, 90.0)  # of K and V in a cache of fp8


class OnePool:
    """K and V of one layer on a device, [S, G, D] each, filled with random numbers."""

    contiguous = True

    def __init__(self, num_slots: int, heads: Heads, dtype: str, device: torch.device) -> None:
        shape = (num_slots, heads.kv_heads, heads.head_dim)
        kv_dtype = KV_TORCH_DTYPES[dtype]
        self.k, self.v = (torch.empty(shape, dtype=kv_dtype, device=device) for _ in range(2))
        for plane in (self.k, self.v):
            for first in range(0, num_slots, _FILL_SLOTS):
                part = plane[first : first + _FILL_SLOTS]
                numbers = torch.randn(part.shape, device=device, dtype=torch.float32)
                raw(part).copy_(raw(round_to(numbers, kv_dtype)))

    def get_key_buffer(self, layer: int) -> torch.Tensor:
        """See MHATokenToKVPool."""
        del layer
        return self.k

    def get_value_buffer(self, layer: int) -> torch.Tensor:
        """See MHATokenToKVPool."""
        del layer
        return self.v

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
        """Nothing: the pool is full of numbers already."""
        del layer_id, loc, k, v, k_scale, v_scale


def spec_of(heads: Heads, dtype: str, page_size: int) -> KVCacheSpec:
    """One layer of one group."""
    group = KVGroupSpec((0,), GroupKind.FULL)
    return KVCacheSpec((group,), heads.kv_heads, heads.head_dim, heads.head_dim, dtype, page_size)


def layer_of(shape: AttentionShape, device: torch.device) -> RadixAttention:
    """The layer that a shape describes."""
    heads = shape.heads
    sinks = None
    if shape.sinks:
        logits = torch.linspace(-2.0, 6.0, heads.num_heads, device=device)
        sinks = nn.Parameter(logits, requires_grad=False)
    layer = RadixAttention(
        heads.num_heads,
        heads.head_dim,
        heads.head_dim**-0.5,
        heads.kv_heads,
        0,
        sliding_window=shape.window,
        attention_chunk=shape.chunk,
        logit_cap=shape.logit_cap,
        sinks=sinks,
    )
    if KV_TORCH_DTYPES[shape.dtype].itemsize == 1:
        layer.set_kv_scales(*_FP8_SCALES)
    return layer


@dataclass(frozen=True)
class Batch:
    """A batch over a pool, ready to be attended again and again."""

    forward_batch: ForwardBatch
    layer: RadixAttention
    queries: torch.Tensor  # [T, H, D]
    tables: tuple[BlockTableSnapshot, ...]

    def attend(self, backend: AttentionBackend) -> torch.Tensor:
        """One layer's attention, [T, H, D], as the layer does it."""
        out = backend.forward(self.queries, self.layer, self.forward_batch, rows_pruned=False)
        if self.layer.v_scale != 1.0 and not backend.scales_values:
            out = out * self.layer.v_scale
        return out.view(self.queries.shape)


def make_tables(
    lengths: Sequence[tuple[int, int]], page_size: int, *, scattered: bool, seed: int = 0
) -> tuple[tuple[BlockTableSnapshot, ...], int]:
    """Tables of requests, their pages in runs of 1 to 40 in mixed order; and the slots in all."""
    counts = [-(-(prefix + extend) // page_size) for prefix, extend in lengths]
    total = sum(counts)
    order = np.arange(1, total + 1, dtype=np.int32)
    if scattered and total > 1:
        rng = np.random.default_rng(seed)
        cuts = np.cumsum(rng.integers(1, 41, total))
        pieces = np.split(order, cuts[cuts < total])
        order = np.concatenate([pieces[i] for i in rng.permutation(len(pieces))])
    tables, at = [], 0
    for count in counts:
        pages = order[at : at + count]
        breaks = np.flatnonzero(np.diff(pages) != 1)
        run = int(breaks[0]) + 1 if len(breaks) else count
        first_run = (int(pages[0]) * page_size, run * page_size) if count else (0, 0)
        tables.append(BlockTableSnapshot(pages, 0, first_run, page_size))
        at += count
    return tuple(tables), (total + 1) * page_size


def make_geometry(
    lengths: Sequence[tuple[int, int]], tables: tuple[BlockTableSnapshot, ...], page_size: int
) -> BatchGeometry:
    """The lengths of a batch whose every row's logits are wanted."""
    prefix = np.array([prefix for prefix, _ in lengths], np.int64)
    extend = np.array([extend for _, extend in lengths], np.int64)
    return BatchGeometry(
        seq_lens=prefix + extend,
        extend_prefix_lens=prefix,
        extend_seq_lens=extend,
        q_starts=np.cumsum(extend) - extend,
        logits_rows=np.arange(extend.sum(), dtype=np.int64),
        block_tables=(tables,),
        page_size=page_size,
    )


def make_batch(
    shape: AttentionShape, backend: AttentionBackend, pool: Any, device: torch.device
) -> Batch:
    """A batch of the shape over `pool`, planned by `backend`."""
    tables, _ = make_tables(shape.lengths, shape.page_size, scattered=shape.scattered)
    geometry = make_geometry(shape.lengths, tables, shape.page_size)
    total = int(geometry.extend_seq_lens.sum())
    dtype = KV_TORCH_DTYPES[shape.dtype]
    dtype = torch.bfloat16 if dtype.itemsize == 1 else dtype
    queries = torch.randn(
        total, shape.heads.num_heads, shape.heads.head_dim, device=device, dtype=torch.float32
    ).to(dtype)
    zeros = torch.zeros(total, dtype=torch.int64, device=device)
    forward_batch = ForwardBatch(
        forward_mode=ForwardMode.MIXED,
        input_ids=zeros,
        positions=zeros,
        geometry=geometry,
        out_cache_loc=(zeros,),
        logits_rows=torch.arange(total, device=device),
        token_to_kv_pool=pool,
        attn_backend=backend,
        attn_plan=backend.plan(geometry),
        progress=Progress(),
    )
    return Batch(forward_batch, layer_of(shape, device), queries, tables)


def largest_error(batch: Batch, pool: OnePool, out: torch.Tensor, shape: AttentionShape) -> float:
    """The largest distance of `out` [T, H, D] from attention in float64, over 1 + what is exact.

    16-bit outputs are rounded in proportion to what they are. Of a scaled cache both are in units
    of what is stored.
    """
    worst, row = 0.0, 0
    for (prefix, extend), table in zip(shape.lengths, batch.tables, strict=True):
        end = prefix + extend
        device = out.device
        pages = torch.from_numpy(table.page_ids.astype(np.int64)).to(device)
        offsets = torch.arange(shape.page_size, device=device)
        slots = (pages.unsqueeze(1) * shape.page_size + offsets).flatten()[:end]
        keys, values = (
            raw(plane).index_select(0, slots).view(plane.dtype).double()
            for plane in (pool.k, pool.v)
        )
        for first in range(0, extend, _QUERY_BLOCK):
            count = min(_QUERY_BLOCK, extend - first)
            rows = slice(row + first, row + first + count)
            exact = _attend64(batch.layer, batch.queries[rows], keys, values, prefix + first)
            found = out[rows].double() / batch.layer.v_scale
            distance = (found - exact).abs() / (1.0 + exact.abs())
            worst = max(worst, float(distance.max()))
        row += extend
    return worst


def _attend64(
    layer: RadixAttention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int
) -> torch.Tensor:
    """Queries [M, H, D] at positions from `start` over float64 keys [N, G, D]: [M, H, D]."""
    count = len(q)
    groups = layer.num_kv_heads
    heads = q.double().view(count, groups, -1, layer.head_dim)
    scores = torch.einsum("mgjd,ngd->gjmn", heads, k) * layer.scaling
    if layer.logit_cap > 0.0:
        scores = torch.tanh(scores / layer.logit_cap) * layer.logit_cap
    at = torch.arange(start, start + count, device=q.device).unsqueeze(1)
    key_at = torch.arange(len(k), device=q.device)
    visible = key_at <= at
    if layer.sliding_window is not None:
        visible &= key_at > at - layer.sliding_window
    if layer.attention_chunk is not None:
        visible &= key_at >= at - at % layer.attention_chunk
    scores = scores.masked_fill(~visible, float("-inf"))
    if layer.sinks is not None:
        sink = layer.sinks.double().view(groups, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return torch.einsum("gjmn,ngd->mgjd", weights, v).reshape(q.shape)

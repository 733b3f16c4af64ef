"""The reference attention backend: torch's fused CPU kernel on views of the KV pool.

K and V are read in place wherever a request's slots are contiguous; scattered pages are gathered
into a buffer of a few MiB; parts merge in float32. A plan per step, made when the first layer of a
shape asks for it. Never writes K or V. Every other backend is tested against this one.

Of latent attention, where values are the first numbers of keys, the keys are the values too and
what is more of the results is cut off: K is gathered once, and the fused kernel serves it.

Memory of a call is bounded whatever the context: queries in blocks, keys in pieces, one gather
buffer that is kept, at most a few unmerged outputs.

Legend: R query rows, H query heads, G kv heads, J = H / G, D head dim, E value dim, S slots.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, cast

import torch

from sglang.srt.layers.attention.base_attn_backend import AttentionBackend, AttentionLayer
from sglang.srt.layers.attention.merge import (
    Partial,
    PartialSum,
    apply_sinks,
    band_mask,
    flash_attention,
    partial_attention,
)
from sglang.srt.layers.attention.torch_native_plan import (
    LayerPlan,
    Piece,
    PieceLimits,
    PlanKey,
    QueryBatch,
    SlotRun,
    Visibility,
    WorkItem,
    make_layer_plan,
)
from sglang.srt.mem_cache.kv_layout import DTYPE_BYTES, MAX_SLOTS, KVCacheSpec
from sglang.srt.mem_cache.segment_backing.segment_plane import SegmentPlane, raw, widen
from sglang.srt.model_executor.forward_batch_info import BatchGeometry, ForwardBatch


@dataclass(frozen=True, slots=True)
class TorchNativeTuning:
    """Sizes that trade speed for memory; results do not depend on them beyond rounding.

    `query_block`: queries per work item. `min_run_bytes`: K bytes (one layer) below which a slot
    run is gathered with its neighbours instead of getting a kernel call of its own; a call and its
    merge cost about as much as gathering this much (benchmark/bench_attention_gather.py).
    `gather_bytes`: bound of one gather, K and V each (causal and band pieces: two query blocks).
    `piece_work`: multiply-adds of one kernel call, about half a second on two cores, so that
    progress shows. `dense_bytes`: bound of the score matrix, and of K in float32, for layers that
    the fused kernel cannot serve (soft cap, E != D). `batch_row_bytes`: K bytes of a token (one
    layer) up to which single queries are computed together, 0 for never: with narrow heads the
    saved calls outweigh the gathering (benchmark/bench_attention_decode.py).
    """

    query_block: int = 1024
    min_run_bytes: int = 512 << 10
    gather_bytes: int = 4 << 20
    piece_work: int = 1 << 34
    dense_bytes: int = 64 << 20
    batch_row_bytes: int = 1024


@dataclass(frozen=True, slots=True)
class TorchNativePlan:
    """A step's lengths and tables, and the layer plans made from them so far."""

    geometry: BatchGeometry
    layers: dict[PlanKey, LayerPlan] = field(default_factory=dict)


class Output(NamedTuple):
    """Where results go: `values` [R, H, E] and, where somebody asks, `lse` float32 [R, H]."""

    values: torch.Tensor
    lse: torch.Tensor | None

    @classmethod
    def of_layer(cls, layer: AttentionLayer, rows: int, width: int, dtype: torch.dtype) -> Output:
        """Unwritten; what sinks will scale is float32 so that it is rounded once."""
        shape = (rows, layer.num_heads, width)
        if layer.sinks is None:
            return cls(torch.empty(shape, dtype=dtype), None)
        return cls(torch.empty(shape), torch.empty(shape[:2]))

    def put(self, rows: torch.Tensor, parts: Sequence[Partial]) -> None:
        """Store parts of [n, ...] rows, in the order of heads, one after another at rows int64."""
        values = torch.cat([part[0] for part in parts]).reshape(-1, *self.values.shape[1:])
        self.values.index_copy_(0, rows, values.to(self.values.dtype))
        if self.lse is not None:
            lse = torch.cat([part[1] for part in parts]).reshape(-1, self.lse.shape[1])
            self.lse.index_copy_(0, rows, lse)

    def put_block(self, first: int, values: torch.Tensor, lse: torch.Tensor) -> None:
        """Store values [G, M, J, E] and lse [G, M, J] at rows [first, first + M)."""
        groups, num_rows, per_group = lse.shape
        block = self.values.narrow(0, first, num_rows)
        block.view(num_rows, groups, per_group, -1).permute(1, 0, 2, 3).copy_(values)
        if self.lse is not None:
            sums = self.lse.narrow(0, first, num_rows).view(num_rows, groups, per_group)
            sums.transpose(0, 1).copy_(lse)


class TorchNativeAttnBackend(AttentionBackend):
    """Attention on a CPU through torch alone; bf16, fp16, fp32, fp8 and int8 K and V.

    What takes a byte is widened to the type of the queries as it is read, so many rows at a time as
    a gather has.
    """

    name: ClassVar[str] = "torch_native"
    preferred_page_size: ClassVar[int] = 64

    def __init__(self, spec: KVCacheSpec, tuning: TorchNativeTuning | None = None) -> None:
        super().__init__(spec)
        self._is_byte = DTYPE_BYTES[spec.dtype] == 1
        self._tuning = tuning or TorchNativeTuning()
        # Gather buffers of K and V, grown to what was needed; used within one piece only.
        self._scratch: dict[str, torch.Tensor] = {}
        self._masks: dict[tuple[int, int], torch.Tensor] = {}  # (window, query block) -> band

    def plan(self, geometry: BatchGeometry) -> TorchNativePlan:
        """Hold the geometry; layer plans follow when layers of new shapes ask."""
        return TorchNativePlan(geometry)

    def forward(
        self,
        q: torch.Tensor,
        layer: AttentionLayer,
        forward_batch: ForwardBatch,
        *,
        rows_pruned: bool,
    ) -> torch.Tensor:
        """See `AttentionBackend.forward`. Scores are in the KV dtype, over bytes in that of q."""
        dtype = self._dtype_of(q, layer, forward_batch)
        out = Output.of_layer(layer, q.shape[0], self._value_width(layer), dtype)
        self._attend(q, layer, forward_batch, rows_pruned, out)
        if layer.sinks is not None and out.lse is not None:
            apply_sinks(out.values, out.lse, layer.sinks)
        forward_batch.progress.tick()
        return out.values[..., : layer.v_head_dim].flatten(1).to(q.dtype)

    def attend_part(
        self,
        q: torch.Tensor,
        layer: AttentionLayer,
        forward_batch: ForwardBatch,
        *,
        rows_pruned: bool,
    ) -> Partial:
        """Attention over the keys that this rank holds, before sinks; `forward` for the rest.

        Output [R, H, E] and log-sum-exp [R, H], both float32; 0 and -inf where a row sees none of
        these keys. The step's tables of the layer's group are `OwnPages`.
        """
        shape = (q.shape[0], layer.num_heads, self._value_width(layer))
        out = Output(torch.zeros(shape), torch.full(shape[:2], float("-inf")))
        self._attend(q, layer, forward_batch, rows_pruned, out)
        return out.values[..., : layer.v_head_dim], cast(torch.Tensor, out.lse)

    def _value_width(self, layer: AttentionLayer) -> int:
        """Numbers of a head that are summed up: E, or D where values stand in keys."""
        return layer.head_dim if self.spec.values_in_keys else layer.v_head_dim

    def _dtype_of(
        self, q: torch.Tensor, layer: AttentionLayer, forward_batch: ForwardBatch
    ) -> torch.dtype:
        """What scores are computed in."""
        pool = forward_batch.token_to_kv_pool
        kv_dtype: torch.dtype = pool.get_key_buffer(layer.layer_id).dtype
        return q.dtype if self._is_byte else kv_dtype

    def _attend(
        self,
        q: torch.Tensor,
        layer: AttentionLayer,
        forward_batch: ForwardBatch,
        pruned: bool,
        out: Output,
    ) -> None:
        pool = forward_batch.token_to_kv_pool
        k: torch.Tensor = pool.get_key_buffer(layer.layer_id)
        v = k if self.spec.values_in_keys else pool.get_value_buffer(layer.layer_id)
        plan: TorchNativePlan = forward_batch.attn_plan
        work = self._layer_plan(plan, layer, pruned)
        rows, groups = q.shape[0], layer.num_kv_heads
        per_group = layer.num_heads // groups
        heads = q.to(self._dtype_of(q, layer, forward_batch))
        heads = heads.view(rows, groups, per_group, layer.head_dim)
        for batch in work.batches:
            self._attend_batch(heads, layer, batch, k, v, out)
        if work.singles:
            self._attend_singles(heads, layer, work, k, v, out)
        for item in work.items:
            queries = heads.narrow(0, item.row, item.num_rows)
            out.put_block(item.row, *self._attend_item(queries, layer, item, forward_batch, k, v))

    def _layer_plan(self, plan: TorchNativePlan, layer: AttentionLayer, pruned: bool) -> LayerPlan:
        limits = self._limits(layer)
        window, chunk = layer.sliding_window, layer.attention_chunk
        key = PlanKey(self.group_of_layer[layer.layer_id], window, pruned, limits, chunk)
        if key not in plan.layers:
            plan.layers[key] = make_layer_plan(plan.geometry, key)
        return plan.layers[key]

    def _limits(self, layer: AttentionLayer) -> PieceLimits:
        tuning, heads = self._tuning, layer.num_heads
        k_bytes = layer.num_kv_heads * layer.head_dim * DTYPE_BYTES[self.spec.dtype]
        width = self._value_width(layer)
        widest = layer.num_kv_heads * max(layer.head_dim, width)
        # A byte counts as what it may be widened to, and is not read in place.
        row_bytes = widest * (4 if self._is_byte else DTYPE_BYTES[self.spec.dtype])
        gather_tokens = tuning.gather_bytes // row_bytes
        query_block, max_keys = tuning.query_block, gather_tokens if self._is_byte else MAX_SLOTS
        # A batch of fewer than four queries saves little.
        batch_tokens = gather_tokens // 4 if k_bytes <= tuning.batch_row_bytes else 0
        pair_budget = tuning.piece_work // (heads * (layer.head_dim + width))
        if self._needs_dense(layer):
            max_keys, batch_tokens = min(max_keys, tuning.dense_bytes // (4 * widest)), 0
            pair_budget = min(pair_budget, tuning.dense_bytes // (4 * heads))
            # Causal and band pieces have up to two keys a query.
            query_block = max(1, min(query_block, math.isqrt(pair_budget // 2)))
        return PieceLimits(
            query_block=query_block,
            min_run_tokens=tuning.min_run_bytes // k_bytes,
            gather_tokens=gather_tokens,
            max_keys=max_keys,
            pair_budget=pair_budget,
            batch_tokens=batch_tokens,
        )

    def _attend_batch(
        self,
        heads: torch.Tensor,
        layer: AttentionLayer,
        batch: QueryBatch,
        k: torch.Tensor,
        v: torch.Tensor,
        out: Output,
    ) -> None:
        """Single queries of similar length in one kernel call over gathered pages."""
        queries = heads[batch.rows]
        planes: list[torch.Tensor] = []
        for plane, which in ((k, "k"), (v, "v"))[: 1 if v is k else 2]:
            gathered = widen(self._gather(plane, batch.pages, which), heads.dtype)
            gathered.index_fill_(0, batch.padding, 0.0)
            planes.append(gathered.view(len(queries), -1, *gathered.shape[1:]).transpose(1, 2))
        mask = batch.mask.expand(-1, -1, queries.shape[2], -1)
        part = flash_attention(queries, planes[0], planes[-1], layer.scaling, mask=mask)
        out.put(batch.rows, [part])

    def _attend_singles(
        self,
        heads: torch.Tensor,
        layer: AttentionLayer,
        work: LayerPlan,
        k: torch.Tensor,
        v: torch.Tensor,
        out: Output,
    ) -> None:
        """One query against one slot run each, with as little Python as possible."""
        if self._needs_dense(layer) or k.dtype is torch.int8:
            for row, first, count in work.singles:
                keys, values = (widen(x.narrow(0, first, count), heads.dtype) for x in (k, v))
                part = partial_attention(
                    heads[row : row + 1],
                    keys,
                    values,
                    layer.scaling,
                    logit_cap=layer.logit_cap,
                )
                out.put_block(row, *part)
            return
        groups, dim = layer.num_kv_heads, layer.head_dim
        k_slot, k_head, _ = k.stride()
        v_slot, v_head, _ = v.stride()
        k_base, v_base = k.storage_offset(), v.storage_offset()
        k_strides, v_strides = (0, k_head, k_slot, 1), (0, v_head, v_slot, 1)
        scale, results = layer.scaling, []
        queries = heads.unsqueeze(1)
        for row, first, count in work.singles:
            shape = (1, groups, count, dim)
            keys = k.as_strided(shape, k_strides, k_base + first * k_slot).to(heads.dtype)
            values = v.as_strided(shape, v_strides, v_base + first * v_slot).to(heads.dtype)
            results.append(flash_attention(queries[row], keys, values, scale))
        out.put(work.single_rows, results)

    def _attend_item(
        self,
        heads: torch.Tensor,
        layer: AttentionLayer,
        item: WorkItem,
        forward_batch: ForwardBatch,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> Partial:
        """Attention of the item's queries [M, G, J, D] over all its pieces: [G, M, J, E], lse."""
        total = PartialSum()
        for piece in item.pieces:
            keys = widen(self._keys(k, piece, "k"), heads.dtype)
            values = keys if v is k else widen(self._keys(v, piece, "v"), heads.dtype)
            total.add(
                partial_attention(
                    heads,
                    keys,
                    values,
                    layer.scaling,
                    causal=piece.visibility is Visibility.CAUSAL,
                    mask=self._mask(layer, item, piece),
                    logit_cap=layer.logit_cap,
                )
            )
            forward_batch.progress.tick()
        return total.result()

    def _keys(self, plane: torch.Tensor, piece: Piece, which: str) -> torch.Tensor:
        """The piece's rows [N, G, D] of a plane [S, G, D]: a view, or gathered into scratch.

        A gathered answer is valid until the next one of the same plane kind.
        """
        keys = piece.keys
        if isinstance(keys, SlotRun):
            return plane.narrow(0, keys.first_slot, keys.num_tokens)
        return self._gather(plane, keys.pages, which).narrow(0, keys.skip, keys.num_tokens)

    def _gather(self, plane: torch.Tensor, pages: torch.Tensor, which: str) -> torch.Tensor:
        """All rows of `pages` int64 [P], one after another: [P * page_size, G, D] of scratch."""
        target = self._gather_target(plane, len(pages), which)
        paged = raw(plane).view(-1, self.spec.page_size, *plane.shape[1:])
        torch.index_select(paged, 0, pages, out=raw(target))
        return target.view(-1, *plane.shape[1:])

    def _gather_target(
        self, plane: torch.Tensor | SegmentPlane, num_pages: int, which: str
    ) -> torch.Tensor:
        """Scratch for pages of a plane: [P, page_size, G, D]."""
        shape = (num_pages, self.spec.page_size, *plane.shape[1:])
        wanted = math.prod(shape)
        scratch = self._scratch.get(which)
        if scratch is None or scratch.numel() < wanted or scratch.dtype != plane.dtype:
            scratch = torch.empty(wanted, dtype=plane.dtype, device=plane.device)
            self._scratch[which] = scratch
        return scratch[:wanted].view(shape)

    def _mask(self, layer: AttentionLayer, item: WorkItem, piece: Piece) -> torch.Tensor | None:
        """The piece's band: a corner of one mask per window, kept for good.

        That mask's first key is the first that its first query sees. Keys of a piece begin there
        too, or at position 0 when that comes later.
        """
        if piece.mask is not None:
            return piece.mask
        window = layer.sliding_window
        if piece.visibility is not Visibility.BAND or window is None:
            return None
        block = self._limits(layer).query_block
        if (window, block) not in self._masks:
            num_keys = block + min(window, block) - 1
            device = torch.device("cpu")
            self._masks[window, block] = band_mask(block, num_keys, window - 1, window, device)
        skipped = piece.position - (item.position - window + 1)
        num_keys = piece.keys.num_tokens
        return self._masks[window, block][: item.num_rows, skipped : skipped + num_keys]

    def _needs_dense(self, layer: AttentionLayer) -> bool:
        """True when the fused kernel cannot compute the layer."""
        return self._value_width(layer) != layer.head_dim or layer.logit_cap > 0.0

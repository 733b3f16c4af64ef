"""Attention through the native kernels of sgl-kernel, straight on the KV pool and block tables.

The batch is said once a step in arrays; a layer costs one call. What the kernels do not serve (a
segment table, V heads of another width that are no parts of K's) is left to torch_native, which
this extends, and so are steps with prompts where the kernels have none for them (torch's fused one
is the faster one there).

Legend: R query rows, H query heads, D head dim, S slots.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import numpy as np
import torch

from sglang.srt.layers.attention.base_attn_backend import AttentionLayer
from sglang.srt.layers.attention.merge import Partial
from sglang.srt.layers.attention.own_pages import OwnPages
from sglang.srt.layers.attention.torch_native_backend import (
    TorchNativeAttnBackend,
    TorchNativePlan,
    TorchNativeTuning,
)
from sglang.srt.mem_cache.kv_layout import KVCacheSpec
from sglang.srt.mem_cache.segment_backing.base import KV_TORCH_DTYPES
from sglang.srt.model_executor.forward_batch_info import (
    BatchGeometry,
    BlockTableView,
    ForwardBatch,
    Int64Array,
)
from sglang.srt.utils.native import native_kernels

logger = logging.getLogger(__name__)

# Queries times keys of one kernel call, so that progress shows in long prefills.
_PAIRS_PER_CALL = 1 << 31


def has_native_kernels() -> bool:
    """True when `CpuAttnBackend` can be made."""
    return native_kernels() is not None


@dataclass(frozen=True, slots=True)
class CpuPlan(TorchNativePlan):
    """The step's tables by group and query blocks by whether rows are pruned, made when asked."""

    tables: dict[int, Any] = field(default_factory=dict)
    blocks: dict[bool, list[Any]] = field(default_factory=dict)
    has_prompts: bool = False
    is_decode: bool = False  # a query for each request, whose logits are wanted
    own_blocks: dict[tuple[int, bool], Any] = field(default_factory=dict)  # by group and pruning
    # What the tables of a recorded step stand for, by group.
    views: dict[int, tuple[BlockTableView, ...]] = field(default_factory=dict)


class CpuAttnBackend(TorchNativeAttnBackend):
    """The native kernels where they serve the layer, torch_native for the rest."""

    name: ClassVar[str] = "cpu"
    preferred_page_size: ClassVar[int] = 64
    records_steps: ClassVar[bool] = True
    is_native: ClassVar[bool] = True

    def __init__(
        self,
        spec: KVCacheSpec,
        tuning: TorchNativeTuning | None = None,
        *,
        pairs_per_call: int = _PAIRS_PER_CALL,
    ) -> None:
        super().__init__(spec, tuning)
        kernels = native_kernels()
        if kernels is None:
            raise ValueError("attention backend cpu needs the package sgl-kernel")
        self._kernels = kernels
        self._pairs_per_call = pairs_per_call
        kv_dtype = KV_TORCH_DTYPES[spec.dtype]
        # What queries are computed in; None: as they come, over K and V of a byte.
        self._dtype = None if kv_dtype.itemsize == 1 else kv_dtype
        width = spec.head_dim if spec.values_in_keys else spec.v_head_dim
        self._serves = kernels.serves_attention(
            self._dtype or torch.float32, spec.head_dim, width, kv_dtype
        )
        if not self._serves:
            widths = f"heads of {spec.head_dim} and {spec.v_head_dim} over {spec.dtype}"
            logger.info("No native attention of %s; torch_native computes it.", widths)
        self._native_prompts = kernels.has_prompt_kernel()

    def plan(self, geometry: BatchGeometry) -> CpuPlan:
        """Hold the geometry; tables and blocks follow when layers of new shapes ask."""
        has_prompts = bool((geometry.extend_seq_lens > 1).any())
        all_wanted = len(geometry.logits_rows) == len(geometry.seq_lens)
        return CpuPlan(geometry, has_prompts=has_prompts, is_decode=all_wanted and not has_prompts)

    def forward(
        self,
        q: torch.Tensor,
        layer: AttentionLayer,
        forward_batch: ForwardBatch,
        *,
        rows_pruned: bool,
    ) -> torch.Tensor:
        """See `AttentionBackend.forward`. bf16 scores are products of bf16 summed in fp32."""
        plan: CpuPlan = forward_batch.attn_plan
        blocks = self._blocks(plan, rows_pruned)
        prompts = plan.has_prompts and any((part.counts > 1).any() for part in blocks)
        if not self._serves or (prompts and not self._native_prompts):
            return super().forward(q, layer, forward_batch, rows_pruned=rows_pruned)
        heads = q.to(self._dtype or q.dtype).view(-1, layer.num_heads, layer.head_dim)
        out: torch.Tensor | None = None
        for part in blocks:
            out = self._kernels.paged_attention(
                heads,
                *self._planes(layer, forward_batch),
                self._tables(plan, self.group_of_layer[layer.layer_id]),
                part,
                out=out,
                scale=layer.scaling,
                window=layer.sliding_window,
                chunk=layer.attention_chunk,
                logit_cap=layer.logit_cap,
                sinks=self._sinks(layer),
                num_threads=torch.get_num_threads(),
            )
            forward_batch.progress.tick()
        forward_batch.progress.tick()
        if out is None:
            return q.new_empty(0, layer.num_heads * layer.v_head_dim)
        return self._values(out, layer).flatten(1).to(q.dtype)

    def attend_part(
        self,
        q: torch.Tensor,
        layer: AttentionLayer,
        forward_batch: ForwardBatch,
        *,
        rows_pruned: bool,
    ) -> Partial:
        """See `TorchNativeAttnBackend.attend_part`. Single queries go to the native kernels.

        To these a table of `OwnPages` is a shorter request. Blocks of a prompt's queries see keys
        by a mask, which the kernels don't know.
        """
        plan: CpuPlan = forward_batch.attn_plan
        few = rows_pruned and q.shape[0] <= len(plan.geometry.seq_lens)
        if not self._serves or (plan.has_prompts and not few):
            return super().attend_part(q, layer, forward_batch, rows_pruned=rows_pruned)
        group = self.group_of_layer[layer.layer_id]
        heads = q.to(self._dtype or q.dtype).view(-1, layer.num_heads, layer.head_dim)
        out = torch.zeros_like(heads)
        lse = torch.full(heads.shape[:2], float("-inf"))
        self._kernels.paged_attention(
            heads,
            *self._planes(layer, forward_batch),
            self._tables(plan, group),
            self._own_blocks(plan, group, rows_pruned),
            out=out,
            lse=lse,
            scale=layer.scaling,
            logit_cap=layer.logit_cap,
            num_threads=torch.get_num_threads(),
        )
        return self._values(out, layer).float(), lse

    def _planes(
        self, layer: AttentionLayer, forward_batch: ForwardBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the layer; K twice where values are the first numbers of keys."""
        pool = forward_batch.token_to_kv_pool
        k: torch.Tensor = pool.get_key_buffer(layer.layer_id)
        return k, k if self.spec.values_in_keys else pool.get_value_buffer(layer.layer_id)

    def _values(self, out: torch.Tensor, layer: AttentionLayer) -> torch.Tensor:
        """Results [R, H, E] of a call; where K was V, E of what it gave are values."""
        return out[..., : layer.v_head_dim] if self.spec.values_in_keys else out

    def _own_blocks(self, plan: CpuPlan, group: int, pruned: bool) -> Any:
        """Single queries as the last tokens of what this rank holds of their requests."""
        if (group, pruned) not in plan.own_blocks:
            rows, counts, positions, requests = _query_rows(plan.geometry, pruned)
            tables = plan.geometry.block_tables[group]
            places = [
                cast(OwnPages, tables[request]).num_before(position + 1)
                for request, position in zip(requests.tolist(), positions.tolist(), strict=True)
            ]
            last = np.array(places, np.int64) - 1
            seen = (last >= 0) & (counts > 0)
            spans = (rows[seen], counts[seen], last[seen], requests[seen])
            plan.own_blocks[group, pruned] = self._kernels.QueryBlocks(*spans)
        return plan.own_blocks[group, pruned]

    def _sinks(self, layer: AttentionLayer) -> torch.Tensor | None:
        if layer.sinks is None or layer.sinks.dtype is torch.float32:
            return layer.sinks
        wide: torch.Tensor = self._kernels.widen(layer.sinks.view(1, -1))
        return wide.view(-1)

    def may_record(self, geometry: BatchGeometry) -> bool:
        """All queries in one call, and no prompts where they have no kernel.

        See `AttentionBackend`.
        """
        if not self._serves:
            return False
        if int(geometry.extend_seq_lens.max(initial=1)) == 1:
            return int(geometry.seq_lens.sum()) <= self._pairs_per_call
        pairs = int((geometry.extend_seq_lens * geometry.seq_lens).sum())
        return self._native_prompts and pairs <= self._pairs_per_call

    def renew(self, plan: CpuPlan, geometry: BatchGeometry) -> None:
        """See `AttentionBackend.renew`."""
        for pruned, blocks in plan.blocks.items():
            for part in blocks:
                if plan.is_decode:
                    part.positions[:] = geometry.extend_prefix_lens
                    continue
                arrays = (part.rows, part.counts, part.positions, part.requests)
                for array, new in zip(arrays, _query_rows(geometry, pruned), strict=True):
                    array[:] = new
        for group, tables in plan.tables.items():
            views = geometry.block_tables[group]
            # Of the same tables only positions are checked again, so not where counts change, too.
            if plan.views.get(group) is views and plan.is_decode:
                tables.check_again()
                continue
            tables.renew([view.page_ids for view in views], [view.first_position for view in views])
            plan.views[group] = views

    def _tables(self, plan: CpuPlan, group: int) -> Any:
        if group not in plan.tables:
            views = plan.geometry.block_tables[group]
            plan.tables[group] = self._kernels.AttentionTables(
                [view.page_ids for view in views],
                [view.first_position for view in views],
                plan.geometry.page_size,
            )
        return plan.tables[group]

    def _blocks(self, plan: CpuPlan, pruned: bool) -> list[Any]:
        if pruned not in plan.blocks:
            plan.blocks[pruned] = self._make_blocks(plan.geometry, pruned)
        return plan.blocks[pruned]

    def _make_blocks(self, geometry: BatchGeometry, pruned: bool) -> list[Any]:
        """The step's queries in calls of bounded work: each row in exactly one block."""
        rows, counts, positions, requests = _query_rows(geometry, pruned)
        used = counts > 0
        rows, counts, positions = rows[used], counts[used], positions[used]
        requests = requests[used]
        if not len(rows):
            return []
        ends = positions + counts
        if (counts * ends).sum() <= self._pairs_per_call:
            return [self._kernels.QueryBlocks(rows, counts, positions, requests)]
        parts = []
        for row, count, position, request in zip(rows, counts, positions, requests, strict=True):
            step = max(64, self._pairs_per_call // int(position + count) // 64 * 64)
            for at in range(0, int(count), step):
                size = min(step, int(count) - at)
                spans = ([row + at], [size], [position + at], [request])
                parts.append(self._kernels.QueryBlocks(*(np.array(x) for x in spans)))
        return parts


def _query_rows(
    geometry: BatchGeometry, pruned: bool
) -> tuple[Int64Array, Int64Array, Int64Array, Int64Array]:
    """First row of q, rows, position of the first and request of each run of queries."""
    requests = np.arange(len(geometry.seq_lens))
    rows, counts = geometry.q_starts, geometry.extend_seq_lens
    positions = geometry.extend_prefix_lens
    if pruned:
        wanted = geometry.logits_rows
        requests = np.searchsorted(rows, wanted, side="right") - 1
        positions = positions[requests] + wanted - rows[requests]
        rows, counts = np.arange(len(wanted)), np.ones(len(wanted), np.int64)
    return rows, counts, positions, requests

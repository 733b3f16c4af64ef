"""Sparse attention: an indexer's keys choose the tokens that a query attends to.

What is common to all devices: a step is divided into rows that see all tokens before them, which
another backend (`dense`) computes, and rows that see chosen ones; index keys are stored. Layers
with an indexer let it choose; the layers behind them without one see what it chose. Where no row of
a step has more than `topk` tokens nothing is scored and the step is the dense backend's. See
docs/kv_segments.md, Note [Sparse attention].

Legend: R rows of q, T packed new tokens, H query heads, E value dim, X numbers of an index key.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch

from sglang.srt.layers.attention.base_attn_backend import AttentionBackend, AttentionLayer
from sglang.srt.layers.attention.sparse_plan import (
    ChosenRows,
    DensePart,
    RowSplit,
    SparsePlan,
    shortened,
    split_rows,
)
from sglang.srt.layers.attention.token_choice import IndexQuery
from sglang.srt.layers.scaled import scaled
from sglang.srt.model_executor.forward_batch_info import BatchGeometry, ForwardBatch
from sglang.srt.utils.device import upload


class SparseAttnBackend(AttentionBackend):
    """Queries at positions from `topk` on see the `topk` tokens that were chosen for them."""

    name: ClassVar[str] = "sparse"

    def __init__(self, dense: AttentionBackend, topk: int) -> None:
        super().__init__(dense.spec)
        self._dense, self._topk = dense, topk

    @abstractmethod
    def choose(
        self,
        query: IndexQuery,
        layer: AttentionLayer,
        forward_batch: ForwardBatch,
        *,
        rows_pruned: bool,
    ) -> None:
        """Choose the tokens of every row of q that has more than `topk`, from `query` of all rows.

        Index keys of all positions already lie in the pool. Side effect: this layer, and those
        behind it until one chooses anew, see these tokens. Ticks `forward_batch.progress`.
        """

    @abstractmethod
    def attend_chosen(
        self,
        q: torch.Tensor,
        layer: AttentionLayer,
        forward_batch: ForwardBatch,
        rows: ChosenRows,
        pruned: bool,
    ) -> torch.Tensor:
        """Attention of q [n, H, D], which are `rows`, over what was chosen for them: [n, H * E].

        Raises InvariantError before anything was chosen.
        """

    def plan(self, geometry: BatchGeometry) -> SparsePlan:
        """The dense backend's plan; none where some request has more than `topk` tokens."""
        longest = int(geometry.seq_lens.max(initial=0))
        whole = None if longest > self._topk else self._dense.plan(geometry)
        return SparsePlan(geometry, whole)

    def store(
        self, k: torch.Tensor, v: torch.Tensor, layer: AttentionLayer, forward_batch: ForwardBatch
    ) -> None:
        """See `AttentionBackend.store`."""
        self._dense.store(k, v, layer, forward_batch)

    def store_index(
        self, keys: torch.Tensor, layer: AttentionLayer, forward_batch: ForwardBatch
    ) -> None:
        """Keep the new tokens' index keys [T, X] in the slots that the batch names."""
        loc = forward_batch.out_cache_loc[self.group_of_layer[layer.layer_id]]
        forward_batch.token_to_kv_pool.index_planes.store(layer.layer_id, loc, keys)

    def chooses(self, forward_batch: ForwardBatch, *, rows_pruned: bool) -> bool:
        """Whether some row of q sees chosen tokens, so that `choose` is to be called."""
        plan: SparsePlan = forward_batch.attn_plan
        return plan.whole is None and len(self.split(plan, rows_pruned).chosen.rows) > 0

    def forward(
        self,
        q: torch.Tensor,
        layer: AttentionLayer,
        forward_batch: ForwardBatch,
        *,
        rows_pruned: bool,
    ) -> torch.Tensor:
        """See `AttentionBackend.forward`; rows from position `topk` on see what was chosen last."""
        plan: SparsePlan = forward_batch.attn_plan
        if plan.whole is not None:
            part = DensePart(plan.geometry, plan.whole)
            return self._attend_dense(q, layer, forward_batch, part, rows_pruned)
        split = self.split(plan, rows_pruned)
        if not len(split.chosen.rows):
            if not len(split.dense_rows):
                return q.new_empty(0, layer.num_heads * layer.v_head_dim)
            return self._attend_dense(q, layer, forward_batch, self._part(plan), rows_pruned)
        if not len(split.dense_rows):
            return self.attend_chosen(q, layer, forward_batch, split.chosen, rows_pruned)
        chosen, before = self._row_numbers(plan, split, rows_pruned, q.device)
        some = q.index_select(0, chosen)
        seen = self.attend_chosen(some, layer, forward_batch, split.chosen, rows_pruned)
        some = q.index_select(0, before)
        whole = self._attend_dense(some, layer, forward_batch, self._part(plan), rows_pruned)
        out = q.new_empty(len(q), seen.shape[1])
        return out.index_copy_(0, chosen, seen).index_copy_(0, before, whole)

    def split(self, plan: SparsePlan, pruned: bool) -> RowSplit:
        """How the rows of q divide."""
        if pruned not in plan.splits:
            plan.splits[pruned] = split_rows(plan.geometry, self._topk, pruned)
        return plan.splits[pruned]

    def _part(self, plan: SparsePlan) -> DensePart:
        """What `dense` computes of a step that it doesn't compute whole."""
        if plan.dense is None:
            geometry = shortened(plan.geometry, self._topk)
            plan.dense = DensePart(geometry, self._dense.plan(geometry))
        return plan.dense

    def _row_numbers(
        self, plan: SparsePlan, split: RowSplit, pruned: bool, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of q that see chosen tokens and the others, int64, where q is."""
        if pruned not in plan.row_numbers:
            here = [torch.from_numpy(rows) for rows in (split.chosen.rows, split.dense_rows)]
            chosen, before = here if device.type == "cpu" else upload(here, device)
            plan.row_numbers[pruned] = chosen, before
        return plan.row_numbers[pruned]

    def _attend_dense(
        self,
        q: torch.Tensor,
        layer: AttentionLayer,
        forward_batch: ForwardBatch,
        part: DensePart,
        pruned: bool,
    ) -> torch.Tensor:
        batch = replace(forward_batch, geometry=part.geometry, attn_plan=part.plan)
        out = self._dense.forward(q, layer, batch, rows_pruned=pruned)
        if self._dense.scales_values and layer.v_scale != 1.0:
            out = scaled(out, 1.0 / layer.v_scale)  # the layer multiplies all rows
        return out


def request_runs(chosen: ChosenRows) -> Iterator[tuple[int, int, int]]:
    """(request, first, end) of the rows of each request, which stand together."""
    borders = np.flatnonzero(np.diff(chosen.requests)) + 1
    for first, last in zip([0, *borders], [*borders, len(chosen.rows)], strict=True):
        yield int(chosen.requests[first]), int(first), int(last)

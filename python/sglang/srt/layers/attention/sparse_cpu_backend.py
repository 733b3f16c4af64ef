"""Sparse attention on a CPU: index keys scored in blocks, tokens read where they lie.

A row that sees chosen tokens is a request of its own to another backend (`tokens`), over pages of
one token: native kernels and torch's read contiguous memory and segment tables alike, nothing is
gathered that they would not gather. See docs/kv_segments.md, Note [Sparse attention].

Legend: M queries, N keys, H query heads, D head dim, X numbers of an index key.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch

from sglang.srt.errors import InvariantError
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend, AttentionLayer
from sglang.srt.layers.attention.sparse_backend import SparseAttnBackend, request_runs
from sglang.srt.layers.attention.sparse_plan import (
    Choice,
    ChosenRows,
    KeyTable,
    SparsePlan,
    token_geometry,
)
from sglang.srt.layers.attention.token_choice import BestTokens, IndexQuery, index_scores
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.mem_cache.segment_backing.segment_plane import SegmentPlane, raw
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, Int32Array, Int64Array

# Fewer keys than these in a block of several queries, and its calls cost more than its products.
_LEAST_KEYS = 1024


@dataclass(frozen=True, slots=True)
class ScoreLimits:
    """Bounds of scoring: `score_bytes` of float32 products of queries, index heads and keys at a
    time, whatever the context.

    What fits in a core's own cache is fastest: scoring 32k keys for one query took 330 us per 1,024
    of them in blocks of 1 to 4 MiB, and 445 in one of 8 MiB.
    """

    score_bytes: int = 2 << 20

    def block(self, heads: int, topk: int, num_queries: int) -> tuple[int, int]:
        """(queries, keys) of a block; a query with `topk` keys is the least."""
        rows = self.score_bytes // (4 * heads * max(topk, _LEAST_KEYS))
        rows = max(1, min(num_queries, rows))
        return rows, max(topk, self.score_bytes // (4 * heads * rows))


class SparseCpuBackend(SparseAttnBackend):
    """`tokens` is of the kind of `dense`, for pages of one token."""

    name: ClassVar[str] = "sparse_cpu"

    def __init__(
        self,
        dense: AttentionBackend,
        tokens: TorchNativeAttnBackend,
        topk: int,
        limits: ScoreLimits | None = None,
    ) -> None:
        super().__init__(dense, topk)
        self._tokens, self._limits = tokens, limits or ScoreLimits()

    def choose(
        self,
        query: IndexQuery,
        layer: AttentionLayer,
        forward_batch: ForwardBatch,
        *,
        rows_pruned: bool,
    ) -> None:
        """See `SparseAttnBackend.choose`."""
        plan: SparsePlan = forward_batch.attn_plan
        chosen = self.split(plan, rows_pruned).chosen
        plane = forward_batch.token_to_kv_pool.index_planes[layer.layer_id]
        group = self.group_of_layer[layer.layer_id]
        slots: list[Int32Array] = []
        for request, first, last in request_runs(chosen):
            step, num_keys = self._limits.block(query.heads.shape[1], self._topk, last - first)
            table = self._key_table(plan, group, request)
            for begin in range(first, last, step):
                rows = slice(begin, min(begin + step, last))
                part = query.rows(torch.from_numpy(chosen.rows[rows]))
                positions = chosen.positions[rows]
                best = self._best(part, positions, plane, table, num_keys)
                slots += self._chosen_slots(best, table, len(positions))
                forward_batch.progress.tick()
        plan.choice = Choice(chosen.packed, slots)
        plan.tokens.clear()

    def attend_chosen(
        self,
        q: torch.Tensor,
        layer: AttentionLayer,
        forward_batch: ForwardBatch,
        rows: ChosenRows,
        pruned: bool,
    ) -> torch.Tensor:
        """See `SparseAttnBackend.attend_chosen`."""
        plan: SparsePlan = forward_batch.attn_plan
        if plan.choice is None:
            raise InvariantError(f"layer {layer.layer_id} attends before any tokens were chosen")
        if pruned not in plan.tokens:
            geometry = token_geometry(plan.choice.of(rows.packed), self.spec.num_groups)
            plan.tokens[pruned] = geometry, self._tokens.plan(geometry)
        geometry, tokens = plan.tokens[pruned]
        batch = replace(forward_batch, geometry=geometry, attn_plan=tokens)
        return self._attend_tokens(q, layer, batch)

    def _attend_tokens(
        self, q: torch.Tensor, layer: AttentionLayer, batch: ForwardBatch
    ) -> torch.Tensor:
        return self._tokens.forward(q, layer, batch, rows_pruned=False)

    def _key_table(self, plan: SparsePlan, group: int, request: int) -> KeyTable:
        if request not in plan.key_tables:
            plan.key_tables[request] = KeyTable.of(plan.geometry.block_tables[group][request])
        return plan.key_tables[request]

    def _best(
        self,
        query: IndexQuery,
        positions: Int64Array,
        plane: torch.Tensor | SegmentPlane,
        table: KeyTable,
        num_keys: int,
    ) -> BestTokens:
        """The best places of a request's queries at `positions`, ascending, block by block."""
        best = BestTokens(self._topk)
        end = table.num_before(int(positions[-1]) + 1)
        for lo in range(0, end, num_keys):
            hi = min(lo + num_keys, end)
            scores = index_scores(query, read_keys(plane, table, lo, hi, self.spec.page_size))
            key_at = table.positions(lo, hi)
            if key_at[-1] > positions[0]:
                hidden = torch.from_numpy(key_at) > torch.from_numpy(positions).unsqueeze(1)
                scores.masked_fill_(hidden, float("-inf"))
            best.add(scores, lo)
        return best

    def _chosen_slots(
        self, best: BestTokens, table: KeyTable, num_queries: int
    ) -> list[Int32Array]:
        """The slots of each query's best tokens."""
        del num_queries
        assert best.places is not None
        return list(table.slots(best.places.numpy(), self.spec.page_size))


def read_keys(
    plane: torch.Tensor | SegmentPlane, table: KeyTable, lo: int, hi: int, page_size: int
) -> torch.Tensor:
    """Index keys of places [lo, hi) of a plane [S, 1, X], float32 [hi - lo, X]."""
    first = lo // page_size
    pages = table.page_ids[first : -(-hi // page_size)]
    skip, count = lo - first * page_size, hi - lo
    if isinstance(plane, SegmentPlane):
        shape = (len(pages), page_size, *plane.shape[1:])
        target = torch.empty(shape, dtype=plane.dtype, device=plane.device)
        plane.gather_pages(torch.from_numpy(pages.astype(np.int64)), target)
        rows = target.view(-1, plane.shape[2])
    elif (np.diff(pages) == 1).all():
        return plane.narrow(0, int(pages[0]) * page_size + skip, count).squeeze(1).float()
    else:
        paged = raw(plane).view(-1, page_size * plane.shape[2])
        some = paged.index_select(0, torch.from_numpy(pages.astype(np.int64)))
        rows = some.view(plane.dtype).view(-1, plane.shape[2])
    return rows.narrow(0, skip, count).float()

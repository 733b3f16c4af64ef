"""Sparse attention over KV that several ranks hold: what is chosen is chosen among all tokens.

Each rank scores the index keys that it holds and keeps its best; the ranks' bests, with their
positions, are gathered and the best of these chosen, the same on every rank. Each then attends to
those that it holds, and the parts merge. See docs/kv_segments.md, Notes [Sparse attention] and [KV
over ranks].

Legend: M queries, K tokens to choose, N ranks.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from sglang.srt.layers.attention.base_attn_backend import AttentionLayer
from sglang.srt.layers.attention.kv_parallel_backend import KVParallelAttnBackend
from sglang.srt.layers.attention.own_pages import OwnPages
from sglang.srt.layers.attention.sparse_cpu_backend import ScoreLimits, SparseCpuBackend
from sglang.srt.layers.attention.sparse_plan import KeyTable, SparsePlan
from sglang.srt.layers.attention.token_choice import BestTokens, merge_best
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, Int32Array

_NOWHERE = (1 << 31) - 1  # the position of what stands for no token


class KVParallelSparseBackend(SparseCpuBackend):
    """`dense` says whose the pages are and joins the ranks' parts.

    Choosing costs an all-gather of N x M x 2K numbers of 4 bytes for a block of queries, attention
    what it costs the dense backend.
    """

    name: ClassVar[str] = "kv_parallel_sparse"

    def __init__(
        self,
        dense: KVParallelAttnBackend,
        tokens: TorchNativeAttnBackend,
        topk: int,
        limits: ScoreLimits | None = None,
    ) -> None:
        super().__init__(dense, tokens, topk, limits)
        self._ranks = dense

    def _key_table(self, plan: SparsePlan, group: int, request: int) -> KeyTable:
        if request not in plan.key_tables:
            view = plan.geometry.block_tables[group][request]
            own = OwnPages(view, self._ranks.share, group, plan.geometry.page_size)
            plan.key_tables[request] = KeyTable.of(own)
        return plan.key_tables[request]

    def _chosen_slots(
        self, best: BestTokens, table: KeyTable, num_queries: int
    ) -> list[Int32Array]:
        """This rank's slots of each query's best tokens among all ranks'."""
        count = self._topk
        scores = torch.full((num_queries, count), float("-inf"))
        positions = torch.full((num_queries, count), _NOWHERE, dtype=torch.int32)
        width = 0
        if best.scores is not None and best.places is not None:
            width = best.scores.shape[1]
            scores[:, :width] = best.scores
            at = torch.from_numpy(table.positions(0, int(best.places.max()) + 1))
            positions[:, :width] = at[best.places].int()
        # Positions travel as the bits of a float32: one message, and nobody computes with them.
        packed = torch.cat((scores, positions.view(torch.float32)), -1).unsqueeze(0)
        parts = self._ranks.group.all_gather(packed, 0)
        everyone = parts.transpose(0, 1)  # [M, N, 2K]
        all_scores = everyone[..., :count].reshape(num_queries, -1)
        all_positions = everyone[..., count:].contiguous().view(torch.int32).view(num_queries, -1)
        chosen = merge_best(all_scores, all_positions, count).view(num_queries, -1, count)
        own = chosen[:, self._ranks.group.rank, :width]
        if best.places is None:
            return [table.page_ids[:0]] * num_queries
        size = self.spec.page_size
        return [
            table.slots(places[kept].numpy(), size)
            for places, kept in zip(best.places, own, strict=True)
        ]

    def _attend_tokens(
        self, q: torch.Tensor, layer: AttentionLayer, batch: ForwardBatch
    ) -> torch.Tensor:
        part = self._tokens.attend_part(q, layer, batch, rows_pruned=False)
        values, _ = self._ranks.join(part)
        return values.flatten(1).to(q.dtype)

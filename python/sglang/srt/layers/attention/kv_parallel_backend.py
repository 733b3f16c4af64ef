"""Attention over KV that several ranks hold: each attends to its own keys, the results merge.

Wraps the backend that computes a rank's part. The new tokens' queries are the same on all ranks of
a KV-parallel group; the parts (output and log-sum-exp, float32) are gathered once a layer and
merged in the order of ranks, so every rank has the same bits. Groups that are whole on each rank go
to the wrapped backend as they are. See docs/kv_segments.md, Note [KV over ranks].

Legend: R query rows, H query heads, D head dim, E value dim, N ranks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch

from sglang.srt.distributed.communicator import TensorCommunicator
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend, AttentionLayer
from sglang.srt.layers.attention.merge import Partial, apply_sinks, merge_partials
from sglang.srt.layers.attention.own_pages import OwnPages
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.mem_cache.kv_share import KVShare
from sglang.srt.model_executor.forward_batch_info import BatchGeometry, ForwardBatch


class KVParallelAttnBackend(AttentionBackend):
    """`inner` attends to the pages that `share` gives this rank, `group` joins the ranks' parts.

    A layer of a shared group costs one all-gather of N x R x H x (E + 1) float32.
    """

    name: ClassVar[str] = "kv_parallel"

    def __init__(
        self, inner: TorchNativeAttnBackend, share: KVShare, group: TensorCommunicator
    ) -> None:
        super().__init__(inner.spec)
        self._inner = inner
        self.share = share
        self.group = group

    def plan(self, geometry: BatchGeometry) -> Any:
        """The inner backend's plan, over this rank's pages where a group is shared."""
        size = geometry.page_size
        tables = tuple(
            tuple(OwnPages(view, self.share, group, size) for view in views)
            if self.share.is_shared(group)
            else views
            for group, views in enumerate(geometry.block_tables)
        )
        return self._inner.plan(replace(geometry, block_tables=tables))

    def forward(
        self,
        q: torch.Tensor,
        layer: AttentionLayer,
        forward_batch: ForwardBatch,
        *,
        rows_pruned: bool,
    ) -> torch.Tensor:
        """See `AttentionBackend.forward`. Raises RankLostError when another rank is gone."""
        if not self.share.is_shared(self.group_of_layer[layer.layer_id]):
            return self._inner.forward(q, layer, forward_batch, rows_pruned=rows_pruned)
        part = self._inner.attend_part(q, layer, forward_batch, rows_pruned=rows_pruned)
        values, lse = self.join(part)
        if layer.sinks is not None:  # once, after all keys
            apply_sinks(values, lse, layer.sinks)
        forward_batch.progress.tick()
        return values.flatten(1).to(q.dtype)

    def join(self, part: Partial) -> Partial:
        """All ranks' parts of the same rows as one, float32; the same bits on every rank."""
        values, lse = part
        if not len(lse):
            return part
        packed = torch.cat((values, lse.unsqueeze(-1)), -1).unsqueeze(0)
        parts = self.group.all_gather(packed, 0).unbind(0)
        return merge_partials([(one[..., :-1], one[..., -1]) for one in parts])

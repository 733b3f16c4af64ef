"""The reference backend over a segment table: the same plan, cut at segment borders.

A slot run ends where its segment does; what crosses a border or is scattered is gathered segment
by segment, and the parts merge as always. Everything else is `TorchNativeAttnBackend`, which knows
nothing of tables and pays nothing for them. See docs/kv_segments.md, Note [Segment table].

Legend: as in torch_native_backend.
"""

from __future__ import annotations

import torch

from sglang.srt.errors import InvariantError
from sglang.srt.layers.attention.base_attn_backend import AttentionLayer
from sglang.srt.layers.attention.merge import partial_attention
from sglang.srt.layers.attention.torch_native_backend import (
    Output,
    TorchNativeAttnBackend,
    TorchNativeTuning,
)
from sglang.srt.layers.attention.torch_native_plan import LayerPlan, PieceLimits
from sglang.srt.mem_cache.kv_layout import KVCacheSpec
from sglang.srt.mem_cache.segment_backing.segment_plane import SegmentPlane, widen


class SegmentTableAttnBackend(TorchNativeAttnBackend):
    """`segment_tokens[g]` are the slots of a segment of group g."""

    def __init__(
        self,
        spec: KVCacheSpec,
        segment_tokens: tuple[int, ...],
        tuning: TorchNativeTuning | None = None,
    ) -> None:
        super().__init__(spec, tuning)
        self._segment_tokens = segment_tokens

    def _limits(self, layer: AttentionLayer) -> PieceLimits:
        segment = self._segment_tokens[self.group_of_layer[layer.layer_id]]
        return super()._limits(layer)._replace(segment_tokens=segment)

    def _attend_singles(
        self,
        heads: torch.Tensor,
        layer: AttentionLayer,
        work: LayerPlan,
        k: torch.Tensor | SegmentPlane,
        v: torch.Tensor | SegmentPlane,
        out: Output,
    ) -> None:
        for row, first, count in work.singles:
            part = partial_attention(
                heads[row : row + 1],
                widen(k.narrow(0, first, count), heads.dtype),
                widen(v.narrow(0, first, count), heads.dtype),
                layer.scaling,
                logit_cap=layer.logit_cap,
            )
            out.put_block(row, *part)

    def _gather(
        self, plane: torch.Tensor | SegmentPlane, pages: torch.Tensor, which: str
    ) -> torch.Tensor:
        if not isinstance(plane, SegmentPlane):
            raise InvariantError("a segment table was expected, not a contiguous plane")
        target = self._gather_target(plane, len(pages), which)
        plane.gather_pages(pages, target)
        return target.view(-1, *plane.shape[1:])

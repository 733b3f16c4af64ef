"""The KV pool over a segment table, and which pool fits a backing.

Called when memory is set up; layers and backends then see an `MHATokenToKVPool`.

Shape letters: T packed new tokens, G kv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from sglang.srt.errors import InvariantError
from sglang.srt.mem_cache.kv_layout import KVCacheSpec, SegmentLayout
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool, NSATokenToKVPool
from sglang.srt.mem_cache.segment_backing.base import Plane, SegmentBacking, TableBacking
from sglang.srt.mem_cache.segment_backing.segment_plane import (
    SegmentPart,
    SegmentPlane,
    round_to,
    split_by_segment,
)


class SegmentTableKVPool(MHATokenToKVPool):
    """K and V over a segment table: buffers are `SegmentPlane`s, writes go segment by segment.

    How a step's slots fall into segments is found once per step and group, not once per layer.
    Where values have no plane, keys' rows begin with them: see `MLATokenToKVPool`.
    """

    contiguous: ClassVar[bool] = False

    def _take_planes(self, backing: SegmentBacking) -> None:
        if not isinstance(backing, TableBacking):
            raise InvariantError(f"{backing!r} is no segment table")
        layers = self._layers
        self._key_planes = {layer: backing.plane(layer, Plane.KEY) for layer in layers}
        self._value_planes = self._key_planes
        if not self.spec.values_in_keys:
            self._value_planes = {layer: backing.plane(layer, Plane.VALUE) for layer in layers}
        self._last_parts: list[SegmentPart] = []

    def _keep_layers(self, layers: Sequence[int]) -> None:
        self._key_planes = {at: self._key_planes[layer] for at, layer in enumerate(layers)}
        self._value_planes = {at: self._value_planes[layer] for at, layer in enumerate(layers)}

    def get_key_buffer(self, layer_id: int) -> SegmentPlane:
        """Keys of one layer, in pieces."""
        return self._key_planes[layer_id]

    def get_value_buffer(self, layer_id: int) -> SegmentPlane:
        """Values of one layer, in pieces; the keys where their rows begin with them."""
        return self._value_planes[layer_id]

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
        """See MHATokenToKVPool."""
        if loc is not self._last_loc:
            layout = self.layouts[self._group_of_layer[layer_id]]
            self._last_parts = split_by_segment(loc, layout.slots_per_segment)
            self._last_loc = loc
        planes = self._key_planes[layer_id], self._value_planes[layer_id]
        news = ((k, k_scale), (v, v_scale))
        for plane, (new, scale) in zip(planes[: self._num_planes], news, strict=False):
            plane.store(self._last_parts, round_to(new, self.dtype, scale))

    def get_kv_size_bytes(self) -> tuple[int, int]:
        """Bytes that all keys and all values would take, were every segment mapped."""
        layouts = [layout for layout in self.layouts if not layout.holds_states]
        slots = [layout.num_slots * layout.num_layers for layout in layouts]
        both = [
            (count * layout.k_bytes_per_slot, count * layout.v_bytes_per_slot)
            for count, layout in zip(slots, layouts, strict=True)
        ]
        return sum(keys for keys, _ in both), sum(values for _, values in both)


def make_kv_pool(
    spec: KVCacheSpec,
    layouts: tuple[SegmentLayout, ...],
    backing: SegmentBacking,
    kv_rank: int = 0,
) -> MHATokenToKVPool:
    """The pool that fits the backing."""
    kind: type[MHATokenToKVPool] = MHATokenToKVPool
    if isinstance(backing, TableBacking):
        kind = SegmentTableKVPool
    elif spec.values_in_keys:
        kind = NSATokenToKVPool if spec.index_layers else MLATokenToKVPool
    return kind(spec, layouts, backing, kv_rank)

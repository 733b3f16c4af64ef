"""Index keys: what the indexer of sparse attention keeps of tokens, in planes beside the latents.

A pool has one of these; layers store new tokens' keys through it and the attention backend reads
the planes. Slots are those of K; who owns them and where their bytes lie is the pool's and the
backing's business. See docs/kv_segments.md, Note [Sparse attention].

Shape letters: S slots, T packed new tokens, X numbers of an index key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from sglang.srt.errors import InvariantError
from sglang.srt.mem_cache.kv_layout import KVCacheSpec
from sglang.srt.mem_cache.segment_backing.base import Plane, SegmentBacking, TableBacking
from sglang.srt.mem_cache.segment_backing.segment_plane import (
    SegmentPart,
    SegmentPlane,
    raw,
    round_to,
    split_by_segment,
)


class IndexPlanes:
    """The planes [S, 1, X] of the layers that have one, in the KV dtype."""

    def __init__(self, planes: Mapping[int, torch.Tensor | SegmentPlane]) -> None:
        self._planes = dict(planes)
        self._last_loc: torch.Tensor | None = None
        self._last_parts: list[SegmentPart] = []

    @classmethod
    def of(cls, spec: KVCacheSpec, backing: SegmentBacking) -> IndexPlanes:
        """Those of a reserved backing; none where `spec` has no index keys."""
        take = backing.plane if isinstance(backing, TableBacking) else backing.view
        return cls({layer: take(layer, Plane.INDEX) for layer in spec.index_layers})

    def part(self, layers: Sequence[int]) -> IndexPlanes:
        """Those of some layers, which are numbered from 0 then."""
        found = enumerate(layers)
        return IndexPlanes({at: self._planes[one] for at, one in found if one in self._planes})

    def __getitem__(self, layer_id: int) -> torch.Tensor | SegmentPlane:
        """The plane of a layer; InvariantError where it keeps no index keys."""
        plane = self._planes.get(layer_id)
        if plane is None:
            raise InvariantError(f"layer {layer_id} keeps no index keys")
        return plane

    def of_layer(self, layer_id: int) -> tuple[torch.Tensor | SegmentPlane, ...]:
        """The layer's plane, if it has one."""
        return (self._planes[layer_id],) if layer_id in self._planes else ()

    def store(self, layer_id: int, loc: torch.Tensor, keys: torch.Tensor) -> None:
        """Write keys [T, X] to slots `loc` int64 [T], rounded to the KV dtype without a scale.

        `loc` are slots that the step's K went to, and must not be changed afterwards.
        """
        plane = self[layer_id]
        rows = round_to(keys, plane.dtype).unsqueeze(1)
        if not isinstance(plane, SegmentPlane):
            raw(plane).index_copy_(0, loc, raw(rows))
            return
        if loc is not self._last_loc:
            self._last_parts = split_by_segment(loc, plane.slots_per_segment)
            self._last_loc = loc
        plane.store(self._last_parts, rows)

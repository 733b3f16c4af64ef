"""A backing without memory: records calls, fails on demand, can be held up; for tests only."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from sglang.srt.errors import BackingError
from sglang.srt.mem_cache.kv_layout import GroupId, KVCacheSpec, SegmentId, SegmentLayout
from sglang.srt.mem_cache.segment_backing.base import Plane, PlaneShape, layer_planes


class FakeBacking:
    """Keeps the set of mapped segments; views are small real tensors over the whole space.

    Map or unmap call number n (counted from 1, separately) fails when n is in `failing_maps` or
    `failing_unmaps`, every map fails when `fail_all_maps`. While `gate` is cleared, calls block.
    """

    name = "fake"

    def __init__(self, *, elastic: bool = True, granule_bytes: int = 1) -> None:
        self.elastic = elastic
        self.granule_bytes = granule_bytes
        self.calls: list[tuple[str, int, tuple[int, ...]]] = []
        self.mapped: set[tuple[int, int]] = set()
        self.failing_maps: set[int] = set()
        self.failing_unmaps: set[int] = set()
        self.fail_all_maps = False
        self.num_maps = 0
        self.num_unmaps = 0
        self.gate = threading.Event()
        self.gate.set()
        self.closed = False
        self._spec: KVCacheSpec | None = None
        self._layouts: tuple[SegmentLayout, ...] = ()
        self._planes: dict[tuple[int, Plane], torch.Tensor] = {}

    def reserve(self, spec: KVCacheSpec, layouts: tuple[SegmentLayout, ...]) -> None:
        self._spec = spec
        self._layouts = layouts

    def map(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        self._pass_gate()
        self.num_maps += 1
        self.calls.append(("map", group, tuple(segments)))
        if self.fail_all_maps or self.num_maps in self.failing_maps:
            raise BackingError(f"map {self.num_maps} was told to fail")
        keys = {(group, segment) for segment in segments}
        assert len(keys) == len(segments)
        assert not keys & self.mapped
        assert all(segment > 0 for segment in segments)
        self.mapped |= keys

    def unmap(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        self._pass_gate()
        assert self.elastic
        self.num_unmaps += 1
        self.calls.append(("unmap", group, tuple(segments)))
        if self.num_unmaps in self.failing_unmaps:
            raise BackingError(f"unmap {self.num_unmaps} was told to fail")
        keys = {(group, segment) for segment in segments}
        assert keys <= self.mapped
        self.mapped -= keys

    def _pass_gate(self) -> None:
        # bounded: a test that fails with the gate shut must not keep the process from ending
        if not self.gate.wait(20):
            raise BackingError("the gate was never opened")

    def view(self, layer: int, plane: Plane) -> torch.Tensor:
        assert self._spec is not None
        group = self._spec.group_of_layer()[layer]
        layout = self._layouts[group]
        shape = layer_planes(self._spec, layout, layer).get(
            plane, PlaneShape(self._spec.kv_heads, self._spec.v_head_dim, torch.float32)
        )
        key = (layer, plane)
        if key not in self._planes:
            sizes = (layout.num_slots, shape.heads, shape.width)
            self._planes[key] = torch.zeros(sizes, dtype=shape.dtype)
        return self._planes[key]

    def resident_bytes(self) -> int | None:
        if not self._layouts:
            return None
        mapped = sum(self._layouts[group].segment_bytes for group, _ in self.mapped)
        return mapped + sum(layout.fixed_bytes for layout in self._layouts)

    def close(self) -> None:
        self.closed = True

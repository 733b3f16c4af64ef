"""The portable backing: one tensor per segment and plane, and a table of their addresses.

For devices without virtual memory control, and for CPUs where an elastic range can't be reserved.
Owns the tensors; called by the segment manager (map, unmap) and memory_pool (plane). There is no
contiguous view: readers go through `SegmentPlane`. See docs/kv_segments.md, Note [Segment table].
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence
from typing import Final, NoReturn

import torch

from sglang.srt.errors import BackingError, InvariantError
from sglang.srt.mem_cache.kv_layout import GroupId, KVCacheSpec, SegmentId, SegmentLayout
from sglang.srt.mem_cache.segment_backing.base import Plane, layer_planes
from sglang.srt.mem_cache.segment_backing.segment_plane import SegmentPlane
from sglang.srt.utils.host_memory import read_host_memory
from sglang.srt.utils.sizes import format_bytes

MARGIN_BYTES: Final = 128 << 20  # left to the rest of the machine when memory is mapped


class SegmentTableBacking:
    """Elastic backing on ordinary tensors of `device`.

    `available_bytes` (of the device, when it is not the host) and `margin_bytes` as in MmapBacking.
    On a CPU every part is an anonymous
    mapping of its own, so that it goes back to the system when it is freed.
    """

    name = "segment_table"
    elastic = True
    granule_bytes = 1

    def __init__(
        self,
        *,
        device: str = "cpu",
        available_bytes: Callable[[], int] | None = None,
        margin_bytes: int = MARGIN_BYTES,
    ) -> None:
        self._device = torch.device(device)
        self._available = available_bytes or (lambda: read_host_memory().available_bytes)
        self._margin_bytes = margin_bytes
        self._layouts: tuple[SegmentLayout, ...] = ()
        self._planes: dict[tuple[int, Plane], SegmentPlane] = {}
        self._of_group: tuple[tuple[SegmentPlane, ...], ...] = ()

    def reserve(self, spec: KVCacheSpec, layouts: tuple[SegmentLayout, ...]) -> None:
        """See SegmentBacking. Makes the address tables, and memory for page 0 alone."""
        if self._planes:
            raise InvariantError("the backing was reserved before")
        self._check_headroom(sum(layout.fixed_bytes for layout in layouts))
        planes: dict[tuple[int, Plane], SegmentPlane] = {}
        for layout in layouts:
            for layer in spec.plane_layers(layout.group):
                for plane, shape in layer_planes(spec, layout, layer).items():
                    made = SegmentPlane(
                        (layout.num_slots, shape.heads, shape.width),
                        slots_per_segment=layout.slots_per_segment,
                        page_size=layout.page_size,
                        dtype=shape.dtype,
                        device=self._device,
                    )
                    made.attach(0, self._allocate(made, layout.page_size))
                    planes[layer, plane] = made
        self._planes = planes
        self._layouts = layouts
        self._of_group = tuple(
            tuple(
                planes[layer, plane]
                for layer in spec.plane_layers(layout.group)
                for plane in layer_planes(spec, layout, layer)
            )
            for layout in layouts
        )

    def map(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        """See SegmentBacking. New memory reads zero."""
        self._check_ids(group, segments)
        layout = self._layouts[group]
        self._check_headroom(len(segments) * layout.segment_bytes)
        made = [
            (plane, segment, self._allocate(plane, layout.slots_per_segment))
            for plane in self._of_group[group]
            for segment in segments
        ]
        if self._device.type == "cuda":
            # The zeros are written on this thread's stream; the compute stream waits for nobody.
            torch.cuda.current_stream(self._device).synchronize()
        for plane, segment, part in made:  # nothing fails from here on
            plane.attach(segment, part)

    def unmap(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        """See SegmentBacking. A view that somebody still holds keeps its part alive."""
        self._check_ids(group, segments)
        for plane in self._of_group[group]:
            for segment in segments:
                plane.detach(segment)

    def plane(self, layer: int, plane: Plane) -> SegmentPlane:
        """One plane in pieces; the same object for good."""
        if not self._planes:
            raise InvariantError("the backing has not been reserved")
        return self._planes[layer, plane]

    def view(self, layer: int, plane: Plane) -> NoReturn:
        """Always raises InvariantError: there is no contiguous range; see `plane`."""
        raise InvariantError(f"layer {layer}, {plane}: a segment table has no contiguous view")

    def resident_bytes(self) -> int | None:
        """See SegmentBacking: torch's figure of the parts that live, all of them written once."""
        return sum(plane.nbytes for plane in self._planes.values()) if self._planes else None

    def close(self) -> None:
        """See SegmentBacking."""
        self._planes = {}
        self._of_group = ()

    def _allocate(self, plane: SegmentPlane, num_slots: int) -> torch.Tensor:
        """Zero-filled [slots, G, D]; raises BackingError when there is no memory."""
        shape = (num_slots, *plane.shape[1:])
        try:
            if self._device.type != "cpu":
                return torch.zeros(shape, dtype=plane.dtype, device=self._device)
            memory = mmap.mmap(-1, math.prod(shape) * plane.dtype.itemsize)
            # written, so that the system has given it when this returns
            return torch.frombuffer(memory, dtype=torch.uint8).zero_().view(plane.dtype).view(shape)
        except (RuntimeError, OSError) as error:
            raise BackingError(f"can't allocate a KV segment: {error}") from error

    def _check_headroom(self, wanted_bytes: int) -> None:
        available = self._available()
        if wanted_bytes + self._margin_bytes > available:
            raise BackingError(
                f"{format_bytes(wanted_bytes)} wanted, {format_bytes(available)} available, of "
                f"which {format_bytes(self._margin_bytes)} are left to the rest of the machine"
            )

    def _check_ids(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        if not self._planes:
            raise InvariantError("the backing has not been reserved, or it was closed")
        last = self._layouts[group].max_segments - 1
        repeated = len(set(segments)) != len(segments)
        if repeated or any(not 1 <= segment <= last for segment in segments):
            raise InvariantError(f"group {group}: wrong or repeated segments in {tuple(segments)}")

    def __repr__(self) -> str:
        held = sum(plane.nbytes for plane in self._planes.values())
        return f"SegmentTableBacking({len(self._planes)} planes, {format_bytes(held)})"

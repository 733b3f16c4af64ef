"""The static backing: all memory committed at start and never given back.

What serving engines do today, kept as the baseline for comparisons and for machines without an
elastic backing. Its layouts are cut to the budget beforehand (`trim_layouts_to_budget`), since
every slot of its space is really there. Map is a no-op, unmap a bug of the caller.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Callable, Sequence
from typing import Final

import torch

from sglang.srt.errors import BackingError, InvariantError
from sglang.srt.mem_cache.kv_layout import GroupId, KVCacheSpec, SegmentId, SegmentLayout
from sglang.srt.mem_cache.segment_backing.base import Plane, PlaneShape, layer_planes
from sglang.srt.mem_cache.segment_backing.host_calls import HostCalls
from sglang.srt.utils.host_memory import read_host_memory
from sglang.srt.utils.sizes import format_bytes

MARGIN_BYTES: Final = 128 << 20
_ZERO_PIECE_BYTES: Final = 64 << 20


class StaticBacking:
    """Every segment of the layouts, resident from `reserve` to `close`.

    A segment reads zero at first and stale contents after its pages were freed: nothing is
    cleared again, as a slot is always written before it is read. `available_bytes` as in
    MmapBacking; on another `device` than the host its figure.
    """

    name = "static"
    elastic = False
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
        self._planes: dict[tuple[int, Plane], torch.Tensor] = {}

    def reserve(self, spec: KVCacheSpec, layouts: tuple[SegmentLayout, ...]) -> None:
        """See SegmentBacking; takes all the memory. Of segment 0 only page 0 is touched."""
        if self._planes:
            raise InvariantError("the backing was reserved before")
        wanted = sum(
            layout.fixed_bytes + (layout.max_segments - 1) * layout.segment_bytes
            for layout in layouts
        )
        available = self._available()
        if wanted + self._margin_bytes > available:
            raise BackingError(
                f"the static KV pool needs {format_bytes(wanted)}, {format_bytes(available)} are "
                f"available, of which {format_bytes(self._margin_bytes)} are left to the rest of "
                "the machine; lower --kv-memory-budget or use --kv-backing mmap"
            )
        planes = {}
        try:
            for layout in layouts:
                for layer in spec.plane_layers(layout.group):
                    for plane, shape in layer_planes(spec, layout, layer).items():
                        planes[layer, plane] = _commit_plane(layout, shape, self._device)
        except RuntimeError as error:  # what torch raises when the allocation fails
            raise BackingError(f"can't allocate the static KV pool: {error}") from error
        self._planes = planes
        self._layouts = layouts

    def map(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        """See SegmentBacking. Checks the ids; the memory is there already."""
        if not self._planes:
            raise InvariantError("the backing has not been reserved, or it was closed")
        last = self._layouts[group].max_segments - 1
        if any(not 1 <= segment <= last for segment in segments):
            raise InvariantError(f"group {group}: {tuple(segments)} are not all in 1..{last}")

    def unmap(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        """Always raises InvariantError: this backing is not elastic."""
        raise InvariantError(f"static memory can't be unmapped: {group} {tuple(segments)}")

    def view(self, layer: int, plane: Plane) -> torch.Tensor:
        """See SegmentBacking: [S, G, D]."""
        if not self._planes:
            raise InvariantError("the backing has not been reserved")
        return self._planes[layer, plane]

    def resident_bytes(self) -> int | None:
        """See SegmentBacking: by mincore, whole OS pages; None on other systems than Linux.

        On another device: what torch allocated.
        """
        if self._device.type != "cpu":
            return sum(tensor.nbytes for tensor in self._planes.values()) or None
        if not self._planes or sys.platform != "linux":
            return None
        calls = HostCalls()
        total = 0
        for tensor in self._planes.values():
            start = tensor.data_ptr()
            end = start + tensor.nbytes
            aligned = start - start % mmap.PAGESIZE
            total += calls.resident_bytes_of(aligned, end - aligned)
        return total

    def close(self) -> None:
        """See SegmentBacking. A view that somebody still holds keeps its plane alive."""
        self._planes = {}

    def __repr__(self) -> str:
        held = sum(tensor.nbytes for tensor in self._planes.values())
        return f"StaticBacking({len(self._planes)} planes, {format_bytes(held)})"


def _commit_plane(layout: SegmentLayout, shape: PlaneShape, device: torch.device) -> torch.Tensor:
    """One plane [S, G, D], page 0 and all segments but segment 0 written with zeros in pieces."""
    sizes = (layout.num_slots, shape.heads, shape.width)
    if device.type != "cpu":
        return torch.zeros(sizes, dtype=shape.dtype, device=device)
    tensor = _fresh_memory(math.prod(sizes), shape.dtype).view(sizes)
    raw = tensor.view(-1).view(torch.uint8)
    per_slot = raw.numel() // layout.num_slots
    raw[: layout.page_size * per_slot].zero_()
    for start in range(layout.slots_per_segment * per_slot, raw.numel(), _ZERO_PIECE_BYTES):
        raw[start : start + _ZERO_PIECE_BYTES].zero_()
    return tensor


def _fresh_memory(num_elements: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor over pages of its own that nobody touched before.

    A heap may hand out memory that an earlier tensor left resident, and then what is untouched
    here, the rest of segment 0, would take memory all the same.
    """
    if sys.platform == "win32":
        return torch.empty(num_elements, dtype=dtype)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    try:
        pages = mmap.mmap(-1, num_elements * dtype.itemsize, flags=flags)
    except (OSError, ValueError) as error:
        raise BackingError(f"cannot take memory for the static KV pool: {error}") from error
    return torch.frombuffer(pages, dtype=dtype)

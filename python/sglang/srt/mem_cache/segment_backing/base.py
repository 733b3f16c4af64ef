"""What a backing must do: put bytes under segments, and take them away again.

A backing owns addresses and physical memory, nothing else: it keeps no states, no counts and no
budget. Only the segment manager maps and unmaps; memory_pool takes the views once. See
docs/kv_segments.md, Note [mmap backing].

Shape letters: S slots of a group's whole logical space, G kv heads of this rank, D head dim.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from types import MappingProxyType
from typing import Final, NamedTuple, Protocol, runtime_checkable

import torch

from sglang.srt.mem_cache.kv_layout import (
    STATE_NUMBER_BYTES,
    GroupId,
    KVCacheSpec,
    SegmentId,
    SegmentLayout,
)
from sglang.srt.mem_cache.segment_backing.segment_plane import SegmentPlane


class Plane(enum.Enum):
    """The planes of a layer; each is one contiguous range of all slots.

    Of latent attention there is no VALUE: see docs/kv_segments.md, Note [Latent attention]. Some
    layers have an INDEX beside: Note [Sparse attention].
    """

    KEY = "key"
    VALUE = "value"
    INDEX = "index"


KV_TORCH_DTYPES: Final = MappingProxyType(
    {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "fp8_e4m3": torch.float8_e4m3fn,
        "fp8_e5m2": torch.float8_e5m2,
        "int8": torch.int8,
    }
)


def plane_widths(spec: KVCacheSpec) -> dict[Plane, int]:
    """Numbers that a head takes in the planes of every layer that keeps K and V, in order."""
    widths = {Plane.KEY: spec.k_width, Plane.VALUE: spec.v_width}
    return {plane: width for plane, width in widths.items() if width}


class PlaneShape(NamedTuple):
    """What a slot takes in a plane: numbers [heads, width] of a type."""

    heads: int
    width: int
    dtype: torch.dtype

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot."""
        return self.heads * self.width * self.dtype.itemsize


def layer_planes(spec: KVCacheSpec, layout: SegmentLayout, layer: int) -> dict[Plane, PlaneShape]:
    """The planes of one layer of the layout's group that has some, in order.

    Index keys come last. States have one plane, KEY, whose slots are parts of a state.
    """
    if layout.holds_states:
        width = layout.k_bytes_per_slot // STATE_NUMBER_BYTES
        return {Plane.KEY: PlaneShape(1, width, torch.float32)}
    own, dtype = spec.of_group(layout.group), KV_TORCH_DTYPES[spec.dtype]
    widths = plane_widths(own)
    if layer in spec.index_layers:
        widths[Plane.INDEX] = spec.index_dim
    return {plane: PlaneShape(own.kv_heads, width, dtype) for plane, width in widths.items()}


# How a message says where the lower tier of that name (`TieredBacking.lower_tier`) is.
LOWER_PLACES: Final = MappingProxyType({"disk": "on disk", "host": "in host memory"})


class SegmentBacking(Protocol):
    """Memory for segments. Views are taken before anything is mapped; two threads may be inside
    at a time, for different segments.

    `elastic` is False when memory never comes or goes after `reserve` (the manager then maps every
    segment at start and plans neither growth nor shrinking). `granule_bytes` is the size that every
    plane's part of a segment must be a multiple of.
    """

    @property
    def name(self) -> str: ...

    @property
    def granule_bytes(self) -> int: ...

    @property
    def elastic(self) -> bool: ...

    def reserve(self, spec: KVCacheSpec, layouts: tuple[SegmentLayout, ...]) -> None:
        """Take address space for every plane and back page 0 (the dump page) of each for good.

        Called once, before anything else. Raises BackingError when the machine refuses; nothing is
        then held.
        """

    def map(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        """Attach memory to `segments` of `group`: all of them, or none and BackingError.

        The ids are distinct, unmapped and not 0. What a fresh segment reads is zero or stale,
        never relied on: a slot is written before it is read. Releases the interpreter lock while
        it works. The second line of defence after a check of the machine's headroom.
        """

    def unmap(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        """Give the memory of mapped `segments` back to the machine; their contents are lost.

        Never called for a backing that is not elastic (InvariantError). Raises BackingError when
        the machine refuses: the segments then still count as mapped.
        """

    def view(self, layer: int, plane: Plane) -> torch.Tensor:
        """All slots of one plane, zero-copy: [S, G, D] in the KV dtype, D as `layer_planes` has it.

        Of states: [S, 1, W] in float32, W numbers of a state. `layer` must have planes.
        Only slots of mapped segments and of page 0 may be touched. The tensor must not be used
        after `close`.
        """

    def resident_bytes(self) -> int | None:
        """Bytes that the system itself says lie under the reserved ranges; None when unknown.

        Costs milliseconds: for audits and status pages, not for every step.
        """

    def close(self) -> None:
        """Give everything back; views dangle from here on. A second call does nothing."""


@runtime_checkable
class TieredBacking(SegmentBacking, Protocol):
    """A backing that can keep segments on a slower tier under their old addresses.

    Views reach such segments as they do others, for reading and for writing. `map` and `unmap` are
    for segments in the device's memory, these for those below. `lower_tier` is what lies below:
    "disk" or "host". `promotes`: a segment that is read below is worth bringing back; False where
    the system itself keeps in memory what is read. See docs/kv_segments.md, Note [The tier below].
    """

    @property
    def lower_tier(self) -> str: ...

    @property
    def promotes(self) -> bool: ...

    def map_lower(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        """Put room of the lower tier under unmapped `segments`: all, or none and BackingError."""

    def unmap_lower(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        """Give the room of `segments` below back; their contents are lost.

        Raises BackingError when the machine refuses: the segments then still count as there.
        """

    def demote(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        """Move mapped `segments` from memory to the lower tier with their contents, all or none.

        Others may read them meanwhile, nobody may write. Raises BackingError, and all is as it was,
        when there is no room below or the machine refuses.
        """

    def promote(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        """Move `segments` from the lower tier to memory; as `demote` otherwise."""

    def lower_bytes(self) -> int:
        """Bytes that this backing holds on the lower tier."""


@runtime_checkable
class StagedBacking(SegmentBacking, Protocol):
    """A backing whose memory is taken off the step path and attached between two steps.

    The manager calls `prepare` on its background thread, then `commit` or `discard` on the
    caller's thread at a step boundary; `map` is `prepare` and `commit` at once. See
    docs/kv_segments.md, Note [CUDA virtual memory].
    """

    def prepare(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        """Take the memory for `segments`, unattached: for all of them, or BackingError."""

    def commit(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        """Attach what `prepare` took: for all of them, or BackingError and nothing is held."""

    def discard(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        """Give back what `prepare` took and nobody will commit."""


@runtime_checkable
class StagedTieredBacking(StagedBacking, TieredBacking, Protocol):
    """Both: moves are prepared on the background thread and take place between two steps.

    `commit`, `discard` and `unmap` are for either tier. `demote` and `promote` are `prepare_move`
    and `commit_move` at once. See docs/kv_segments.md, Note [The tier below].
    """

    def prepare_lower(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        """As `prepare`, with room of the lower tier."""

    def prepare_move(
        self, group: GroupId, segments: Sequence[SegmentId], *, to_lower: bool
    ) -> None:
        """Take room on the other tier and copy there, for all of them, or BackingError.

        Readers go on reading where the segments still are; nobody may write until the commit.
        """

    def commit_move(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        """Put the copies in the segments' places, or BackingError and all is as it was.

        Waits for the work that was launched before; none may be launched meanwhile.
        """

    def discard_move(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        """Give back the copies that nobody will commit."""


@runtime_checkable
class TableBacking(SegmentBacking, Protocol):
    """A backing whose segments have no common range: `view` has no answer, `plane` has.

    See docs/kv_segments.md, Note [Segment table].
    """

    def plane(self, layer: int, plane: Plane) -> SegmentPlane:
        """One plane in pieces; the same object for good."""

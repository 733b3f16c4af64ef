"""The GPU backing: one address range per layer and plane, memory put under segments by the driver.

Owns the ranges, the memory handles and which handle lies where; called by the segment manager
(prepare and unmap on its background thread, commit and discard at a step boundary) and by
memory_pool (view). A segment's part of a plane is one or more handles, each mapped whole and
once. Talks to the device through `VmmDriver` only. Not yet run on hardware; every path, failures
included, is tested with a driver that checks the rules. See docs/kv_segments.md, Note [CUDA
virtual memory].
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, NamedTuple

import torch

from sglang.srt.errors import BackingError, InvariantError
from sglang.srt.mem_cache.kv_layout import GroupId, KVCacheSpec, SegmentId, SegmentLayout
from sglang.srt.mem_cache.segment_backing.base import Plane, layer_planes
from sglang.srt.mem_cache.segment_backing.cuda_driver import VmmDriver
from sglang.srt.utils.sizes import format_bytes

MARGIN_BYTES: Final = 256 << 20  # left to the rest of the process when memory is taken
FIRST_WAIT_S: Final = 20e-6
LONGEST_WAIT_S: Final = 2e-3
MAX_WAIT_S: Final = 60.0  # for the work that may still read what is to be unmapped


class Piece(NamedTuple):
    """One handle's place; the subclass with a tier below uses it too."""

    address: int
    length: int


@dataclass(frozen=True, slots=True)
class _PlaneRange:
    """Where one plane of one layer lies; lengths in bytes."""

    layer: int
    plane: Plane
    group: GroupId
    address: int
    length: int
    segment_bytes: int
    fixed_bytes: int


class CudaVmmBacking:
    """Elastic backing on a CUDA device's virtual memory.

    `handle_bytes` bounds the size of one handle (None: a segment's whole part of a plane is one);
    a multiple of the granule. `margin_bytes` of the device are never taken. `make_tensor` makes a
    uint8 tensor of (address, bytes), None: on CUDA device 0. `pause` waits some seconds between two
    looks at an event. Raises BackingError when the driver's granularities do not fit together,
    ValueError for a handle size that is not a multiple of the granule.
    """

    name = "cuda_vmm"
    elastic = True

    def __init__(
        self,
        driver: VmmDriver,
        *,
        handle_bytes: int | None = None,
        margin_bytes: int = MARGIN_BYTES,
        make_tensor: Callable[[int, int], torch.Tensor] | None = None,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        minimum = driver.granularity(recommended=False)
        self.granule_bytes = driver.granularity(recommended=True)
        if self.granule_bytes % minimum:
            raise BackingError(
                f"the driver recommends sizes in {self.granule_bytes} bytes, which is no multiple "
                f"of its minimum of {minimum}"
            )
        if handle_bytes is not None and (handle_bytes < 1 or handle_bytes % self.granule_bytes):
            raise ValueError(
                f"a handle of {handle_bytes} bytes is no multiple of {self.granule_bytes}"
            )
        self._driver = driver
        self._handle_bytes = handle_bytes
        self._margin_bytes = margin_bytes
        self._make_tensor = make_tensor or partial(cuda_bytes, 0)
        self._pause = pause
        self._lock = threading.Lock()  # over the three tables below
        self._prepared: dict[Piece, int] = {}  # handles that wait for their mapping
        self._mapped: dict[Piece, int] = {}
        self._stuck: list[tuple[int, int]] = []  # (handle, bytes) that the driver did not take back
        self._spec: KVCacheSpec | None = None
        self._layouts: tuple[SegmentLayout, ...] = ()
        self._planes: tuple[_PlaneRange, ...] = ()

    @property
    def held_bytes(self) -> int:
        """Bytes of all handles that are held: mapped, prepared, or stuck."""
        with self._lock:
            placed = sum(piece.length for piece in (*self._mapped, *self._prepared))
            return placed + sum(length for _, length in self._stuck)

    def reserve(self, spec: KVCacheSpec, layouts: tuple[SegmentLayout, ...]) -> None:
        """See SegmentBacking. Address space per layer and plane; of segment 0 only page 0."""
        if self._planes:
            raise InvariantError("the backing was reserved before")
        planes: list[_PlaneRange] = []
        try:
            for plane in self._place(spec, layouts):
                address = self._driver.reserve_address(plane.length, self.granule_bytes)
                planes.append(replace(plane, address=address))
            self._planes = tuple(planes)
            fixed = [piece for plane in planes for piece in self._fixed_pieces(plane)]
            self._create(fixed)
            self._attach(fixed, [(p.address, p.fixed_bytes) for p in planes])
        except BackingError:
            self._planes = ()
            self._free_addresses(planes)
            raise
        self._spec = spec
        self._layouts = layouts

    def prepare(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        """See StagedBacking: creates the handles, after a look at the device's free memory."""
        pieces = self._pieces(group, segments)
        self._check_free(pieces, len(segments))
        self._create(pieces)

    def commit(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        """See StagedBacking: maps the handles and opens their ranges to the device."""
        self._attach(self._pieces(group, segments), list(self._ranges(group, segments)))

    def discard(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        """See StagedBacking. A handle that the driver does not take is kept and tried again."""
        pieces = self._pieces(group, segments)
        with self._lock:
            handles = [(self._prepared.pop(piece), piece.length) for piece in pieces]
        self._release(handles)

    def map(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        """See SegmentBacking. What new memory reads is the driver's choice."""
        self.prepare(group, segments)
        self.commit(group, segments)

    def unmap(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        """See SegmentBacking. Waits for the work that was launched before, then unmaps.

        A refusal leaves everything mapped as it was. Raises InvariantError when not even that
        can be restored: then memory is gone that callers count on.
        """
        pieces = self._pieces(group, segments)
        with self._lock:
            handles = [(self._mapped[piece], piece.length) for piece in pieces]
        self._await_readers()
        done: list[Piece] = []
        try:
            for piece in pieces:
                self._driver.unmap(*piece)
                done.append(piece)
        except BackingError as error:
            self._restore(done)
            raise BackingError(f"can't unmap {len(segments)} KV segments: {error}") from error
        with self._lock:
            for piece in pieces:
                del self._mapped[piece]
        self._release(handles)

    def view(self, layer: int, plane: Plane) -> torch.Tensor:
        """See SegmentBacking: [S, G, D], on the device."""
        if self._spec is None:
            raise InvariantError("the backing has not been reserved")
        where = next(p for p in self._planes if p.layer == layer and p.plane is plane)
        layout = self._layouts[where.group]
        shape = layer_planes(self._spec, layout, layer)[plane]
        raw = self._make_tensor(where.address, where.length)
        return raw.view(shape.dtype).view(layout.num_slots, shape.heads, shape.width)

    def resident_bytes(self) -> int | None:
        """See SegmentBacking: None, the driver tells it for the whole device only."""
        return None

    def close(self) -> None:
        """See SegmentBacking. Goes through to the end, then raises the first refusal."""
        planes, self._planes, self._spec = self._planes, (), None
        if not planes:
            return
        refusals: list[BackingError] = []
        with _collected(refusals):
            self._await_readers()
        with self._lock:
            mapped, self._mapped = self._mapped, {}
            prepared, self._prepared = self._prepared, {}
        handles = [(handle, piece.length) for piece, handle in prepared.items()]
        kept: list[int] = []  # addresses that could not be unmapped; their ranges stay as well
        for piece, handle in mapped.items():
            kept.append(piece.address)
            with _collected(refusals):
                self._driver.unmap(*piece)
                kept.pop()
                handles.append((handle, piece.length))
        self._release(handles)
        self._retry_stuck()
        if self._stuck:
            refusals.append(BackingError(f"{len(self._stuck)} handles could not be released"))
        refusals += self._free_addresses(
            p for p in planes if not any(p.address <= at < p.address + p.length for at in kept)
        )
        if refusals:
            raise BackingError(f"can't close the CUDA memory: {refusals[0]}") from refusals[0]

    def __repr__(self) -> str:
        return (
            f"CudaVmmBacking({len(self._planes)} planes, {len(self._mapped)} handles mapped, "
            f"{len(self._prepared)} prepared, {len(self._stuck)} stuck)"
        )

    # ---- addresses -----------------------------------------------------------------------------

    def _place(
        self, spec: KVCacheSpec, layouts: tuple[SegmentLayout, ...]
    ) -> Iterator[_PlaneRange]:
        """Every plane with its lengths; the address is still to come."""
        for layout in layouts:
            for layer in spec.plane_layers(layout.group):
                for plane, shape in layer_planes(spec, layout, layer).items():
                    per_slot = shape.slot_bytes
                    part = layout.slots_per_segment * per_slot
                    if layout.granule_bytes % self.granule_bytes or part % layout.granule_bytes:
                        raise InvariantError(f"plane parts of {part} bytes are not whole granules")
                    granule = layout.granule_bytes
                    fixed = -(-layout.page_size * per_slot // granule) * granule
                    length = layout.max_segments * part
                    yield _PlaneRange(layer, plane, layout.group, 0, length, part, fixed)

    def _fixed_pieces(self, plane: _PlaneRange) -> list[Piece]:
        return self._cut(plane.address, plane.fixed_bytes)

    def _pieces(self, group: GroupId, segments: Sequence[SegmentId]) -> list[Piece]:
        """The handles' places under `segments`, plane by plane. Raises InvariantError."""
        self._check_ids(group, segments)
        return [
            piece
            for plane in self._planes
            if plane.group == group
            for segment in sorted(segments)
            for piece in self._cut(
                plane.address + segment * plane.segment_bytes, plane.segment_bytes
            )
        ]

    def _cut(self, address: int, length: int) -> list[Piece]:
        step = self._handle_bytes or length
        return [
            Piece(address + offset, min(step, length - offset)) for offset in range(0, length, step)
        ]

    def _ranges(self, group: GroupId, segments: Sequence[SegmentId]) -> Iterator[tuple[int, int]]:
        """(address, length) of neighbouring segments, in every plane of the group."""
        runs: list[list[int]] = []
        for segment in sorted(segments):
            if runs and segment == runs[-1][0] + runs[-1][1]:
                runs[-1][1] += 1
            else:
                runs.append([segment, 1])
        for plane in self._planes:
            if plane.group == group:
                for first, count in runs:
                    part = plane.segment_bytes
                    yield plane.address + first * part, count * part

    def _check_ids(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        if not self._planes:
            raise InvariantError("the backing has not been reserved, or it was closed")
        last = self._layouts[group].max_segments - 1
        wrong = len(set(segments)) != len(segments)
        if wrong or any(not 1 <= segment <= last for segment in segments):
            raise InvariantError(f"group {group}: wrong or repeated segments in {tuple(segments)}")

    # ---- memory --------------------------------------------------------------------------------

    def _check_free(self, pieces: Sequence[Piece], num_segments: int) -> None:
        """Raise BackingError when the device has too little for handles in these places."""
        self._retry_stuck()
        wanted = sum(piece.length for piece in pieces)
        free, _ = self._driver.memory_info()
        if wanted + self._margin_bytes > free:
            raise BackingError(
                f"can't map {num_segments} KV segments: {format_bytes(wanted)} wanted, "
                f"{format_bytes(free)} free on the device, of which "
                f"{format_bytes(self._margin_bytes)} are left to the rest of the process"
            )

    def _create(self, pieces: Sequence[Piece], create: Callable[[int], int] | None = None) -> None:
        """A handle for every place, or for none and BackingError; `create` None: of the device."""
        with self._lock:
            if any(piece in self._prepared or piece in self._mapped for piece in pieces):
                raise InvariantError("memory was taken for a segment that has some")
        made = self._new_handles(pieces, create or self._driver.create_handle)
        with self._lock:
            self._prepared.update(zip(pieces, made, strict=True))

    def _new_handles(self, pieces: Sequence[Piece], create: Callable[[int], int]) -> list[int]:
        """A handle for every place, or none and BackingError."""
        made: list[int] = []
        try:
            for piece in pieces:
                made.append(create(piece.length))
        except BackingError:
            self._release(list(zip(made, (piece.length for piece in pieces), strict=False)))
            raise
        return made

    def _attach(self, pieces: Sequence[Piece], ranges: Iterable[tuple[int, int]]) -> None:
        """Map prepared handles and open `ranges`, or undo all, release them and raise."""
        with self._lock:
            handles = {piece: self._prepared[piece] for piece in pieces}
        done: list[Piece] = []
        try:
            for piece, handle in handles.items():
                self._driver.map(*piece, handle)
                done.append(piece)
            for address, length in ranges:
                self._driver.set_access(address, length)
        except BackingError:
            self._undo(done)
            with self._lock:
                for piece in pieces:
                    del self._prepared[piece]
            self._release([(handle, piece.length) for piece, handle in handles.items()])
            raise
        with self._lock:
            for piece in pieces:
                self._mapped[piece] = self._prepared.pop(piece)

    def _undo(self, mapped: Iterable[Piece]) -> None:
        for piece in mapped:
            try:
                self._driver.unmap(*piece)
            except BackingError as error:
                raise InvariantError(f"a mapping can't be undone: {error}") from error

    def _restore(self, unmapped: Iterable[Piece]) -> None:
        """Map again what an unmap had taken away before it was refused."""
        try:
            for piece in unmapped:
                with self._lock:
                    handle = self._mapped[piece]
                self._driver.map(*piece, handle)
                self._driver.set_access(*piece)
        except BackingError as error:
            raise InvariantError(f"mapped KV memory was lost: {error}") from error

    def _release(self, handles: Iterable[tuple[int, int]]) -> None:
        """Give handles back; those that the driver does not take are kept for another try."""
        for handle, length in handles:
            try:
                self._driver.release_handle(handle)
            except BackingError:
                with self._lock:
                    self._stuck.append((handle, length))

    def _retry_stuck(self) -> None:
        with self._lock:
            stuck, self._stuck = self._stuck, []
        self._release(stuck)

    def _free_addresses(self, planes: Iterable[_PlaneRange]) -> list[BackingError]:
        refusals: list[BackingError] = []
        for plane in planes:
            with _collected(refusals):
                self._driver.free_address(plane.address, plane.length)
        return refusals

    def _await_readers(self) -> None:
        """Return when all work that was launched so far is done; BackingError when it never is."""
        event = self._driver.record_event()
        waited, wait = 0.0, FIRST_WAIT_S
        while not self._driver.event_done(event):
            if waited >= MAX_WAIT_S:
                raise BackingError(f"the device's work did not end within {MAX_WAIT_S:.0f} s")
            self._pause(wait)
            waited += wait
            wait = min(2 * wait, LONGEST_WAIT_S)


@contextmanager
def _collected(errors: list[BackingError]) -> Iterator[None]:
    """Put a BackingError of the block into `errors` and go on."""
    try:
        yield
    except BackingError as error:
        errors.append(error)


class _ArrayInterface:
    """Device memory that torch adopts without owning it (the CUDA array interface, version 3)."""

    def __init__(self, address: int, length: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (length,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def cuda_bytes(device_index: int, address: int, length: int) -> torch.Tensor:
    """A uint8 tensor over memory of a device that somebody else owns; its first byte is mapped.

    Bytes, because the interface has no name for bfloat16 and fp8. Raises InvariantError where torch
    copied the memory instead of adopting it. Not yet run on hardware.
    """
    # By its number: torch copies to the thread's current device, were that another one.
    device = torch.device("cuda", device_index)
    tensor = torch.as_tensor(_ArrayInterface(address, length), device=device)
    if tensor.data_ptr() != address:
        raise InvariantError(f"a tensor at {tensor.data_ptr():#x}, not at {address:#x}")
    return tensor

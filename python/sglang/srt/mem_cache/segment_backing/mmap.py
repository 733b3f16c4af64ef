"""The CPU backing: one reserved address range, memory put under segments by the system's MMU.

Owns the range and what lies under it; called by the segment manager (map, unmap) and memory_pool
(view). Every plane is one contiguous part of the range between inaccessible guard pages. Mapping
populates pages, unmapping gives them back; the kernel's list of mappings never grows with the
number of mapped segments. See docs/kv_segments.md, Note [mmap backing].
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypedDict

import torch

from sglang.srt.errors import BackingError, InvariantError
from sglang.srt.mem_cache.kv_layout import GroupId, KVCacheSpec, SegmentId, SegmentLayout
from sglang.srt.mem_cache.segment_backing.base import Plane, layer_planes
from sglang.srt.mem_cache.segment_backing.host_calls import (
    MADV_DONTDUMP,
    MADV_DONTFORK,
    MADV_DONTNEED,
    MADV_HUGEPAGE,
    MADV_NOHUGEPAGE,
    MADV_POPULATE_WRITE,
    HostCalls,
    overcommit_is_strict,
    read_smaps_resident,
)
from sglang.srt.utils.host_memory import read_host_memory
from sglang.srt.utils.sizes import format_bytes

PIECE_BYTES: Final = 4 << 20  # one system call's work: other threads run between and meanwhile
MARGIN_BYTES: Final = 128 << 20  # left to the rest of the machine when memory is mapped
MAX_RETRIES: Final = 16  # of one piece, when the kernel says "try again"


@dataclass(frozen=True, slots=True)
class _PlaneRange:
    """Where one plane of one layer lies. `huge` asks for huge pages behind segment 0."""

    layer: int
    plane: Plane
    group: GroupId
    address: int
    length: int
    segment_bytes: int
    fixed_bytes: int
    huge: bool


class MmapOptions(TypedDict, total=False):
    """What `MmapBacking` takes, for those that extend it."""

    debug_protect: bool
    available_bytes: Callable[[], int] | None
    margin_bytes: int
    num_threads: int
    calls: HostCalls | None
    system_root: Path


class MmapBacking:
    """Elastic backing on private anonymous memory (Linux).

    `available_bytes` says how much memory may still be taken (None: read from the system at each
    map), `margin_bytes` of which are never used. `num_threads` share the work of a map: the system
    clears every page, and whoever waits for a segment's memory does not compute meanwhile. With
    `debug_protect` everything that is not
    mapped is inaccessible, so that a stray access ends the process at once, at the price of up
    to two more kernel mappings per plane and run of mapped segments.
    """

    name = "mmap"
    elastic = True

    def __init__(
        self,
        *,
        debug_protect: bool = False,
        available_bytes: Callable[[], int] | None = None,
        margin_bytes: int = MARGIN_BYTES,
        num_threads: int = 1,
        calls: HostCalls | None = None,
        system_root: Path = Path("/"),
    ) -> None:
        reason = unsupported_reason(system_root)
        if reason is not None:
            raise BackingError(f"{reason}; use --kv-backing segment_table")
        self.granule_bytes = mmap.PAGESIZE
        self._debug_protect = debug_protect
        self._available = available_bytes or (lambda: read_host_memory().available_bytes)
        self._margin_bytes = margin_bytes
        self._num_threads = num_threads
        self._helpers: ThreadPoolExecutor | None = None
        self._calls = calls or HostCalls()
        self._huge_page_bytes = read_huge_page_bytes(system_root)
        self._can_populate = True
        self._spec: KVCacheSpec | None = None
        self._layouts: tuple[SegmentLayout, ...] = ()
        self._planes: tuple[_PlaneRange, ...] = ()
        self._address = 0
        self._length = 0
        self._base = 0  # the first aligned address

    def reserve(self, spec: KVCacheSpec, layouts: tuple[SegmentLayout, ...]) -> None:
        """See SegmentBacking. Costs microseconds per plane, whatever the size."""
        if self._spec is not None:
            raise InvariantError("the backing was reserved before")
        offsets, length = self._place(spec, layouts)
        try:
            self._address = self._calls.reserve(length)
        except OSError as error:
            raise BackingError(
                f"can't reserve {format_bytes(length)} of address space ({error}); "
                "is there a limit on virtual memory (ulimit -v)?"
            ) from error
        self._length = length
        align = self._huge_page_bytes or self.granule_bytes
        base = -(-self._address // align) * align
        self._base = base
        self._planes = tuple(replace(p, address=base + p.address) for p in offsets)
        self._spec = spec
        self._layouts = layouts
        try:
            self._check_headroom(sum(layout.fixed_bytes for layout in layouts))
            for plane in self._planes:
                self._prepare(plane)
        except OSError as error:
            self.close()
            raise BackingError(f"can't prepare the KV address range: {error}") from error
        except BackingError:
            self.close()
            raise

    def map(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        """See SegmentBacking. New memory reads zero."""
        runs = self._runs(group, segments)
        self._check_headroom(len(segments) * self._layouts[group].segment_bytes)
        try:
            ranges = list(self._ranges(group, runs))
            if self._debug_protect:
                for address, length in ranges:
                    self._calls.protect(address, length, accessible=True)
            self._populate_together(ranges)
        except (OSError, BackingError) as error:
            for address, length in self._ranges(group, runs):
                # what can't be given back now is, when the segment is mapped and unmapped again
                with suppress(OSError):
                    self._discard(address, length)
            raise BackingError(
                f"can't map {len(segments)} KV segments "
                f"({format_bytes(len(segments) * self._layouts[group].segment_bytes)}): {error}"
            ) from error

    def unmap(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        """See SegmentBacking. The memory is back with the system when this returns.

        After a refusal all of it is there again. Raises InvariantError when debug protection
        can't be lifted again: a segment that counts as mapped would end the process when used.
        """
        runs = self._runs(group, segments)
        done: list[tuple[int, int]] = []
        try:
            for address, length in self._ranges(group, runs):
                self._discard(address, length)
                done.append((address, length))
        except OSError as error:
            self._restore(done)
            raise BackingError(f"can't unmap {len(segments)} KV segments: {error}") from error

    def view(self, layer: int, plane: Plane) -> torch.Tensor:
        """See SegmentBacking: [S, G, D]."""
        if self._spec is None:
            raise InvariantError("the backing has not been reserved")
        where = next(p for p in self._planes if p.layer == layer and p.plane is plane)
        layout = self._layouts[where.group]
        shape = layer_planes(self._spec, layout, layer)[plane]
        memory = (ctypes.c_char * where.length).from_address(where.address)
        flat = torch.frombuffer(memory, dtype=shape.dtype)
        return flat.view(layout.num_slots, shape.heads, shape.width)

    def resident_bytes(self) -> int | None:
        """See SegmentBacking: anonymous memory and swap of the range, from /proc/self/smaps."""
        if not self._length:
            return None
        return read_smaps_resident(self._address, self._address + self._length)

    def close(self) -> None:
        """See SegmentBacking."""
        if self._helpers is not None:
            self._helpers.shutdown(wait=True)
            self._helpers = None
        if self._length:
            self._calls.release(self._address, self._length)
        self._address = self._length = 0
        self._planes = ()
        self._spec = None

    def __repr__(self) -> str:
        huge = sum(plane.huge for plane in self._planes)
        return (
            f"MmapBacking({len(self._planes)} planes, {huge} with huge pages, "
            f"{format_bytes(self._length)} at {self._address:#x})"
        )

    # ---- addresses -----------------------------------------------------------------------------

    def _place(
        self, spec: KVCacheSpec, layouts: tuple[SegmentLayout, ...]
    ) -> tuple[list[_PlaneRange], int]:
        """All planes with addresses relative to an aligned base, and the bytes to reserve.

        Guard pages before, between and behind the planes keep the kernel from joining a plane
        with a neighbour, so that its figures are exactly ours.
        """
        page = self.granule_bytes
        align = self._huge_page_bytes or page
        planes = []
        cursor = page
        for layout in layouts:
            granule = layout.granule_bytes
            for layer in spec.plane_layers(layout.group):
                for plane, shape in layer_planes(spec, layout, layer).items():
                    per_slot = shape.slot_bytes
                    part = layout.slots_per_segment * per_slot
                    if granule % page or part % granule:
                        raise InvariantError(f"plane parts of {part} bytes are not whole pages")
                    huge = self._huge_page_bytes > 0 and part % self._huge_page_bytes == 0
                    step = align if huge else page
                    cursor = -(-cursor // step) * step
                    length = layout.max_segments * part
                    fixed = -(-layout.page_size * per_slot // granule) * granule
                    planes.append(
                        _PlaneRange(layer, plane, layout.group, cursor, length, part, fixed, huge)
                    )
                    cursor += length + page
        return planes, cursor + align

    def _runs(self, group: GroupId, segments: Sequence[SegmentId]) -> list[tuple[int, int]]:
        """Segment ids as ascending (first, count) runs. Raises InvariantError for wrong ids."""
        if not self._planes:
            raise InvariantError("the backing has not been reserved, or it was closed")
        runs: list[tuple[int, int]] = []
        end = 1  # segment 0 is never mapped
        for segment in sorted(segments):
            if not end <= segment < self._layouts[group].max_segments:
                raise InvariantError(f"group {group}: wrong or repeated segment {segment}")
            if runs and segment == end:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((segment, 1))
            end = segment + 1
        return runs

    def _ranges(self, group: GroupId, runs: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """(address, length) of every run in every plane of the group."""
        for _, address, length in self._plane_ranges(group, runs):
            yield address, length

    def _plane_ranges(
        self, group: GroupId, runs: list[tuple[int, int]]
    ) -> Iterator[tuple[_PlaneRange, int, int]]:
        """(plane, address, length) of every run in every plane of the group."""
        for plane in self._planes:
            if plane.group == group:
                for first, count in runs:
                    start = plane.address + first * plane.segment_bytes
                    yield plane, start, count * plane.segment_bytes

    # ---- memory --------------------------------------------------------------------------------

    def _prepare(self, plane: _PlaneRange) -> None:
        """Open a plane, give advice over all of it, and back its dump page for good.

        Segment 0 never gets huge pages: one would be mapped for the sake of one small page.
        Elsewhere huge pages are used only where they end with the segment, also on machines
        that use them always.
        """
        accessible = plane.fixed_bytes if self._debug_protect else plane.length
        self._calls.protect(plane.address, accessible, accessible=True)
        small = plane.segment_bytes if plane.huge else plane.length
        self._advise(plane.address, small, huge=False)
        if small < plane.length:
            self._advise(plane.address + small, plane.length - small, huge=True)
        self._populate(plane.address, plane.fixed_bytes)

    def _advise(self, address: int, length: int, *, huge: bool) -> None:
        """What the system is told of anonymous memory of a plane, the same for all of its parts."""
        self._calls.advise(address, length, MADV_DONTFORK)
        self._calls.advise(address, length, MADV_DONTDUMP)
        with suppress(OSError):  # EINVAL where the kernel has no huge pages at all
            self._calls.advise(address, length, MADV_HUGEPAGE if huge else MADV_NOHUGEPAGE)

    def _populate(self, address: int, length: int) -> None:
        """Commit memory piece by piece. Raises OSError, or BackingError without headroom."""
        for piece in _pieces(address, length):
            self._populate_piece(*piece)

    def _populate_piece(self, address: int, length: int) -> None:
        """Commit a piece. Raises OSError, or BackingError without headroom."""
        if not (self._can_populate and self._try_populate(address, length)):
            # touching pages has no way to refuse but the kernel's killer: look before each
            self._check_headroom(length)
            self._calls.fill_zero(address, length)

    def _populate_together(self, ranges: list[tuple[int, int]]) -> None:
        """`_populate` ranges, piece by piece on all threads; what it raises ends all of them."""
        pieces = [piece for address, length in ranges for piece in _pieces(address, length)]
        count = min(self._num_threads, len(pieces)) - 1
        if count > 0 and self._helpers is None:
            self._helpers = ThreadPoolExecutor(self._num_threads - 1, "kv-populate")
        left = iter(pieces)  # each piece goes to one thread

        def work() -> None:
            try:
                for piece in left:
                    self._populate_piece(*piece)
            finally:
                list(left)  # nobody begins another one after a refusal

        helpers = [self._helpers.submit(work) for _ in range(count) if self._helpers is not None]
        try:
            work()
        finally:
            wait(helpers)
        for helper in helpers:
            helper.result()

    def _try_populate(self, address: int, length: int) -> bool:
        """True when the kernel populated the piece, False when it does not know how to."""
        for _ in range(MAX_RETRIES):
            try:
                self._calls.advise(address, length, MADV_POPULATE_WRITE)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    self._can_populate = False
                    return False
                if error.errno not in (errno.EAGAIN, errno.EINTR):
                    raise
            else:
                return True
        raise BackingError(f"the system put {format_bytes(length)} off {MAX_RETRIES} times")

    def _discard(self, address: int, length: int) -> None:
        """Give a range's memory back; it reads zero from now on, or faults when protected."""
        self._calls.advise(address, length, MADV_DONTNEED)
        if self._debug_protect:
            # refused only when the process has too many mappings: a debug aid may not fail more
            with suppress(OSError):
                self._calls.protect(address, length, accessible=False)

    def _restore(self, ranges: list[tuple[int, int]]) -> None:
        """Put memory under what a refused unmap had given back already."""
        for address, length in ranges:
            if self._debug_protect:
                try:
                    self._calls.protect(address, length, accessible=True)
                except OSError as error:
                    raise InvariantError(f"mapped KV memory was lost: {error}") from error
            # what can't be had now comes with the first write
            with suppress(OSError, BackingError):
                self._populate(address, length)

    def _check_headroom(self, wanted_bytes: int) -> None:
        available = self._available()
        if wanted_bytes + self._margin_bytes > available:
            raise BackingError(
                f"{format_bytes(wanted_bytes)} wanted, {format_bytes(available)} available, of "
                f"which {format_bytes(self._margin_bytes)} are left to the rest of the machine"
            )


def _pieces(address: int, length: int) -> Iterator[tuple[int, int]]:
    """(address, length) of the parts of a range that one system call populates."""
    for offset in range(0, length, PIECE_BYTES):
        yield address + offset, min(PIECE_BYTES, length - offset)


def unsupported_reason(root: Path = Path("/")) -> str | None:
    """Why this machine can't hold an elastic range, or None when it can."""
    if sys.platform != "linux":
        return f"the mmap backing needs Linux, this is {sys.platform}"
    if overcommit_is_strict(root):
        # Reserving inaccessible and opening each segment would work, but every open segment is
        # then a kernel mapping of its own per plane, and closing it gives the charge not back.
        return "the system's strict overcommit (vm.overcommit_memory=2) charges address space"
    return None


def read_huge_page_bytes(root: Path = Path("/")) -> int:
    """Size of a transparent huge page; 0 when the system has none or never uses them."""
    directory = root / "sys/kernel/mm/transparent_hugepage"
    try:
        if "[never]" in (directory / "enabled").read_text():
            return 0
        return int((directory / "hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return 0

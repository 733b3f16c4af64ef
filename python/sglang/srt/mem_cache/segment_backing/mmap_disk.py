"""The mmap backing with a disk tier: a segment's range is private memory, or a part of a file.

Either way it lies at the same addresses, so nothing above the backing knows which, and the system
reads what is on disk when it is touched and keeps as much of it in memory as nobody else wants.
Called by the segment manager only. See docs/kv_segments.md, Note [The tier below].
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Unpack

from sglang.srt.errors import BackingError, InvariantError
from sglang.srt.mem_cache.kv_layout import GroupId, KVCacheSpec, SegmentId, SegmentLayout
from sglang.srt.mem_cache.segment_backing.disk_file import DiskFile
from sglang.srt.mem_cache.segment_backing.host_calls import MADV_DONTDUMP, MADV_DONTFORK
from sglang.srt.mem_cache.segment_backing.mmap import MmapBacking, MmapOptions
from sglang.srt.utils.sizes import format_bytes


class MmapDiskBacking(MmapBacking):
    """`MmapBacking` whose segments may also lie in `disk`, which it owns from here on."""

    lower_tier = "disk"
    promotes = False  # the system keeps in memory what is read

    def __init__(self, disk: DiskFile, **options: Unpack[MmapOptions]) -> None:
        super().__init__(**options)
        self._disk = disk

    def reserve(self, spec: KVCacheSpec, layouts: tuple[SegmentLayout, ...]) -> None:
        """See SegmentBacking. The file becomes as long as the range; it takes no space yet."""
        super().reserve(spec, layouts)
        try:
            self._disk.extend(self._length)
        except BackingError:
            self.close()
            raise

    def map_lower(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        """See TieredBacking. New segments read zero."""
        ranges = list(self._ranges(group, self._runs(group, segments)))
        mapped: list[tuple[int, int]] = []
        self._take_space(ranges, "map", len(segments))
        try:
            for address, length in ranges:
                self._to_file(address, length)
                mapped.append((address, length))
        except OSError as error:
            for plane, address, length in self._plane_ranges(group, self._runs(group, segments)):
                if (address, length) in mapped:
                    self._to_memory(address, length, huge=plane.huge, closed=self._debug_protect)
            self._give_space(ranges)
            raise BackingError(f"can't map {_many(segments)} on disk: {error}") from error

    def unmap_lower(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        """See TieredBacking. The space is back with the file system when this returns."""
        ranges = list(self._plane_ranges(group, self._runs(group, segments)))
        done: list[tuple[int, int]] = []
        try:
            for plane, address, length in ranges:
                self._to_memory(address, length, huge=plane.huge, closed=self._debug_protect)
                done.append((address, length))
        except OSError as error:
            try:
                for address, length in done:
                    self._to_file(address, length)
            except OSError as second:
                raise InvariantError(f"KV segments on disk were lost: {second}") from error
            raise BackingError(f"can't unmap {_many(segments)} on disk: {error}") from error
        self._give_space([(address, length) for _, address, length in ranges])

    def demote(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        """See TieredBacking. The memory is back with the system when this returns."""
        ranges = list(self._plane_ranges(group, self._runs(group, segments)))
        spans = [(address, length) for _, address, length in ranges]
        moved: list[tuple[int, int, bool]] = []
        self._take_space(spans, "move", len(segments))
        try:
            for address, length in spans:
                self._disk.write_from(address, address - self._base, length)
            for plane, address, length in ranges:
                self._to_file(address, length)
                moved.append((address, length, plane.huge))
        except OSError as error:
            for address, length, huge in moved:
                self._back_from_file(address, length, huge=huge)
            self._give_space(spans)
            raise BackingError(f"can't move {_many(segments)} to disk: {error}") from error

    def promote(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        """See TieredBacking. The disk space is back with the file system when this returns.

        What came back stays a mapping of the system's of its own, so this is for few segments.
        """
        ranges = list(self._plane_ranges(group, self._runs(group, segments)))
        copies: list[tuple[int, int, int]] = []  # where a copy is, its place, its length
        self._check_headroom(sum(length for _, _, length in ranges))
        try:
            for plane, address, length in ranges:
                copies.append((self._copy_of(address, length, huge=plane.huge), address, length))
        except OSError as error:
            for copy, _, length in copies:
                self._calls.release(copy, length)
            raise BackingError(f"can't move {_many(segments)} from disk: {error}") from error
        try:
            for copy, address, length in copies:
                self._calls.move(copy, length, address)
        except OSError as error:
            raise InvariantError(f"KV memory on disk can't be had back: {error}") from error
        self._give_space([(address, length) for _, address, length in ranges])

    def lower_bytes(self) -> int:
        """See TieredBacking: what the file system says that it holds."""
        return self._disk.stored_bytes()

    def close(self) -> None:
        """See SegmentBacking."""
        super().close()
        self._disk.close()

    # ---- one range -----------------------------------------------------------------------------

    def _take_space(self, ranges: Sequence[tuple[int, int]], verb: str, count: int) -> None:
        """Disk space for all ranges, or for none and BackingError."""
        taken: list[tuple[int, int]] = []
        try:
            for address, length in ranges:
                self._disk.take(address - self._base, length)
                taken.append((address, length))
        except OSError as error:
            self._give_space(taken)
            total = format_bytes(sum(length for _, length in ranges))
            raise BackingError(
                f"can't {verb} {count} KV segments ({total}) to {self._disk.directory}: {error}"
            ) from error

    def _give_space(self, ranges: Sequence[tuple[int, int]]) -> None:
        for address, length in ranges:
            self._disk.give_back(address - self._base, length)

    def _to_file(self, address: int, length: int) -> None:
        """Put the file under a range, in one step; its memory is back with the system."""
        self._calls.map_file(address, length, self._disk.fd, address - self._base)
        # advice that keeps memory out of children and core files; without it nothing is wrong
        with suppress(OSError):
            self._calls.advise(address, length, MADV_DONTFORK)
            self._calls.advise(address, length, MADV_DONTDUMP)

    def _to_memory(self, address: int, length: int, *, huge: bool, closed: bool) -> None:
        """Make a range private memory again, of which nothing is taken yet. Raises OSError.

        It gets the advice of the rest of its plane, so that the system joins it with that.
        """
        self._calls.reserve_again(address, length, accessible=not closed)
        with suppress(OSError):
            self._advise(address, length, huge=huge)

    def _back_from_file(self, address: int, length: int, *, huge: bool) -> None:
        """Undo `_to_file` while others read: the content returns to memory, in one step.

        Raises InvariantError when it can't: the memory would be counted twice from here on.
        """
        try:
            self._calls.move(self._copy_of(address, length, huge=huge), length, address)
        except OSError as error:
            raise InvariantError(f"KV memory on disk can't be had back: {error}") from error

    def _copy_of(self, address: int, length: int, *, huge: bool) -> int:
        """Private memory elsewhere with a range's bytes on disk; its address. Raises OSError."""
        copy = self._calls.reserve(length)
        try:
            self._calls.protect(copy, length, accessible=True)
            self._advise(copy, length, huge=huge)
            self._disk.read_into(copy, address - self._base, length)
        except OSError:
            self._calls.release(copy, length)
            raise
        return copy


def _many(segments: Sequence[SegmentId]) -> str:
    return f"{len(segments)} KV segments"

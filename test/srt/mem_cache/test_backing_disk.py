"""Segments on disk under their old addresses: contents, space, mappings, and every refusal."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from sglang.srt.errors import BackingError, InvariantError
from sglang.srt.mem_cache.kv_layout import (
    GroupId,
    KVCacheSpec,
    KVGroupSpec,
    SegmentId,
    SegmentLayout,
)
from sglang.srt.mem_cache.segment_backing import Plane, make_backing
from sglang.srt.mem_cache.segment_backing.base import TieredBacking
from sglang.srt.mem_cache.segment_backing.disk_file import DiskFile
from sglang.srt.mem_cache.segment_backing.host_calls import HostCalls
from sglang.srt.mem_cache.segment_backing.mmap import MmapBacking
from sglang.srt.mem_cache.segment_backing.mmap_disk import MmapDiskBacking
from sglang.srt.mem_cache.segment_cuts import (
    make_segment_layouts,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the mmap backing needs Linux")

G = GroupId(0)
SPEC = KVCacheSpec((KVGroupSpec((0, 1)),), 2, 16, 8, "float32", 16)


class Refusing(HostCalls):
    """Refuses a kind of call once it was made so many times; -1: never."""

    def __init__(self) -> None:
        super().__init__()
        self.left = {"map_file": -1, "reserve_again": -1, "move": -1}

    def _count(self, name: str) -> None:
        if self.left[name] == 0:
            raise OSError(errno.ENOMEM, f"{name}: refused")
        self.left[name] -= 1

    def map_file(self, address: int, length: int, fd: int, offset: int) -> None:
        self._count("map_file")
        super().map_file(address, length, fd, offset)

    def reserve_again(self, address: int, length: int, *, accessible: bool = False) -> None:
        self._count("reserve_again")
        super().reserve_again(address, length, accessible=accessible)

    def move(self, source: int, length: int, target: int) -> None:
        self._count("move")
        super().move(source, length, target)


def ids(*numbers: int) -> tuple[SegmentId, ...]:
    return tuple(SegmentId(n) for n in numbers)


def small_layouts() -> tuple[SegmentLayout, ...]:
    return make_segment_layouts(
        SPEC,
        slots_per_segment=64,
        auto_segment_bytes=1,
        auto_min_slots=1,
        granule_bytes=mmap.PAGESIZE,
        machine_bytes=4 << 20,
        budget_bytes=0,
    )


@contextmanager
def opened(
    directory: Path,
    *,
    calls: HostCalls | None = None,
    disk: DiskFile | None = None,
    debug_protect: bool = False,
) -> Iterator[tuple[MmapDiskBacking, SegmentLayout]]:
    backing = MmapDiskBacking(disk or DiskFile(directory), calls=calls, debug_protect=debug_protect)
    layouts = small_layouts()
    try:
        backing.reserve(SPEC, layouts)
        yield backing, layouts[0]
    finally:
        backing.close()


def planes(backing: MmapBacking) -> list[torch.Tensor]:
    return [backing.view(layer, plane) for layer in (0, 1) for plane in (Plane.KEY, Plane.VALUE)]


def fill(backing: MmapBacking, layout: SegmentLayout, *segments: int) -> None:
    """Every number of a plane's part says where it stands."""
    size = layout.slots_per_segment
    for number, view in enumerate(planes(backing)):
        for segment in segments:
            part = view[segment * size : (segment + 1) * size]
            part.copy_(expected(number, segment, part.shape))


def expected(number: int, segment: int, shape: torch.Size) -> torch.Tensor:
    numbers = torch.arange(shape.numel(), dtype=torch.float32).reshape(shape)
    return numbers + 1_000_000 * segment + 100_000 * number


def holds(backing: MmapBacking, layout: SegmentLayout, *segments: int) -> bool:
    size = layout.slots_per_segment
    return all(
        torch.equal(
            view[segment * size : (segment + 1) * size],
            expected(number, segment, view[:size].shape),
        )
        for number, view in enumerate(planes(backing))
        for segment in segments
    )


def mappings_of(backing: MmapBacking) -> int:
    """Kernel mappings inside the reserved range."""
    low, high = backing._address, backing._address + backing._length
    count = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, _, end = line.split()[0].partition("-")
        count += low <= int(start, 16) and int(end, 16) <= high
    return count


def test_contents_stay_when_a_segment_goes_to_disk_and_memory_comes_back(tmp_path: Path) -> None:
    with opened(tmp_path) as (backing, layout):
        idle = backing.resident_bytes()
        assert idle == layout.fixed_bytes
        backing.map(G, ids(1, 2, 3, 5))
        fill(backing, layout, 1, 2, 3, 5)
        backing.demote(G, ids(1, 3))
        assert backing.resident_bytes() == idle + 2 * layout.segment_bytes
        assert backing.lower_bytes() >= 2 * layout.segment_bytes
        assert holds(backing, layout, 1, 2, 3, 5)
        fill(backing, layout, 3)  # what lies on disk may be written too
        assert holds(backing, layout, 1, 2, 3, 5)
        backing.unmap_lower(G, ids(1, 3))
        backing.unmap(G, ids(2, 5))
        assert backing.resident_bytes() == idle
        assert backing.lower_bytes() == 0
        assert not any(view[layout.slots_per_segment :].any() for view in planes(backing))
        backing.map(G, ids(1, 2, 3, 5))  # and the ranges serve again
        fill(backing, layout, 1, 2, 3, 5)
        assert holds(backing, layout, 1, 2, 3, 5)


def test_what_is_on_disk_is_read_from_there(tmp_path: Path) -> None:
    with opened(tmp_path) as (backing, layout):
        backing.map(G, ids(1, 2))
        fill(backing, layout, 1, 2)
        backing.demote(G, ids(1, 2))
        os.fsync(backing._disk.fd)
        os.posix_fadvise(backing._disk.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert holds(backing, layout, 1, 2)


def test_segments_can_begin_on_disk(tmp_path: Path) -> None:
    with opened(tmp_path) as (backing, layout):
        assert isinstance(backing, TieredBacking)
        backing.map_lower(G, ids(2, 3))
        assert backing.lower_bytes() >= 2 * layout.segment_bytes
        assert not any(view[layout.slots_per_segment :].any() for view in planes(backing))
        fill(backing, layout, 2, 3)
        assert holds(backing, layout, 2, 3)
        assert backing.resident_bytes() == layout.fixed_bytes
        backing.unmap_lower(G, ids(2, 3))
        assert backing.lower_bytes() == 0


def test_contents_come_back_to_memory_and_the_space_goes(tmp_path: Path) -> None:
    with opened(tmp_path) as (backing, layout):
        backing.map(G, ids(1, 2, 3))
        fill(backing, layout, 1, 2, 3)
        mappings, resident = mappings_of(backing), backing.resident_bytes()
        backing.demote(G, ids(1, 3))
        fill(backing, layout, 3)
        before = backing.lower_bytes()
        backing.promote(G, ids(3))
        assert holds(backing, layout, 1, 2, 3)
        assert backing.lower_bytes() <= before - layout.segment_bytes
        backing.promote(G, ids(1))
        assert holds(backing, layout, 1, 2, 3)
        assert backing.lower_bytes() == 0
        assert backing.resident_bytes() == resident
        assert mappings_of(backing) <= mappings + 2 * 8, "each part that came is by itself"
        backing.unmap(G, ids(1, 2, 3))
        backing.map(G, ids(1))
        fill(backing, layout, 1)
        assert holds(backing, layout, 1)


class Unreadable(DiskFile):
    """Fails to read once it was asked so many times."""

    left = -1

    def read_into(self, address: int, offset: int, length: int) -> None:
        if self.left == 0:
            raise OSError(errno.EIO, "read: refused")
        self.left -= 1
        super().read_into(address, offset, length)


@pytest.mark.parametrize("after", range(4))
def test_a_read_that_fails_leaves_the_segments_on_disk(tmp_path: Path, after: int) -> None:
    disk = Unreadable(tmp_path)
    with opened(tmp_path, disk=disk) as (backing, layout):
        backing.map(G, ids(2))
        fill(backing, layout, 2)
        backing.demote(G, ids(2))
        stored, lines = backing.lower_bytes(), len(Path("/proc/self/maps").read_text().splitlines())
        disk.left = after
        with pytest.raises(BackingError, match=r"can't move 1 KV segments from disk: .*refused"):
            backing.promote(G, ids(2))
        assert backing.lower_bytes() == stored
        assert len(Path("/proc/self/maps").read_text().splitlines()) <= lines, "copies are gone"
        disk.left = -1
        assert holds(backing, layout, 2)
        backing.promote(G, ids(2))
        assert holds(backing, layout, 2)


def test_what_memory_has_no_room_for_stays_on_disk(tmp_path: Path) -> None:
    available = [1 << 40]
    backing = MmapDiskBacking(
        DiskFile(tmp_path), available_bytes=lambda: available[0], margin_bytes=0
    )
    (layout,) = small_layouts()
    backing.reserve(SPEC, (layout,))
    try:
        backing.map(G, ids(1, 2))
        fill(backing, layout, 1, 2)
        backing.demote(G, ids(1, 2))
        available[0] = 2 * layout.segment_bytes - 1
        with pytest.raises(BackingError, match="wanted"):
            backing.promote(G, ids(1, 2))
        backing.promote(G, ids(2))
        assert holds(backing, layout, 1, 2)
    finally:
        backing.close()


def test_neighbours_on_disk_are_one_mapping_and_leave_none_behind(tmp_path: Path) -> None:
    with opened(tmp_path) as (backing, layout):
        backing.map(G, ids(*range(1, 17)))
        before = mappings_of(backing)
        for segment in range(1, 17):
            backing.demote(G, ids(segment))
        on_disk = mappings_of(backing)
        assert on_disk <= before + 2 * len(planes(backing))  # a run per plane, and what is behind
        backing.unmap_lower(G, ids(*range(1, 17)))
        assert mappings_of(backing) == before
        assert layout.max_segments > 17


def test_who_reads_meanwhile_never_sees_anything_else(tmp_path: Path) -> None:
    with opened(tmp_path) as (backing, layout):
        segments = range(1, 33)
        backing.map(G, ids(*segments))
        fill(backing, layout, *segments)
        stop = threading.Event()
        wrong: list[int] = []
        rounds = [0]

        def read() -> None:
            while not stop.is_set():
                for segment in segments:
                    if not holds(backing, layout, segment):
                        wrong.append(segment)
                rounds[0] += 1

        reader = threading.Thread(target=read)
        reader.start()
        for segment in segments:
            backing.demote(G, ids(segment))
        before = rounds[0]
        while rounds[0] == before and reader.is_alive():
            stop.wait(0.001)
        stop.set()
        reader.join()
        assert wrong == []


@pytest.mark.parametrize("debug_protect", [False, True])
def test_a_full_disk_changes_nothing(tmp_path: Path, debug_protect: bool) -> None:
    left = [5]

    def allocate(fd: int, offset: int, length: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.posix_fallocate(fd, offset, length)

    disk = DiskFile(tmp_path, allocate=allocate)
    with opened(tmp_path, disk=disk, debug_protect=debug_protect) as (backing, layout):
        backing.map(G, ids(1, 2, 3))
        fill(backing, layout, 1, 2, 3)
        backing.demote(G, ids(1))  # four planes
        before = backing.lower_bytes()
        with pytest.raises(BackingError, match="No space left"):
            backing.demote(G, ids(2))
        with pytest.raises(BackingError, match="No space left"):
            backing.map_lower(G, ids(4))
        assert backing.lower_bytes() < before + layout.segment_bytes  # blocks of its bookkeeping
        assert backing.resident_bytes() == layout.fixed_bytes + 2 * layout.segment_bytes
        assert holds(backing, layout, 1, 2, 3)
        left[0] = 8
        backing.demote(G, ids(2))
        assert holds(backing, layout, 1, 2, 3)


def test_a_write_that_fails_changes_nothing(tmp_path: Path) -> None:
    def write(fd: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with opened(tmp_path, disk=DiskFile(tmp_path, write=write)) as (backing, layout):
        backing.map(G, ids(1))
        fill(backing, layout, 1)
        with pytest.raises(BackingError, match="Input/output error"):
            backing.demote(G, ids(1))
        assert backing.lower_bytes() == 0
        assert holds(backing, layout, 1)


def test_short_writes_are_gone_on_with(tmp_path: Path) -> None:
    def write(fd: int, data: memoryview, offset: int) -> int:
        return os.pwrite(fd, data[: max(1, len(data) // 3)], offset)

    with opened(tmp_path, disk=DiskFile(tmp_path, write=write)) as (backing, layout):
        backing.map(G, ids(1, 2))
        fill(backing, layout, 1, 2)
        backing.demote(G, ids(1, 2))
        assert holds(backing, layout, 1, 2)


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_a_mapping_that_is_refused_brings_every_plane_back(tmp_path: Path, after: int) -> None:
    calls = Refusing()
    with opened(tmp_path, calls=calls) as (backing, layout):
        backing.map(G, ids(1, 2))
        fill(backing, layout, 1, 2)
        before = backing.resident_bytes()
        calls.left["map_file"] = after
        with pytest.raises(BackingError, match="map_file: refused"):
            backing.demote(G, ids(1, 2))
        assert backing.resident_bytes() == before
        assert backing.lower_bytes() == 0
        assert holds(backing, layout, 1, 2)
        with pytest.raises(BackingError, match="map_file: refused"):
            backing.map_lower(G, ids(3))
        assert backing.resident_bytes() == before
        calls.left["map_file"] = -1
        backing.demote(G, ids(1, 2))
        assert holds(backing, layout, 1, 2)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_unmap_that_is_refused_leaves_the_segments_on_disk(tmp_path: Path, after: int) -> None:
    calls = Refusing()
    with opened(tmp_path, calls=calls) as (backing, layout):
        backing.map_lower(G, ids(1))
        fill(backing, layout, 1)
        calls.left["reserve_again"] = after
        with pytest.raises(BackingError, match="reserve_again: refused"):
            backing.unmap_lower(G, ids(1))
        assert holds(backing, layout, 1)
        assert backing.resident_bytes() == layout.fixed_bytes
        calls.left["reserve_again"] = -1
        backing.unmap_lower(G, ids(1))
        assert backing.lower_bytes() == 0


def test_memory_that_is_lost_is_no_ordinary_refusal(tmp_path: Path) -> None:
    calls = Refusing()
    with opened(tmp_path, calls=calls) as (backing, layout):
        backing.map(G, ids(1))
        fill(backing, layout, 1)
        calls.left.update(map_file=2, move=0)
        with pytest.raises(InvariantError, match="can't be had back"):
            backing.demote(G, ids(1))


def test_a_directory_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(BackingError, match=r"can't keep KV segments in .*nowhere"):
        DiskFile(tmp_path / "nowhere")


def test_only_memory_of_a_cpu_that_is_mapped_has_a_disk(tmp_path: Path) -> None:
    backing = make_backing("auto", disk_path=tmp_path)
    assert isinstance(backing, TieredBacking)
    backing.close()
    assert not isinstance(make_backing("mmap"), TieredBacking)
    for kind, device in (("static", "cpu"), ("segment_table", "cpu"), ("auto", "cuda")):
        with pytest.raises(BackingError, match="only the mmap backing, on a CPU"):
            make_backing(kind, device=device, disk_path=tmp_path)
    with pytest.raises(BackingError, match="can't keep KV segments in"):
        make_backing("auto", disk_path=tmp_path / "nowhere")


def test_a_file_without_a_name_leaves_nothing_in_its_directory(tmp_path: Path) -> None:
    with opened(tmp_path) as (backing, _):
        backing.map_lower(G, ids(1))
        assert list(tmp_path.iterdir()) == []


def test_protected_segments_are_reached_on_disk_and_not_after(tmp_path: Path) -> None:
    with opened(tmp_path, debug_protect=True) as (backing, layout):
        backing.map(G, ids(1))
        backing.map_lower(G, ids(2))
        fill(backing, layout, 1, 2)
        backing.demote(G, ids(1))
        assert holds(backing, layout, 1, 2)
        backing.unmap_lower(G, ids(1, 2))
        backing.map(G, ids(1))
        fill(backing, layout, 1)
        assert holds(backing, layout, 1)


def test_a_stray_access_after_an_unmap_lower_ends_the_process(tmp_path: Path) -> None:
    script = f"""
import pathlib
from test_backing_disk import G, fill, ids, opened, planes
with opened(pathlib.Path({str(tmp_path)!r}), debug_protect=True) as (backing, layout):
    backing.map_lower(G, ids(1))
    fill(backing, layout, 1)
    backing.unmap_lower(G, ids(1))
    print("unmapped", flush=True)
    planes(backing)[0][layout.slots_per_segment].sum().item()
    print("read", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "unmapped\n"
    assert done.returncode == -11

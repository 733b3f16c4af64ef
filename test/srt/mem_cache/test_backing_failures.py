"""The mmap backing on a machine that refuses: call number n fails, for every n of a map."""

from __future__ import annotations

import errno
import mmap
import os
import sys

import pytest

from sglang.srt.errors import BackingError, InvariantError
from sglang.srt.mem_cache.kv_layout import (
    GroupId,
    KVCacheSpec,
    KVGroupSpec,
    SegmentId,
    SegmentLayout,
)
from sglang.srt.mem_cache.segment_backing import Plane
from sglang.srt.mem_cache.segment_backing.host_calls import (
    MADV_DONTNEED,
    MADV_NOHUGEPAGE,
    MADV_POPULATE_WRITE,
    HostCalls,
    sum_smaps_resident,
)
from sglang.srt.mem_cache.segment_backing.mmap import MAX_RETRIES, PIECE_BYTES, MmapBacking
from sglang.srt.mem_cache.segment_cuts import (
    make_segment_layouts,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the mmap backing needs Linux")

MIB = 1 << 20
G = GroupId(0)
SPEC = KVCacheSpec((KVGroupSpec((0, 1)),), 2, 16, 16, "float32", 16)  # 4 planes, 128 B a slot
PLENTY = 1 << 50
EHWPOISON = 133  # Linux; a page of the range is broken hardware (not in the errno module)


class FailingCalls(HostCalls):
    """Real calls, of which chosen ones fail: by advice and by their number from now on."""

    def __init__(self) -> None:
        super().__init__()
        self.advice_error: dict[int, int] = {}  # advice -> errno
        self.failing: set[int] = set()  # numbers of failing calls with that advice; empty: all
        self.num_advised = 0
        self.num_filled = 0
        self.largest_populated = 0
        self.populated: list[int] = []  # addresses
        self.protect_error: int | None = None
        self.failing_protects: set[int] = set()  # numbers of failing ones; empty: all
        self.num_protected = 0
        self.reserve_error: int | None = None

    def reserve(self, length: int) -> int:
        if self.reserve_error is not None:
            raise OSError(self.reserve_error, os.strerror(self.reserve_error))
        return super().reserve(length)

    def protect(self, address: int, length: int, *, accessible: bool) -> None:
        if self.protect_error is not None:
            self.num_protected += 1
            if not self.failing_protects or self.num_protected in self.failing_protects:
                raise OSError(self.protect_error, os.strerror(self.protect_error))
        super().protect(address, length, accessible=accessible)

    def advise(self, address: int, length: int, advice: int) -> None:
        if advice == MADV_POPULATE_WRITE:
            self.largest_populated = max(self.largest_populated, length)
            self.populated.append(address)
        number = self.advice_error.get(advice)
        if number is not None:
            self.num_advised += 1
            if not self.failing or self.num_advised in self.failing:
                raise OSError(number, os.strerror(number))
        super().advise(address, length, advice)

    def fill_zero(self, address: int, length: int) -> None:
        self.num_filled += 1
        super().fill_zero(address, length)


def make_layouts(slots: int = 64) -> tuple[SegmentLayout, ...]:
    return make_segment_layouts(
        SPEC,
        slots_per_segment=slots,
        auto_segment_bytes=1,
        auto_min_slots=1,
        granule_bytes=mmap.PAGESIZE,
        machine_bytes=64 * MIB,
        budget_bytes=0,
    )


def ids(*segments: int) -> list[SegmentId]:
    return [SegmentId(segment) for segment in segments]


@pytest.mark.parametrize("debug_protect", [False, True])
@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EFAULT, EHWPOISON])
def test_whichever_call_of_a_map_fails_nothing_stays(number: int, debug_protect: bool) -> None:
    calls = FailingCalls()
    layouts = make_layouts()
    backing = MmapBacking(calls=calls, debug_protect=debug_protect)
    backing.reserve(SPEC, layouts)
    backing.map(G, ids(2))
    before = backing.resident_bytes()
    calls.advice_error = {MADV_POPULATE_WRITE: number}
    for failing in range(1, 8 + 1):  # 4 planes x 2 runs
        calls.num_advised = 0
        calls.failing = {failing}
        with pytest.raises(BackingError, match=f"map 3 KV segments.*{os.strerror(number)}"):
            backing.map(G, ids(1, 3, 4))
        assert calls.num_advised == failing
        assert backing.resident_bytes() == before
    calls.num_advised = 0
    calls.failing = {9}
    backing.map(G, ids(1, 3, 4))
    assert calls.num_advised == 8
    assert backing.resident_bytes() == (before or 0) + 3 * layouts[0].segment_bytes
    backing.close()


def test_threads_that_map_together_end_together() -> None:
    """After a refusal nobody begins another piece; then all pieces are mapped, each once."""
    calls = FailingCalls()
    layouts = make_layouts()
    backing = MmapBacking(calls=calls, num_threads=3)
    backing.reserve(SPEC, layouts)
    before = backing.resident_bytes()
    calls.advice_error = {MADV_POPULATE_WRITE: errno.ENOMEM}
    with pytest.raises(BackingError, match="map 5 KV segments"):
        backing.map(G, ids(1, 3, 5, 7, 9))
    assert 1 <= calls.num_advised <= 3  # of 4 planes x 5 runs
    assert backing.resident_bytes() == before
    calls.advice_error = {}
    calls.populated.clear()
    backing.map(G, ids(1, 3, 5, 7, 9))
    assert len(set(calls.populated)) == len(calls.populated) == 20
    assert backing.resident_bytes() == (before or 0) + 5 * layouts[0].segment_bytes
    backing.close()


def test_whichever_call_of_reserve_fails_nothing_is_held() -> None:
    failures = [{MADV_POPULATE_WRITE: errno.ENOMEM}, {10: errno.EINVAL}, {16: errno.EINVAL}]
    for advice_error in failures:
        for failing in range(1, 5):
            calls = FailingCalls()
            calls.advice_error, calls.failing = dict(advice_error), {failing}
            backing = MmapBacking(calls=calls)
            with pytest.raises(BackingError, match="can't prepare"):
                backing.reserve(SPEC, make_layouts())
            assert calls.num_advised == failing
            assert backing.resident_bytes() is None
            calls.advice_error = {}
            backing.reserve(SPEC, make_layouts())  # nothing stands in the way of another try
            backing.close()


def test_no_address_space_is_a_clear_error() -> None:
    calls = FailingCalls()
    calls.reserve_error = errno.ENOMEM
    with pytest.raises(BackingError, match=r"can't reserve .* address space.*ulimit -v"):
        MmapBacking(calls=calls).reserve(SPEC, make_layouts())


def test_a_kernel_without_huge_pages() -> None:
    calls = FailingCalls()
    calls.advice_error = {MADV_NOHUGEPAGE: errno.EINVAL}
    backing = MmapBacking(calls=calls)
    backing.reserve(SPEC, make_layouts())
    backing.map(G, ids(1))
    backing.close()


def test_a_kernel_without_populate_touches_the_pages() -> None:
    calls = FailingCalls()
    calls.advice_error = {MADV_POPULATE_WRITE: errno.EINVAL}
    layouts = make_layouts()
    backing = MmapBacking(calls=calls, available_bytes=lambda: PLENTY)
    backing.reserve(SPEC, layouts)
    assert calls.num_advised == 1  # asked once, remembered
    backing.map(G, ids(1, 2))
    assert calls.num_advised == 1
    assert calls.num_filled == 8
    fixed = layouts[0].fixed_bytes
    assert backing.resident_bytes() == fixed + 2 * layouts[0].segment_bytes
    first = layouts[0].slots_per_segment
    assert backing.view(0, Plane.KEY)[first : 2 * first].count_nonzero() == 0
    backing.unmap(G, ids(2))
    assert backing.resident_bytes() == fixed + layouts[0].segment_bytes
    backing.close()


def test_touching_stops_when_the_headroom_is_gone_in_between() -> None:
    calls = FailingCalls()
    calls.advice_error = {MADV_POPULATE_WRITE: errno.EINVAL}
    figures = iter([PLENTY] * 9 + [0] * 9)
    layouts = make_layouts()
    backing = MmapBacking(calls=calls, available_bytes=lambda: next(figures))
    backing.reserve(SPEC, layouts)  # 1 + 4 questions
    with pytest.raises(BackingError, match="0 B available"):
        backing.map(G, ids(1, 3))  # 1 + 3 good answers
    assert calls.num_filled == 4 + 3
    assert backing.resident_bytes() == layouts[0].fixed_bytes
    backing.close()


def test_headroom_is_looked_at_before_anything_is_done() -> None:
    layouts = make_layouts()
    size = layouts[0].segment_bytes
    available = [PLENTY]
    calls = FailingCalls()
    backing = MmapBacking(calls=calls, available_bytes=lambda: available[0], margin_bytes=1000)
    backing.reserve(SPEC, layouts)
    calls.advice_error = {MADV_POPULATE_WRITE: errno.ENOMEM}
    available[0] = 2 * size + 999
    with pytest.raises(BackingError, match="wanted"):
        backing.map(G, ids(1, 2))
    assert calls.num_advised == 0
    calls.advice_error = {}
    available[0] = 2 * size + 1000
    backing.map(G, ids(1, 2))
    backing.close()


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EINTR])
def test_try_again_is_tried_again_but_not_for_ever(number: int) -> None:
    calls = FailingCalls()
    backing = MmapBacking(calls=calls)
    backing.reserve(SPEC, make_layouts())
    calls.advice_error = {MADV_POPULATE_WRITE: number}
    calls.failing = {1, 2, 3}
    backing.map(G, ids(1))
    assert calls.num_advised == 4 + 3
    calls.failing, calls.num_advised = set(), 0
    with pytest.raises(BackingError, match=f"{MAX_RETRIES} times"):
        backing.map(G, ids(2))
    assert calls.num_advised == MAX_RETRIES
    backing.close()


def test_memory_is_populated_in_small_pieces() -> None:
    calls = FailingCalls()
    backing = MmapBacking(calls=calls)
    backing.reserve(SPEC, make_layouts(slots=16384))  # 2 MiB a plane
    backing.map(G, ids(1, 2, 3, 4))
    assert calls.largest_populated == PIECE_BYTES
    backing.close()


def test_a_refused_unmap_is_a_backing_error() -> None:
    calls = FailingCalls()
    backing = MmapBacking(calls=calls)
    backing.reserve(SPEC, make_layouts())
    backing.map(G, ids(1))
    calls.advice_error = {MADV_DONTNEED: errno.EINVAL}
    with pytest.raises(BackingError, match="can't unmap 1 KV segments"):
        backing.unmap(G, ids(1))
    calls.advice_error = {}
    backing.unmap(G, ids(1))
    backing.close()


@pytest.mark.parametrize("debug_protect", [False, True])
@pytest.mark.parametrize("populates", [True, False])
def test_whichever_call_of_an_unmap_fails_all_of_it_stays_mapped(
    debug_protect: bool, populates: bool
) -> None:
    """Half of the planes without memory is neither mapped nor unmapped; used, it may end us."""
    calls = FailingCalls()
    if not populates:
        calls.advice_error = {MADV_POPULATE_WRITE: errno.EINVAL}
    layouts = make_layouts()
    backing = MmapBacking(calls=calls, debug_protect=debug_protect, available_bytes=lambda: PLENTY)
    backing.reserve(SPEC, layouts)
    backing.map(G, ids(1, 2, 3, 4))
    before = backing.resident_bytes()
    size = layouts[0].slots_per_segment
    planes = [backing.view(layer, plane) for layer in (0, 1) for plane in (Plane.KEY, Plane.VALUE)]
    calls.advice_error[MADV_DONTNEED] = errno.EINVAL
    for failing in range(1, 8 + 1):  # 4 planes x 2 runs
        for plane in planes:
            plane[size : 5 * size] = float(failing)
        calls.num_advised, calls.failing = 0, {failing}
        with pytest.raises(BackingError, match="can't unmap 3 KV segments"):
            backing.unmap(G, ids(1, 3, 4))
        assert backing.resident_bytes() == before
        for plane in planes:
            assert plane[2 * size : 3 * size].eq(failing).all()  # nobody asked for segment 2
    calls.num_advised, calls.failing = 0, {9}
    backing.unmap(G, ids(1, 3, 4))
    assert calls.num_advised == 8
    assert backing.resident_bytes() == layouts[0].fixed_bytes + layouts[0].segment_bytes
    backing.close()


def test_protection_that_can_not_be_lifted_after_a_refused_unmap_is_told() -> None:
    calls = FailingCalls()
    backing = MmapBacking(calls=calls, debug_protect=True)
    backing.reserve(SPEC, make_layouts())
    backing.map(G, ids(1))
    calls.advice_error, calls.failing = {MADV_DONTNEED: errno.EINVAL}, {2}
    calls.protect_error, calls.failing_protects = errno.ENOMEM, {2}
    with pytest.raises(InvariantError, match="mapped KV memory was lost"):
        backing.unmap(G, ids(1))
    backing.close()


def test_whichever_protection_of_a_map_fails_nothing_stays() -> None:
    calls = FailingCalls()
    layouts = make_layouts()
    backing = MmapBacking(calls=calls, debug_protect=True)
    backing.reserve(SPEC, layouts)
    backing.map(G, ids(2))
    size = layouts[0].slots_per_segment
    between = backing.view(1, Plane.VALUE)[2 * size : 3 * size]
    between.fill_(5.0)
    before = backing.resident_bytes()
    calls.protect_error = errno.ENOMEM
    for failing in range(1, 8 + 1):
        calls.num_protected, calls.failing_protects = 0, {failing}
        with pytest.raises(BackingError, match="can't map 3 KV segments"):
            backing.map(G, ids(1, 3, 4))
        assert backing.resident_bytes() == before
        assert between.eq(5.0).all()
    calls.protect_error = None
    backing.map(G, ids(1, 3, 4))
    assert backing.resident_bytes() == (before or 0) + 3 * layouts[0].segment_bytes
    assert between.eq(5.0).all()
    backing.close()


def test_a_map_whose_undo_fails_too_is_still_a_backing_error() -> None:
    calls = FailingCalls()
    backing = MmapBacking(calls=calls)
    backing.reserve(SPEC, make_layouts())
    calls.advice_error = {MADV_POPULATE_WRITE: errno.ENOMEM, MADV_DONTNEED: errno.EINVAL}
    with pytest.raises(BackingError, match=os.strerror(errno.ENOMEM)):
        backing.map(G, ids(1))
    backing.close()


def test_debug_protection_that_is_refused_does_not_fail_an_unmap() -> None:
    calls = FailingCalls()
    layouts = make_layouts()
    backing = MmapBacking(calls=calls, debug_protect=True)
    backing.reserve(SPEC, layouts)
    backing.map(G, ids(1))
    calls.protect_error = errno.ENOMEM
    backing.unmap(G, ids(1))
    assert backing.resident_bytes() == layouts[0].fixed_bytes
    with pytest.raises(BackingError, match="can't map"):
        backing.map(G, ids(2))
    backing.close()


def test_smaps_sums_only_mappings_inside_the_range() -> None:
    def mapping(start: int, end: int, own: int, swap: int) -> list[bytes]:
        return [
            f"{start:08x}-{end:08x} rw-p 00000000 00:00 0 ".encode(),
            f"Size:   {(end - start) // 1024} kB".encode(),
            f"Rss:    {own + 512} kB".encode(),
            b"Pss:    999 kB",
            f"Anonymous: {own} kB".encode(),
            f"Swap:   {swap} kB".encode(),
            b"SwapPss:  77 kB",
            b"VmFlags: rd wr mr mw me nr sd",
        ]

    lines = [
        *mapping(0x1000, 0x3000, 8, 0),  # before
        *mapping(0x2000, 0x9000, 16, 0),  # overlaps the start
        *mapping(0x4000, 0x6000, 32, 4),
        *mapping(0x6000, 0x8000, 0, 64),
        *mapping(0x7000, 0x9000, 128, 0),  # overlaps the end
        *mapping(0x8000, 0x9000, 256, 0),  # behind
    ]
    assert sum_smaps_resident(lines, 0x4000, 0x8000) == (32 + 4 + 64) * 1024

from __future__ import annotations

import errno
import gc
import mmap

import numpy as np
import pytest

from sglang.srt.errors import BackingError
from sglang.srt.mem_cache.segment_backing.host_calls import HostCalls
from sglang.srt.mem_cache.table_space import ID_BYTES, IdRange, TableSpace

OS_PAGE = mmap.PAGESIZE
SMALLEST = OS_PAGE // ID_BYTES


class NarrowCalls(HostCalls):
    """A process that may have so much address space, and so much writable memory."""

    def __init__(self, most_bytes: int, most_writable: int = 1 << 60) -> None:
        super().__init__()
        self.most_bytes, self.most_writable = most_bytes, most_writable
        self.released: list[int] = []

    def reserve(self, length: int) -> int:
        if length > self.most_bytes:
            raise OSError(errno.ENOMEM, "no address space")
        return super().reserve(length)

    def protect(self, address: int, length: int, *, accessible: bool) -> None:
        if length > self.most_writable:
            raise OSError(errno.ENOMEM, "no memory")
        super().protect(address, length, accessible=accessible)

    def release(self, address: int, length: int) -> None:
        self.released.append(length)
        super().release(address, length)


def resident(where: IdRange) -> int:
    return HostCalls().resident_bytes_of(where.ids.ctypes.data, where.ids.nbytes)


@pytest.mark.parametrize("strict", [False, True])
def test_ranges_are_apart_and_as_large_as_asked(strict: bool) -> None:
    space = TableSpace(strict=strict)
    growth = 2 if strict else 16
    ranges = [space.take(n) for n in (1, SMALLEST, SMALLEST + 1, 5)]
    assert [len(one.ids) for one in ranges] == [SMALLEST, SMALLEST, growth * SMALLEST, SMALLEST]
    for i, one in enumerate(ranges):
        one.ids[:] = i
    for i, one in enumerate(ranges):
        assert (space.ids[one.first : one.first + len(one.ids)] == i).all()


def test_memory_follows_what_is_written() -> None:
    space = TableSpace(strict=False)
    where = space.take(100 * SMALLEST)
    assert len(where.ids) == 256 * SMALLEST
    assert resident(where) == 0
    where.ids[: 3 * SMALLEST] = 7
    assert resident(where) == 3 * OS_PAGE


@pytest.mark.parametrize("strict", [False, True])
def test_a_range_is_given_back_by_its_last_reader(strict: bool) -> None:
    space = TableSpace(strict=strict)
    where = space.take(2 * SMALLEST)
    where.ids[:] = 7
    first, address, size = where.first, where.ids.ctypes.data, where.ids.nbytes
    view = where.ids[3:5][1:]
    del where
    gc.collect()
    other = space.take(2 * SMALLEST)
    assert other.first != first, "a view still reads it"
    assert view.tolist() == [7]
    del view
    gc.collect()
    assert HostCalls().resident_bytes_of(address, size) == 0
    again = space.take(2 * SMALLEST)
    assert again.first == first
    again.ids[:] = 8
    assert (again.ids == 8).all()


def test_the_space_lives_as_long_as_a_view() -> None:
    calls = NarrowCalls(1 << 36)
    view = TableSpace(calls, strict=False).take(4).ids[:4]
    gc.collect()
    view[:] = np.arange(4)
    assert view.tolist() == [0, 1, 2, 3]
    assert calls.released == []
    del view
    gc.collect()
    assert calls.released == [1 << 36]


def test_less_address_space_is_taken_where_there_is_less() -> None:
    space = TableSpace(NarrowCalls(1 << 35), strict=False)
    assert space.ids.nbytes == 1 << 34
    with pytest.raises(BackingError, match="no address space for block tables"):
        TableSpace(NarrowCalls(1 << 31), strict=False)
    small = TableSpace(NarrowCalls(1 << 32), strict=False)
    held = [small.take(1 << 26)]  # 1 GiB of it
    with pytest.raises(BackingError, match="no address space is left"):
        held += [small.take(1 << 28) for _ in range(4)]


def test_memory_that_is_charged_for_can_run_out() -> None:
    calls = NarrowCalls(1 << 36, most_writable=4 * OS_PAGE)
    space = TableSpace(calls, strict=True)
    with pytest.raises(BackingError, match="no memory for a block table"):
        space.take(5 * SMALLEST)
    calls.most_writable = 8 * OS_PAGE
    assert space.take(5 * SMALLEST).first == 0

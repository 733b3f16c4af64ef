"""Where block tables keep their page ids: one reserved address range, cut into ranges for tables.

A range is committed by being written, so a table may have far more room than pages, and growing
within it copies nothing. `TableRows` takes ranges; snapshots keep the ones that they read alive;
the memory of a range goes back to the system with its last reader. See docs/kv_segments.md,
Note [Block tables].
"""

from __future__ import annotations

import mmap
import weakref
from contextlib import suppress
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from sglang.srt.errors import BackingError
from sglang.srt.mem_cache.segment_backing.host_calls import (
    MADV_DONTDUMP,
    MADV_DONTFORK,
    MADV_DONTNEED,
    MADV_NOHUGEPAGE,
    HostCalls,
    overcommit_is_strict,
)

Int32Array = npt.NDArray[np.int32]

ID_BYTES: Final = 4
# Address space, which is no memory: enough for all slots that a machine could hold at page size 1,
# little enough for thousands of pools in one process. Less where the process may not have so much.
_SPACE_BITS: Final = (36, 34, 32)
# A range is so many times as large as the next smaller kind: few copies in a long table's life,
# and the address space in use is at most so many times the memory in use.
_GROWTH: Final = 16
# Where memory is charged for when it may be written, not when it is, room has to be paid for.
_STRICT_GROWTH: Final = 2
_MAX_RANGE_IDS: Final = 1 << 31  # ids are int32, and no table has a page twice


class IdRange(NamedTuple):
    """Ids [first, first + len(ids)) of the space. `ids` and its views keep the range taken."""

    first: int
    ids: Int32Array


NO_RANGE: Final = IdRange(0, np.empty(0, np.int32))


class TableSpace:
    """Ranges for page ids. Taken on the scheduler's thread, given back on any.

    `ids` int32 is the whole space, for writing into many ranges at once; only what lies in a range
    that somebody holds may be touched. `strict` None: ask the system whether it charges for memory
    that may be written (vm.overcommit_memory=2); then ranges double, and are opened and closed one
    by one. Raises BackingError when there is no address space.
    """

    def __init__(self, calls: HostCalls | None = None, *, strict: bool | None = None) -> None:
        self._calls = calls or HostCalls()
        self._strict = overcommit_is_strict() if strict is None else strict
        self._sizes = _range_sizes(_STRICT_GROWTH if self._strict else _GROWTH)
        self._address, num_bytes = self._reserve()
        # At exit the kernel does it: a forward's thread may still read.
        weakref.finalize(self, self._calls.release, self._address, num_bytes).atexit = False
        self._fresh = 0  # ids from here on were never in a range
        self._end = num_bytes // ID_BYTES
        self._returned: list[list[int]] = [[] for _ in self._sizes]  # first ids, by kind
        self.ids = _as_array(self._address, self._end)

    def take(self, num_ids: int) -> IdRange:
        """A range with room for `num_ids` ids or more, their content unspecified.

        Raises BackingError when address space or (strict) memory is not to be had.
        """
        kind = next(i for i, size in enumerate(self._sizes) if size >= num_ids)
        size = self._sizes[kind]
        returned = self._returned[kind]
        if returned:
            first = returned.pop()
        elif self._fresh + size <= self._end:
            first = self._fresh
            self._fresh += size
        else:
            raise BackingError(f"no address space is left for a block table of {num_ids:,} pages")
        if self._strict:
            try:
                self._calls.protect(*self._bytes_of(first, size), accessible=True)
            except OSError as error:
                returned.append(first)
                raise BackingError(f"no memory for a block table: {error}") from error
        ids = _as_array(self._bytes_of(first, size)[0], size)
        weakref.finalize(ids, self._give_back, first, kind).atexit = False
        return IdRange(first, ids)

    def _give_back(self, first: int, kind: int) -> None:
        """Nobody reads the range any more; runs on whichever thread was the last to."""
        where = self._bytes_of(first, self._sizes[kind])
        with suppress(OSError):  # then the memory stays with the range, for the next one
            if self._strict:
                self._calls.reserve_again(*where)
            else:
                self._calls.advise(*where, MADV_DONTNEED)
        self._returned[kind].append(first)

    def _bytes_of(self, first: int, size: int) -> tuple[int, int]:
        return self._address + first * ID_BYTES, size * ID_BYTES

    def _reserve(self) -> tuple[int, int]:
        """Address and bytes of the largest space that can be had."""
        reason: OSError | None = None
        for bits in _SPACE_BITS:
            num_bytes = 1 << bits
            try:
                address = self._calls.reserve(num_bytes)
            except OSError as error:
                reason = error
                continue
            for advice in (MADV_NOHUGEPAGE, MADV_DONTFORK, MADV_DONTDUMP):
                with suppress(OSError):  # a kernel without it does not do what it forbids
                    self._calls.advise(address, num_bytes, advice)
            if not self._strict:
                self._calls.protect(address, num_bytes, accessible=True)
            return address, num_bytes
        raise BackingError(f"no address space for block tables: {reason}")

    def __repr__(self) -> str:
        free = sum(map(len, self._returned))
        used = self._fresh * ID_BYTES
        return f"TableSpace({used=} bytes, {free=} ranges, strict={self._strict})"


class _Memory:
    """Memory as numpy takes it over; an array made of it is the base of all its views."""

    def __init__(self, address: int, num_ids: int) -> None:
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "typestr": "<i4",
            "shape": (num_ids,),
            "data": (address, False),
        }


def _as_array(address: int, num_ids: int) -> Int32Array:
    array: Int32Array = np.asarray(_Memory(address, num_ids))
    return array


def _range_sizes(growth: int) -> tuple[int, ...]:
    """Ids per kind of range, whole system pages, ascending."""
    sizes = [mmap.PAGESIZE // ID_BYTES]
    while sizes[-1] < _MAX_RANGE_IDS:
        sizes.append(min(_MAX_RANGE_IDS, sizes[-1] * growth))
    return tuple(sizes)

"""Linux memory calls through libc, and the kernel's own figures about address ranges.

Called by the mmap and static backings and by the disk file only. Each call goes through a ctypes
CDLL function, which releases the interpreter lock while it runs (Python's own mmap.madvise does
not), and raises OSError with the call's errno. Tests put a `HostCalls` that fails on purpose in its
place.

Sources: mmap(2), mremap(2), mprotect(2), madvise(2), mincore(2), fallocate(2), proc(5) for smaps.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

MAP_NORESERVE: Final = 0x4000  # asm-generic (x86-64, arm64, riscv64, s390x); not in Python's mmap
MAP_FIXED: Final = 0x10
PROT_NONE: Final = 0
MADV_DONTNEED: Final = 4
MADV_DONTFORK: Final = 10
MADV_HUGEPAGE: Final = 14
MADV_NOHUGEPAGE: Final = 15
MADV_DONTDUMP: Final = 16
MADV_POPULATE_WRITE: Final = 23  # since Linux 5.14; EINVAL before
MREMAP_MAYMOVE: Final = 1
MREMAP_FIXED: Final = 2
FALLOC_FL_KEEP_SIZE: Final = 1
FALLOC_FL_PUNCH_HOLE: Final = 2

_SMAPS: Final = Path("/proc/self/smaps")
_MINCORE_BLOCK: Final = 256 << 20  # bytes of address space per call: a vector of 64 KiB


class HostCalls:
    """The calls, bound once. Addresses and lengths are in bytes, multiples of the OS page."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._mmap = libc.mmap
        self._mmap.restype = ctypes.c_void_p
        self._mmap.argtypes = (
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_long,
        )
        self._munmap = libc.munmap
        self._munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        self._mprotect = libc.mprotect
        self._mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        self._madvise = libc.madvise
        self._madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        self._mincore = libc.mincore
        self._mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
        self._mremap = libc.mremap
        self._mremap.restype = ctypes.c_void_p
        self._mremap.argtypes = (
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_size_t,
            ctypes.c_int,
            ctypes.c_void_p,
        )
        self._fallocate = libc.fallocate
        self._fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
        self._memset = libc.memset
        self._memset.restype = ctypes.c_void_p
        self._memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)

    def reserve(self, length: int) -> int:
        """Address of a new private range that can't be touched yet and counts as no memory."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        address = self._mmap(None, length, PROT_NONE, flags, -1, 0)
        if address in (None, ctypes.c_void_p(-1).value):
            raise _os_error("mmap")
        return int(address)

    def reserve_again(self, address: int, length: int, *, accessible: bool = False) -> None:
        """Put a fresh reservation in the place of a part of an older one; memory and charge go."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED
        prot = mmap.PROT_READ | mmap.PROT_WRITE if accessible else PROT_NONE
        if self._mmap(address, length, prot, flags, -1, 0) != address:
            raise _os_error("mmap")

    def map_file(self, address: int, length: int, fd: int, offset: int) -> None:
        """Put a part of a file in the place of what is there, in one step: who reads or writes
        the range meanwhile meets the old memory or the file, never nothing."""
        prot = mmap.PROT_READ | mmap.PROT_WRITE
        if self._mmap(address, length, prot, mmap.MAP_SHARED | MAP_FIXED, fd, offset) != address:
            raise _os_error("mmap")

    def move(self, source: int, length: int, target: int) -> None:
        """Put a range's memory in the place of what is at `target`, in one step."""
        flags = MREMAP_MAYMOVE | MREMAP_FIXED
        if self._mremap(source, length, length, flags, target) != target:
            raise _os_error("mremap")

    def punch(self, fd: int, offset: int, length: int) -> None:
        """Give a part of a file back to its file system; it reads zero from now on."""
        mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
        if self._fallocate(fd, mode, offset, length) != 0:
            raise _os_error("fallocate")

    def release(self, address: int, length: int) -> None:
        """Give the range back to the system, memory and addresses."""
        if self._munmap(address, length) != 0:
            raise _os_error("munmap")

    def protect(self, address: int, length: int, *, accessible: bool) -> None:
        """Allow reading and writing of the range, or forbid both."""
        prot = mmap.PROT_READ | mmap.PROT_WRITE if accessible else PROT_NONE
        if self._mprotect(address, length, prot) != 0:
            raise _os_error("mprotect")

    def advise(self, address: int, length: int, advice: int) -> None:
        """madvise(2) with one of the MADV_ constants above."""
        if self._madvise(address, length, advice) != 0:
            raise _os_error("madvise")

    def fill_zero(self, address: int, length: int) -> None:
        """Write zeros: what commits memory where MADV_POPULATE_WRITE is unknown."""
        self._memset(address, 0, length)

    def resident_bytes_of(self, address: int, length: int) -> int:
        """Bytes of the range's pages that are in memory; time is linear in `length`."""
        page = mmap.PAGESIZE
        total = 0
        for offset in range(0, length, _MINCORE_BLOCK):
            part = min(_MINCORE_BLOCK, length - offset)
            vector = bytearray(-(-part // page))
            pointer = (ctypes.c_ubyte * len(vector)).from_buffer(vector)
            if self._mincore(address + offset, part, ctypes.addressof(pointer)) != 0:
                raise _os_error("mincore")
            # only the lowest bit has a meaning; the kernel sets no other
            total += sum(vector) * page
        return total


def overcommit_is_strict(root: Path = Path("/")) -> bool:
    """Whether the system charges for memory that may be written, used or not."""
    try:
        return (root / "proc/sys/vm/overcommit_memory").read_text().strip() == "2"
    except OSError:
        return False


def _os_error(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")


def read_smaps_resident(start: int, end: int) -> int | None:
    """Bytes of this process's own memory, in RAM or in swap, that lie inside [start, end).

    None: the system has no smaps.
    """
    try:
        with _SMAPS.open("rb") as lines:
            return sum_smaps_resident(lines, start, end)
    except FileNotFoundError:
        return None


def sum_smaps_resident(lines: Iterable[bytes], start: int, end: int) -> int:
    """Sum Anonymous and Swap of the mappings of an smaps file that lie wholly in [start, end).

    Pages that were only read (the shared zero page) and pages of files, which the system may drop
    at any time, are in neither figure. Streams: the file has some 25 lines per mapping.
    """
    total = 0
    inside = False
    for line in lines:
        key = line.split(None, 1)[0]
        if key.endswith(b":"):
            if inside and key in (b"Anonymous:", b"Swap:"):
                total += int(line.split()[1]) * 1024
        else:
            low, _, high = key.partition(b"-")
            inside = start <= int(low, 16) and int(high, 16) <= end
    return total

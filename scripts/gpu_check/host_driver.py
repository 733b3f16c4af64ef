"""A driver of virtual memory that is the host's own: what the dry run maps instead of a GPU's.

Handles are files in memory, so that what they hold stays with them wherever they are mapped. Mapped
ranges are opened to the process, so that tensors over them can be written and read. Events are done
at once; the host's handles are handles like the device's, counted apart.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence

import torch

from sglang.srt.mem_cache.segment_backing.cuda_driver import DriverError
from sglang.srt.mem_cache.segment_backing.host_calls import HostCalls


class HostDriver:
    """`HostVmmDriver` over the host's memory; `total_bytes` is what the pretended device has."""

    def __init__(self, total_bytes: int = 1 << 28) -> None:
        self._calls = HostCalls()
        self._total = total_bytes
        self._handles: dict[int, int] = {}  # file and bytes, of the device
        self._host_handles: dict[int, int] = {}

    def granularity(self, *, recommended: bool) -> int:
        """See VmmDriver."""
        del recommended
        return mmap.PAGESIZE

    def reserve_address(self, length: int, alignment: int) -> int:
        """See VmmDriver."""
        del alignment
        return self._calls.reserve(length)

    def free_address(self, address: int, length: int) -> None:
        """See VmmDriver."""
        self._calls.release(address, length)

    def create_handle(self, length: int) -> int:
        """See VmmDriver."""
        if sum(self._handles.values()) + length > self._total:
            raise DriverError("cuMemCreate", "CUDA_ERROR_OUT_OF_MEMORY")
        handle = _memory_file(length)
        self._handles[handle] = length
        return handle

    def release_handle(self, handle: int) -> None:
        """See VmmDriver."""
        del (self._handles if handle in self._handles else self._host_handles)[handle]
        os.close(handle)

    def map(self, address: int, length: int, handle: int) -> None:
        """See VmmDriver."""
        self._calls.map_file(address, length, handle, 0)
        self._calls.protect(address, length, accessible=False)

    def unmap(self, address: int, length: int) -> None:
        """See VmmDriver."""
        self._calls.reserve_again(address, length)

    def set_access(self, address: int, length: int) -> None:
        """See VmmDriver."""
        self._calls.protect(address, length, accessible=True)

    def record_event(self) -> int:
        """See VmmDriver."""
        return 1

    def event_done(self, event: int) -> bool:
        """See VmmDriver."""
        del event
        return True

    def memory_info(self) -> tuple[int, int]:
        """See VmmDriver."""
        return self._total - sum(self._handles.values()), self._total

    def host_granularity(self) -> int:
        """See HostVmmDriver."""
        return mmap.PAGESIZE

    def create_host_handle(self, length: int) -> int:
        """See HostVmmDriver."""
        handle = _memory_file(length)
        self._host_handles[handle] = length
        return handle

    def copy(self, parts: Sequence[tuple[int, int, int]]) -> None:
        """See HostVmmDriver."""
        for target, source, length in parts:
            ctypes.memmove(target, source, length)


def _memory_file(length: int) -> int:
    file = os.memfd_create("handle", os.MFD_CLOEXEC)
    os.ftruncate(file, length)
    return file


def host_bytes(address: int, length: int) -> torch.Tensor:
    """A uint8 tensor over memory of this process that somebody else owns."""
    buffer = (ctypes.c_uint8 * length).from_address(address)
    return torch.frombuffer(buffer, dtype=torch.uint8)

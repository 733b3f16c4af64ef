"""A driver of virtual memory that is the host's own: what the dry run maps instead of a GPU's.

Handles are numbers, mapped ranges are opened to the process and closed again, so that tensors over
them can be written and read. Events are done at once.
"""

from __future__ import annotations

import ctypes
import mmap

import torch

from sglang.srt.mem_cache.segment_backing.cuda_driver import DriverError
from sglang.srt.mem_cache.segment_backing.host_calls import HostCalls


class HostDriver:
    """`VmmDriver` over anonymous memory; `total_bytes` is what the pretended device has."""

    def __init__(self, total_bytes: int = 1 << 28) -> None:
        self._calls = HostCalls()
        self._total = total_bytes
        self._handles: dict[int, int] = {}
        self._mapped: dict[int, tuple[int, int]] = {}
        self._next = 1

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
        handle, self._next = self._next, self._next + 1
        self._handles[handle] = length
        return handle

    def release_handle(self, handle: int) -> None:
        """See VmmDriver."""
        del self._handles[handle]

    def map(self, address: int, length: int, handle: int) -> None:
        """See VmmDriver."""
        self._mapped[address] = (length, handle)

    def unmap(self, address: int, length: int) -> None:
        """See VmmDriver."""
        del self._mapped[address]
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


def host_bytes(address: int, length: int) -> torch.Tensor:
    """A uint8 tensor over memory of this process that somebody else owns."""
    buffer = (ctypes.c_uint8 * length).from_address(address)
    return torch.frombuffer(buffer, dtype=torch.uint8)

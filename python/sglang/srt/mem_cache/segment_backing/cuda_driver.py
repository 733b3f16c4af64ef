"""The few CUDA driver calls that the cuda_vmm backing needs, as a protocol and over cuda-bindings.

`VmmDriver` is what the backing is written and tested against; `CudaDriver` is the real one. It
imports `cuda.bindings.driver` when it is made, so nobody else needs the package. Addresses,
handles and events are plain integers here. Not yet run on hardware: tests make the calls through
the real package to a libcuda.so.1 that is compiled against NVIDIA's cuda.h, keeps the documented
rules and maps the host's memory. See docs/kv_segments.md, Note [CUDA virtual memory].
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

from sglang.srt.errors import BackingError


class DriverError(BackingError):
    """A driver call failed: `call` is its name, `code` the driver's name for the error."""

    def __init__(self, call: str, code: str) -> None:
        super().__init__(f"{call} failed with {code}")
        self.call = call
        self.code = code


class VmmDriver(Protocol):
    """Address ranges, memory handles, mappings and events of one device.

    Every method raises DriverError when the driver refuses, and has then done nothing. Any thread
    may call. Lengths are bytes and multiples of the minimum granularity.
    """

    def granularity(self, *, recommended: bool) -> int:
        """Bytes of which sizes must be (minimum) or should be (recommended) a multiple."""

    def reserve_address(self, length: int, alignment: int) -> int:
        """Take address space without memory; the address."""

    def free_address(self, address: int, length: int) -> None:
        """Give a whole reservation back; nothing may be mapped in it."""

    def create_handle(self, length: int) -> int:
        """Allocate memory of the device without an address."""

    def release_handle(self, handle: int) -> None:
        """Give the memory back; it must not be mapped any more."""

    def map(self, address: int, length: int, handle: int) -> None:
        """Put the whole handle, `length` bytes, at an address of a reservation."""

    def unmap(self, address: int, length: int) -> None:
        """Undo exactly one `map`. Does not wait for kernels that use the range."""

    def set_access(self, address: int, length: int) -> None:
        """Let the device read and write a range that is mapped throughout."""

    def record_event(self) -> int:
        """An event behind all work that was launched so far on the driver's streams."""

    def event_done(self, event: int) -> bool:
        """True when that work is done; the event is then gone. Never waits."""

    def memory_info(self) -> tuple[int, int]:
        """Free and total bytes of the device."""


class HostVmmDriver(VmmDriver, Protocol):
    """A driver that also puts the host's memory into address ranges of the device.

    Such handles are mapped, opened, unmapped and released as the device's own.
    """

    def host_granularity(self) -> int:
        """Bytes of which the size of a handle on the host must be a multiple.

        Raises BackingError when the device can't have such handles.
        """

    def create_host_handle(self, length: int) -> int:
        """Allocate memory of the host, near the device, without an address. It is pinned."""

    def copy(self, parts: Sequence[tuple[int, int, int]]) -> None:
        """Copy (target, source, length) each between open ranges; returns when all is done.

        Follows no stream: whoever wrote the sources must have ended. After a refusal nothing is
        being copied any more, and what the targets hold is open.
        """


def _import_api() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise BackingError(
            "the cuda_vmm backing needs the package cuda-bindings (pip install cuda-bindings): "
            f"{error}"
        ) from error
    return driver


class CudaDriver:
    """`HostVmmDriver` over the package cuda-bindings for device `device`.

    `streams` are the raw handles of the streams on which work reads the memory; 0 is the legacy
    default stream, which follows all blocking streams. `api` replaces the module
    `cuda.bindings.driver`. Raises BackingError when the package, the driver, the device or its
    virtual memory management is missing.
    """

    def __init__(self, device: int = 0, *, streams: Sequence[int] = (0,), api: Any = None) -> None:
        api = api or _import_api()
        self._api = api
        self._streams = tuple(streams)
        self._events: dict[int, list[Any]] = {}
        self._next_event = 1
        self._lock = threading.Lock()
        self._thread = threading.local()
        try:
            self._call("cuInit", 0)
        except RuntimeError as error:  # what the package raises when it finds no driver library
            raise BackingError(f"the cuda_vmm backing finds no CUDA driver: {error}") from error
        self._device = self._call("cuDeviceGet", device)
        supported = api.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
        if not self._call("cuDeviceGetAttribute", supported, self._device):
            raise BackingError(f"CUDA device {device} has no virtual memory management")
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
        location = api.CUmemLocation()
        location.type = api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        location.id = device
        self._properties = api.CUmemAllocationProp()
        self._properties.type = api.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._properties.location = location
        self._access = api.CUmemAccessDesc()
        self._access.location = location
        self._access.flags = api.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE

    def granularity(self, *, recommended: bool) -> int:
        """See VmmDriver."""
        flags = self._api.CUmemAllocationGranularity_flags
        which = (
            flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
            if recommended
            else flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        )
        return int(self._call("cuMemGetAllocationGranularity", self._properties, which))

    def reserve_address(self, length: int, alignment: int) -> int:
        """See VmmDriver."""
        return int(self._call("cuMemAddressReserve", length, alignment, 0, 0))

    def free_address(self, address: int, length: int) -> None:
        """See VmmDriver."""
        self._call("cuMemAddressFree", address, length)

    def create_handle(self, length: int) -> int:
        """See VmmDriver."""
        return int(self._call("cuMemCreate", length, self._properties, 0))

    def release_handle(self, handle: int) -> None:
        """See VmmDriver."""
        self._call("cuMemRelease", handle)

    def map(self, address: int, length: int, handle: int) -> None:
        """See VmmDriver."""
        self._call("cuMemMap", address, length, 0, handle, 0)

    def unmap(self, address: int, length: int) -> None:
        """See VmmDriver."""
        self._call("cuMemUnmap", address, length)

    def set_access(self, address: int, length: int) -> None:
        """See VmmDriver."""
        self._call("cuMemSetAccess", address, length, [self._access], 1)

    def record_event(self) -> int:
        """See VmmDriver: one CUDA event per stream, asked for together."""
        self._enter_context()
        flags = self._api.CUevent_flags.CU_EVENT_DISABLE_TIMING
        events: list[Any] = []
        try:
            for stream in self._streams:
                events.append(self._call("cuEventCreate", flags))
                self._call("cuEventRecord", events[-1], stream)
        except DriverError:
            for event in events:
                self._api.cuEventDestroy(event)
            raise
        with self._lock:
            number = self._next_event
            self._next_event += 1
        self._events[number] = events
        return number

    def event_done(self, event: int) -> bool:
        """See VmmDriver."""
        self._enter_context()
        waiting = self._events[event]
        while waiting:
            (result,) = self._api.cuEventQuery(waiting[-1])
            if result == self._api.CUresult.CUDA_ERROR_NOT_READY:
                return False
            self._check("cuEventQuery", result)
            self._call("cuEventDestroy", waiting.pop())
        del self._events[event]
        return True

    def memory_info(self) -> tuple[int, int]:
        """See VmmDriver."""
        self._enter_context()
        result, free, total = self._api.cuMemGetInfo()
        self._check("cuMemGetInfo", result)
        return int(free), int(total)

    def host_granularity(self) -> int:
        """See HostVmmDriver."""
        minimum = self._api.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        which = (self._host_properties, minimum)
        return int(self._call("cuMemGetAllocationGranularity", *which))

    def create_host_handle(self, length: int) -> int:
        """See HostVmmDriver."""
        return int(self._call("cuMemCreate", length, self._host_properties, 0))

    def copy(self, parts: Sequence[tuple[int, int, int]]) -> None:
        """See HostVmmDriver."""
        self._enter_context()
        stream = self._copy_stream
        try:
            for target, source, length in parts:
                self._call("cuMemcpyAsync", target, source, length, stream)
        finally:
            self._call("cuStreamSynchronize", stream)

    @cached_property
    def _copy_stream(self) -> Any:
        """A stream that follows no other, for copies; the current thread is in the context."""
        flags = self._api.CUstream_flags.CU_STREAM_NON_BLOCKING
        return self._call("cuStreamCreate", flags)

    @cached_property
    def _host_properties(self) -> Any:
        """What a handle on the host is asked for with: the NUMA node next to the device."""
        attributes = self._api.CUdevice_attribute
        name = "CU_DEVICE_ATTRIBUTE_HOST_NUMA_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED"
        supported = getattr(attributes, name, None)  # the package knows it from CUDA 12.3 on
        if supported is None or not self._call("cuDeviceGetAttribute", supported, self._device):
            raise BackingError(
                "this CUDA device, driver or cuda-bindings can't map the host's memory "
                f"({name} is not set)"
            )
        near = attributes.CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID
        location = self._api.CUmemLocation()
        location.type = self._api.CUmemLocationType.CU_MEM_LOCATION_TYPE_HOST_NUMA
        # below 0: the system has no NUMA nodes, and 0 is what NVIDIA then asks for
        location.id = max(0, int(self._call("cuDeviceGetAttribute", near, self._device)))
        properties = self._api.CUmemAllocationProp()
        properties.type = self._api.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location = location
        return properties

    def _call(self, name: str, *args: Any) -> Any:
        """Make a call and return its one value, None when it has none."""
        result, *values = getattr(self._api, name)(*args)
        self._check(name, result)
        return values[0] if values else None

    def _check(self, name: str, result: Any) -> None:
        if result != self._api.CUresult.CUDA_SUCCESS:
            raise DriverError(name, getattr(result, "name", str(result)))

    def _enter_context(self) -> None:
        """Make the device's primary context (torch's) this thread's, once per thread."""
        if not getattr(self._thread, "entered", False):
            self._call("cuCtxSetCurrent", self._context)
            self._thread.entered = True

    def __repr__(self) -> str:
        return f"CudaDriver(device={int(self._device)}, streams={self._streams})"

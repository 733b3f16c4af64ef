"""The real driver's calls, seen by a stand-in for the package: arguments, order and errors."""

from __future__ import annotations

import enum
import sys
import threading
from types import SimpleNamespace

import pytest

from sglang.srt.errors import BackingError
from sglang.srt.mem_cache.segment_backing.cuda_driver import (
    CudaDriver,
    DriverError,
    HostVmmDriver,
    VmmDriver,
)


class Result(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NOT_READY = 600


class FakeApi:
    """Named calls that answer (result, value...) as the package does and are written down."""

    CUresult = Result
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED="vmm",
        CU_DEVICE_ATTRIBUTE_HOST_NUMA_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED="vmm of the host",
        CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID="node",
    )
    CUmemLocationType = SimpleNamespace(
        CU_MEM_LOCATION_TYPE_DEVICE="on a device", CU_MEM_LOCATION_TYPE_HOST_NUMA="on the host"
    )
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING="non-blocking")
    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED="pinned")
    CUmemAllocationGranularity_flags = SimpleNamespace(
        CU_MEM_ALLOC_GRANULARITY_MINIMUM="minimum",
        CU_MEM_ALLOC_GRANULARITY_RECOMMENDED="recommended",
    )
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE="read and write")
    CUevent_flags = SimpleNamespace(CU_EVENT_DISABLE_TIMING="no timing")
    CUmemLocation = CUmemAllocationProp = CUmemAccessDesc = SimpleNamespace

    VALUES: dict[str, tuple[object, ...]] = {  # noqa: RUF012 - never changed
        "cuDeviceGet": ("device 3",),
        "cuDeviceGetAttribute": (1,),
        "cuDevicePrimaryCtxRetain": ("context",),
        "cuMemGetAllocationGranularity": (2 << 20,),
        "cuMemAddressReserve": (0x7000,),
        "cuMemCreate": (77,),
        "cuEventCreate": ("event",),
        "cuStreamCreate": ("stream",),
        "cuMemGetInfo": (5, 9),
    }

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.failing: dict[str, Result] = {}
        self.values = dict(self.VALUES)

    def __getattr__(self, name: str) -> object:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*args: object) -> tuple[object, ...]:
            self.calls.append((name, *args))
            result = self.failing.get(name, Result.CUDA_SUCCESS)
            return (result, *self.values.get(name, ()))

        return call


def test_the_calls_are_those_that_the_driver_documents() -> None:
    api = FakeApi()
    driver: VmmDriver = CudaDriver(3, api=api)
    assert api.calls[:2] == [("cuInit", 0), ("cuDeviceGet", 3)]
    api.calls.clear()
    assert driver.granularity(recommended=True) == driver.granularity(recommended=False) == 2 << 20
    assert driver.reserve_address(1 << 30, 2 << 20) == 0x7000
    assert driver.create_handle(2 << 20) == 77
    driver.map(0x7000, 2 << 20, 77)
    driver.set_access(0x7000, 2 << 20)
    driver.unmap(0x7000, 2 << 20)
    driver.release_handle(77)
    driver.free_address(0x7000, 1 << 30)
    assert [call[0] for call in api.calls[:2]] == ["cuMemGetAllocationGranularity"] * 2
    assert [call[2] for call in api.calls[:2]] == ["recommended", "minimum"]
    properties = api.calls[0][1]
    assert properties.type == "pinned"  # type: ignore[attr-defined]
    assert properties.location == SimpleNamespace(  # type: ignore[attr-defined]
        type="on a device", id=3
    )
    access = SimpleNamespace(location=properties.location, flags="read and write")  # type: ignore[attr-defined]
    assert api.calls[2:] == [
        ("cuMemAddressReserve", 1 << 30, 2 << 20, 0, 0),
        ("cuMemCreate", 2 << 20, properties, 0),
        ("cuMemMap", 0x7000, 2 << 20, 0, 77, 0),
        ("cuMemSetAccess", 0x7000, 2 << 20, [access], 1),
        ("cuMemUnmap", 0x7000, 2 << 20),
        ("cuMemRelease", 77),
        ("cuMemAddressFree", 0x7000, 1 << 30),
    ]


def test_memory_of_the_host_is_asked_for_next_to_the_device() -> None:
    api = FakeApi()
    driver: HostVmmDriver = CudaDriver(3, api=api)
    api.calls.clear()
    assert driver.host_granularity() == 2 << 20
    assert driver.create_host_handle(4 << 20) == 77
    assert [call[:2] for call in api.calls[:2]] == [
        ("cuDeviceGetAttribute", "vmm of the host"),
        ("cuDeviceGetAttribute", "node"),
    ]
    granularity, create = api.calls[2:]
    assert (granularity[0], granularity[2]) == ("cuMemGetAllocationGranularity", "minimum")
    properties = granularity[1]
    assert properties == SimpleNamespace(
        type="pinned", location=SimpleNamespace(type="on the host", id=1)
    )
    assert create == ("cuMemCreate", 4 << 20, properties, 0)


def test_a_device_that_cannot_map_the_hosts_memory_says_so() -> None:
    api = FakeApi()
    driver = CudaDriver(api=api)
    api.values["cuDeviceGetAttribute"] = (0,)
    with pytest.raises(BackingError, match="can't map the host's memory"):
        driver.host_granularity()
    api.values["cuDeviceGetAttribute"] = (1,)
    assert driver.host_granularity() == 2 << 20


def test_copies_have_a_stream_of_their_own_and_are_waited_for() -> None:
    api = FakeApi()
    driver = CudaDriver(api=api)
    api.calls.clear()
    driver.copy([(0x1000, 0x2000, 16), (0x3000, 0x4000, 32)])
    assert api.calls == [
        ("cuCtxSetCurrent", "context"),
        ("cuStreamCreate", "non-blocking"),
        ("cuMemcpyAsync", 0x1000, 0x2000, 16, "stream"),
        ("cuMemcpyAsync", 0x3000, 0x4000, 32, "stream"),
        ("cuStreamSynchronize", "stream"),
    ]
    api.failing = {"cuMemcpyAsync": Result.CUDA_ERROR_OUT_OF_MEMORY}
    api.calls.clear()
    with pytest.raises(DriverError, match="cuMemcpyAsync"):
        driver.copy([(0x1000, 0x2000, 16), (0x3000, 0x4000, 32)])
    # what had begun is waited for, since its memory is about to be unmapped
    assert [call[0] for call in api.calls] == ["cuMemcpyAsync", "cuStreamSynchronize"]


def test_an_event_follows_every_stream_and_is_gone_when_done() -> None:
    api = FakeApi()
    driver = CudaDriver(api=api, streams=(0, 11))
    api.calls.clear()
    event = driver.record_event()
    assert api.calls == [
        ("cuCtxSetCurrent", "context"),
        ("cuEventCreate", "no timing"),
        ("cuEventRecord", "event", 0),
        ("cuEventCreate", "no timing"),
        ("cuEventRecord", "event", 11),
    ]
    api.failing["cuEventQuery"] = Result.CUDA_ERROR_NOT_READY
    assert not driver.event_done(event)
    del api.failing["cuEventQuery"]
    api.calls.clear()
    assert driver.event_done(event)
    assert [call[0] for call in api.calls] == ["cuEventQuery", "cuEventDestroy"] * 2
    with pytest.raises(KeyError):
        driver.event_done(event)


def test_every_thread_enters_the_context_once() -> None:
    api = FakeApi()
    driver = CudaDriver(api=api)
    for _ in range(2):
        assert driver.memory_info() == (5, 9)
    thread = threading.Thread(target=driver.memory_info)
    thread.start()
    thread.join()
    assert [call[0] for call in api.calls].count("cuCtxSetCurrent") == 2


def test_errors_carry_the_call_and_the_code() -> None:
    api = FakeApi()
    driver = CudaDriver(api=api)
    api.failing = {"cuMemCreate": Result.CUDA_ERROR_OUT_OF_MEMORY}
    with pytest.raises(DriverError) as caught:
        driver.create_handle(1)
    assert isinstance(caught.value, BackingError)
    assert (caught.value.call, caught.value.code) == ("cuMemCreate", "CUDA_ERROR_OUT_OF_MEMORY")
    assert str(caught.value) == "cuMemCreate failed with CUDA_ERROR_OUT_OF_MEMORY"
    api.failing = {"cuEventRecord": Result.CUDA_ERROR_OUT_OF_MEMORY}
    api.calls.clear()
    with pytest.raises(DriverError):
        driver.record_event()
    assert api.calls[-1] == ("cuEventDestroy", "event")
    for call in ("cuEventQuery", "cuMemGetInfo"):
        api.failing = {}
        event = driver.record_event()
        api.failing = {call: Result.CUDA_ERROR_OUT_OF_MEMORY}
        with pytest.raises(DriverError, match=call):
            driver.event_done(event) if call == "cuEventQuery" else driver.memory_info()


def test_a_machine_without_what_it_takes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    api = FakeApi()
    api.values["cuDeviceGetAttribute"] = (0,)
    with pytest.raises(BackingError, match="device 0 has no virtual memory management"):
        CudaDriver(api=api)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(BackingError, match="needs the package cuda-bindings"):
        CudaDriver()

    class NoLibrary(FakeApi):
        def cuInit(self, flags: int) -> tuple[Result]:
            raise RuntimeError("libcuda.so.1 is not there")

    with pytest.raises(BackingError, match=r"finds no CUDA driver: libcuda\.so\.1"):
        CudaDriver(api=NoLibrary())

"""Checks of the cuda_vmm backing with the real cuda-bindings over the stand-in's libcuda.so.1.

    python -m srt.mem_cache.libcuda.checks REPORT.json

Run by test_cuda_abi.py in a process whose loader finds the stand-in; writes {check: traceback, or
"" when it holds}. The device is host memory, so what is mapped is read and written by plain loads.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from gpu_check import stage_memory
from gpu_check.host_driver import host_bytes
from gpu_check.records import Journal, Status, read_journal
from gpu_check.setting import make_setting
from sglang.srt.errors import BackingError
from sglang.srt.mem_cache.kv_layout import (
    GroupId,
    KVCacheSpec,
    KVGroupSpec,
    SegmentId,
    SegmentLayout,
)
from sglang.srt.mem_cache.segment_backing.base import Plane
from sglang.srt.mem_cache.segment_backing.cuda_driver import CudaDriver, DriverError
from sglang.srt.mem_cache.segment_backing.cuda_vmm import CudaVmmBacking
from sglang.srt.mem_cache.segment_backing.cuda_vmm_host import CudaVmmHostBacking
from sglang.srt.mem_cache.segment_cuts import (
    make_segment_layouts,
)

GRANULE = 2 << 20
DEVICE_BYTES = 64 << 20
COMPUTE_STREAM = 0x5EED0  # a stream's handle is an address: no small number
G0 = GroupId(0)
FAILURES = {"OUT_OF_MEMORY": 2, "INVALID_VALUE": 1, "UNKNOWN": 999}


class State(NamedTuple):
    """What the stand-in holds."""

    bytes_of_0: int
    bytes_of_1: int
    mappings: int
    reservations: int
    events: int
    unmapped_under_work: int
    bytes_of_host: int = 0


class Device:
    """The stand-in's own calls: work that begins and ends, calls that fail, what is left."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")

    def begin(self, stream: int, address: int, length: int) -> None:
        arguments = (ctypes.c_uint64(stream), ctypes.c_uint64(address), ctypes.c_size_t(length))
        self._library.stand_in_begin(*arguments)

    def end(self, stream: int) -> None:
        self._library.stand_in_end(ctypes.c_uint64(stream))

    def fail(self, call: str, after: int = 0, error: str = "OUT_OF_MEMORY") -> None:
        self._library.stand_in_fail(call.encode(), after, FAILURES[error])

    def state(self) -> State:
        values = (ctypes.c_uint64 * len(State._fields))()
        self._library.stand_in_state(values)
        return State(*values)


DEVICE = Device()


def make_spec() -> tuple[KVCacheSpec, tuple[SegmentLayout, ...]]:
    """Two layers; a segment is a granule a plane, 8 MiB in all."""
    spec = KVCacheSpec((KVGroupSpec((0, 1)),), 8, 128, 128, "bfloat16", 64)
    layouts = make_segment_layouts(
        spec,
        slots_per_segment=GRANULE // 2048,
        auto_segment_bytes=1,
        auto_min_slots=1,
        granule_bytes=GRANULE,
        machine_bytes=2 * DEVICE_BYTES,
        budget_bytes=0,
    )
    return spec, layouts


def make(device: int = 0, **options: Any) -> tuple[CudaVmmBacking, CudaDriver]:
    driver = CudaDriver(device, streams=(COMPUTE_STREAM, 0))
    backing = CudaVmmBacking(driver, margin_bytes=0, make_tensor=host_bytes, **options)
    backing.reserve(*make_spec())
    return backing, driver


def ids(*segments: int) -> list[SegmentId]:
    return [SegmentId(segment) for segment in segments]


# ---- checks --------------------------------------------------------------------------------------


def check_contents_come_and_go() -> None:
    backing, driver = make()
    total = driver.memory_info()[1]
    fixed = 4 * GRANULE
    assert (driver.granularity(recommended=True), total) == (GRANULE, DEVICE_BYTES)
    assert driver.memory_info()[0] == total - fixed == total - backing.held_bytes
    assert DEVICE.state() == State(fixed, 0, 4, 4, 0, 0)
    backing.map(G0, ids(1, 2, 4))
    assert driver.memory_info()[0] == total - fixed - 3 * 4 * GRANULE
    views = [backing.view(layer, plane) for layer in (0, 1) for plane in (Plane.KEY, Plane.VALUE)]
    slots = GRANULE // 2048
    for number, view in enumerate(views):
        view[slots : 3 * slots] = number + 1
        view[4 * slots : 5 * slots] = 10 * (number + 1)
    for number, view in enumerate(views):
        assert view.dtype == torch.bfloat16
        assert bool((view[slots : 3 * slots] == number + 1).all())
        assert bool((view[4 * slots : 5 * slots] == 10 * (number + 1)).all())
    backing.unmap(G0, ids(2))
    assert driver.memory_info()[0] == total - fixed - 2 * 4 * GRANULE
    backing.map(G0, ids(2))
    assert bool((views[1][2 * slots : 3 * slots] == 0).all()), "memory of a new handle is new"
    assert bool((views[1][slots : 2 * slots] == 2).all()), "neighbours keep what they hold"
    backing.close()
    assert DEVICE.state() == State(0, 0, 0, 0, 0, 0)


def check_handles_of_a_granule() -> None:
    backing, _ = make(handle_bytes=GRANULE)
    backing.map(G0, ids(1, 3))
    assert DEVICE.state().mappings == 4 + 2 * 4
    backing.unmap(G0, ids(1, 3))
    backing.close()
    assert DEVICE.state() == State(0, 0, 0, 0, 0, 0)


def check_unmapping_waits_for_the_streams() -> None:
    """On both streams that were told, and not a moment longer."""
    for stream in (COMPUTE_STREAM, 0):
        looks: list[float] = []

        def pause(seconds: float, looks: list[float] = looks, stream: int = stream) -> None:
            assert DEVICE.state().mappings == 4 + 4, "unmapped while work reads"
            looks.append(seconds)
            if len(looks) == 5:
                DEVICE.end(stream)

        backing, _ = make(pause=pause)
        backing.map(G0, ids(1))
        address = backing.view(0, Plane.KEY).data_ptr()
        DEVICE.begin(stream, address + GRANULE, GRANULE)
        backing.unmap(G0, ids(1))
        assert len(looks) == 5
        backing.close()
        assert DEVICE.state() == State(0, 0, 0, 0, 0, 0)


def check_work_elsewhere_is_not_told() -> None:
    """The stand-in counts an unmap under work on a stream that nobody named: the check can fail."""
    backing, _ = make()
    backing.map(G0, ids(1))
    DEVICE.begin(0xBAD0, backing.view(0, Plane.KEY).data_ptr() + GRANULE, GRANULE)
    backing.unmap(G0, ids(1))
    DEVICE.end(0xBAD0)
    assert DEVICE.state().unmapped_under_work == 1
    backing.close()


def check_a_refusal_is_scarcity() -> None:
    backing, driver = make()
    before, free = DEVICE.state(), driver.memory_info()[0]
    too_many = free // (4 * GRANULE) + 1
    with pytest.raises(BackingError, match=r"can't map 8 KV segments: 64\.0 MiB wanted"):
        backing.map(G0, ids(*range(1, too_many + 1)))
    assert DEVICE.state() == before
    # Another process took it between the look and the call: the driver itself refuses.
    for call in ("cuMemCreate", "cuMemMap", "cuMemSetAccess"):
        for after in range(4):
            DEVICE.fail(call, after)
            with pytest.raises(DriverError) as caught:
                backing.map(G0, ids(1))
            assert (caught.value.call, caught.value.code) == (call, "CUDA_ERROR_OUT_OF_MEMORY")
            assert DEVICE.state() == before
    backing.map(G0, ids(1))
    backing.close()


def check_a_refused_unmap_leaves_all_mapped() -> None:
    backing, _ = make()
    backing.map(G0, ids(1))
    view, before = backing.view(0, Plane.KEY), DEVICE.state()
    view[GRANULE // 2048] = 5
    for call, after in (("cuEventCreate", 0), ("cuEventRecord", 1), ("cuEventQuery", 0)):
        DEVICE.fail(call, after, "UNKNOWN")
        with pytest.raises(DriverError, match=f"{call} failed with CUDA_ERROR_UNKNOWN"):
            backing.unmap(G0, ids(1))
    for after in range(4):
        DEVICE.fail("cuMemUnmap", after, "UNKNOWN")
        with pytest.raises(BackingError, match="can't unmap 1 KV segments: cuMemUnmap failed"):
            backing.unmap(G0, ids(1))
        assert DEVICE.state().mappings == before.mappings
        assert DEVICE.state().bytes_of_0 == before.bytes_of_0
        assert bool((view[GRANULE // 2048] == 5).all()), "a handle keeps what it holds"
    DEVICE.fail("cuMemRelease", 0, "UNKNOWN")
    backing.unmap(G0, ids(1))
    assert DEVICE.state().bytes_of_0 == 5 * GRANULE == backing.held_bytes
    backing.map(G0, ids(2))
    assert DEVICE.state().bytes_of_0 == 8 * GRANULE == backing.held_bytes
    backing.close()
    left = DEVICE.state()
    assert (left.bytes_of_0, left.mappings, left.reservations) == (0, 0, 0)


def _with_host(**options: Any) -> tuple[CudaVmmHostBacking, CudaDriver]:
    driver = CudaDriver(streams=(COMPUTE_STREAM, 0))
    backing = CudaVmmHostBacking(
        driver, margin_bytes=0, host_margin_bytes=0, make_tensor=host_bytes, **options
    )
    backing.reserve(*make_spec())
    return backing, driver


def check_segments_go_to_the_host_and_back() -> None:
    backing, _ = _with_host()
    backing.map(G0, ids(1, 2))
    views = [backing.view(layer, plane) for layer in (0, 1) for plane in (Plane.KEY, Plane.VALUE)]
    slots = GRANULE // 2048
    for number, view in enumerate(views):
        view[slots : 3 * slots] = number + 1
    backing.demote(G0, ids(1))
    state = DEVICE.state()
    assert (state.bytes_of_0, state.bytes_of_host) == (8 * GRANULE, 4 * GRANULE)
    assert backing.lower_bytes() == 4 * GRANULE
    for number, view in enumerate(views):
        assert bool((view[slots : 3 * slots] == number + 1).all()), "the same at the same address"
        view[slots] = 50 + number
    backing.map_lower(G0, ids(4))
    views[0][4 * slots] = 7
    backing.promote(G0, ids(1, 4))
    state = DEVICE.state()
    assert (state.bytes_of_0, state.bytes_of_host) == (16 * GRANULE, 0)
    for number, view in enumerate(views):
        assert bool((view[slots] == 50 + number).all()), "what was written on the host came along"
    assert bool((views[0][4 * slots] == 7).all())
    backing.demote(G0, ids(2))
    backing.close()
    left = DEVICE.state()
    assert (left.bytes_of_0, left.bytes_of_host, left.mappings, left.reservations) == (0, 0, 0, 0)


def check_a_move_waits_for_the_streams() -> None:
    looks: list[float] = []

    def pause(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            DEVICE.end(COMPUTE_STREAM)

    backing, _ = _with_host(pause=pause)
    backing.map(G0, ids(1))
    before = DEVICE.state().unmapped_under_work
    DEVICE.begin(COMPUTE_STREAM, backing.view(0, Plane.KEY).data_ptr() + GRANULE, GRANULE)
    backing.demote(G0, ids(1))
    assert len(looks) == 3
    assert DEVICE.state().unmapped_under_work == before
    backing.close()


def check_a_refused_move_leaves_all_as_it_was() -> None:
    backing, _ = _with_host()
    backing.map(G0, ids(1))
    view, before = backing.view(1, Plane.VALUE), DEVICE.state()
    view[GRANULE // 2048] = 5
    calls = ("cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemcpyAsync", "cuStreamSynchronize")
    for call in (*calls, "cuMemUnmap"):
        # the scratch range is unmapped four times before the segment's own places are
        for after in (4, 5) if call == "cuMemUnmap" else (0, 1):
            if (call, after) == ("cuStreamSynchronize", 1):
                continue  # it is called once
            DEVICE.fail(call, after, "UNKNOWN")
            with pytest.raises(BackingError, match=f"{call} failed with CUDA_ERROR_UNKNOWN"):
                backing.demote(G0, ids(1))
            assert DEVICE.state() == before, (call, after)
            assert bool((view[GRANULE // 2048] == 5).all())
    backing.close()


def check_no_event_is_left_by_a_failure() -> None:
    driver = CudaDriver(streams=(COMPUTE_STREAM, 0))
    before = DEVICE.state().events
    DEVICE.fail("cuEventRecord", 1, "UNKNOWN")
    with pytest.raises(DriverError):
        driver.record_event()
    assert DEVICE.state().events == before


def check_every_thread_may_call() -> None:
    """A thread has no current context of its own: as the manager's background thread."""
    backing, driver = make()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                backing.prepare(G0, ids(2))
                backing.commit(G0, ids(2))
                backing.unmap(G0, ids(2))
            event = driver.record_event()
            assert driver.event_done(event)
        except BaseException as error:  # noqa: BLE001 - told by the thread that waits
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(20):
        backing.map(G0, ids(1))
        backing.unmap(G0, ids(1))
    thread.join()
    assert not errors, errors
    backing.close()


def check_the_device_is_the_one_that_was_named() -> None:
    before = DEVICE.state()
    backing, driver = make(device=1)
    backing.map(G0, ids(1))
    state = DEVICE.state()
    assert (state.bytes_of_0, state.bytes_of_1) == (before.bytes_of_0, 8 * GRANULE)
    assert driver.memory_info() == (DEVICE_BYTES - 8 * GRANULE, DEVICE_BYTES)
    backing.close()
    assert DEVICE.state().bytes_of_1 == 0
    with pytest.raises(DriverError, match="cuDeviceGet failed with CUDA_ERROR_INVALID_DEVICE"):
        CudaDriver(2)


def check_what_the_driver_does_not_take() -> None:
    """The stand-in refuses what NVIDIA's documentation rules out, each by its name."""
    driver = CudaDriver()
    address = driver.reserve_address(8 * GRANULE, 4 * GRANULE)
    assert address % (4 * GRANULE) == 0
    handle = driver.create_handle(2 * GRANULE)
    driver.map(address, 2 * GRANULE, handle)
    refused: tuple[Callable[[], object], ...] = (
        lambda: driver.create_handle(GRANULE + 4096),
        lambda: driver.reserve_address(GRANULE, 3 * GRANULE),
        lambda: driver.map(address, GRANULE, handle),  # it is taken
        lambda: driver.map(address + 8 * GRANULE, GRANULE, handle),  # outside of the range
        lambda: driver.map(address + 4 * GRANULE, GRANULE, handle + 1),  # no such handle
        lambda: driver.unmap(address, GRANULE),  # a part of a mapping
        lambda: driver.set_access(address, GRANULE),  # the same
        lambda: driver.set_access(address + GRANULE, 3 * GRANULE),  # a gap
        lambda: driver.free_address(address, 8 * GRANULE),  # something is mapped
    )
    for call in refused:
        with pytest.raises(DriverError, match="CUDA_ERROR_INVALID_VALUE"):
            call()
    driver.release_handle(handle)  # may come before the unmap
    assert DEVICE.state().bytes_of_0 == 2 * GRANULE
    driver.unmap(address, 2 * GRANULE)
    assert DEVICE.state().bytes_of_0 == 0
    with pytest.raises(DriverError, match="CUDA_ERROR_INVALID_VALUE"):
        driver.release_handle(handle)
    driver.free_address(address, 8 * GRANULE)


def check_stage_2_of_gpu_check(folder: Path) -> None:
    """The check of a GPU itself, every figure by the driver."""
    setting = make_setting(True, 60.0, folder)
    journal = Journal(folder / "journal.jsonl", 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STAND_IN_BYTES", str(2 << 30))  # its segments are of 256 MiB
        patch.setattr(
            stage_memory, "make_driver", lambda _: CudaDriver(streams=(COMPUTE_STREAM, 0))
        )
        for name, part in stage_memory.PARTS:
            if name != "growth":  # sums over 64 MiB, again and again: for a GPU
                part(setting, journal)
    records = read_journal(folder / "journal.jsonl")
    assert len(records) >= 8
    assert [one for one in records if one.status is not Status.OK] == []
    assert DEVICE.state().bytes_of_0 == 0


def main(report: Path) -> None:
    """Run all checks and write what came of each."""
    found: dict[str, str] = {}
    for name, check in list(globals().items()):
        if not re.match("check_", name):
            continue
        try:
            check(report.parent) if name == "check_stage_2_of_gpu_check" else check()
            found[name] = ""
        except BaseException:  # noqa: BLE001 - what breaks is the finding
            found[name] = traceback.format_exc()
    report.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

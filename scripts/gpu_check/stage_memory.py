"""Stage 2: the cuda_vmm backing on the device: contents, failures, latencies, growth under work."""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from gpu_check.host_driver import HostDriver, host_bytes
from gpu_check.records import Journal
from gpu_check.setting import Setting
from gpu_check.shapes import handle_sizes
from sglang.srt.errors import BackingError
from sglang.srt.mem_cache.kv_layout import (
    GroupId,
    KVCacheSpec,
    KVGroupSpec,
    SegmentId,
    SegmentLayout,
)
from sglang.srt.mem_cache.segment_backing.base import Plane
from sglang.srt.mem_cache.segment_backing.cuda_driver import (
    CudaDriver,
    HostVmmDriver,
    VmmDriver,
)
from sglang.srt.mem_cache.segment_backing.cuda_vmm import CudaVmmBacking
from sglang.srt.mem_cache.segment_backing.cuda_vmm_host import CudaVmmHostBacking
from sglang.srt.mem_cache.segment_cuts import (
    make_segment_layouts,
)

G0 = GroupId(0)
MIB = 1 << 20
SLACK_BYTES = 64 * MIB  # kernels that are loaded and torch's own cache, meanwhile


def make_driver(setting: Setting) -> HostVmmDriver:
    """The device's driver, or the host's in a dry run. Raises BackingError without one."""
    if setting.is_dry:
        return HostDriver()
    return CudaDriver(streams=setting.runtime.stream_handles)


def make_backing(
    setting: Setting, driver: VmmDriver, *, handle_bytes: int | None = None
) -> CudaVmmBacking:
    """A backing over `driver`."""
    if setting.is_dry:
        return CudaVmmBacking(
            driver, handle_bytes=handle_bytes, make_tensor=host_bytes, margin_bytes=0
        )
    return CudaVmmBacking(driver, handle_bytes=handle_bytes)


def make_layouts(
    setting: Setting, granule: int, machine_bytes: int
) -> tuple[KVCacheSpec, tuple[SegmentLayout, ...]]:
    """Two layers whose planes' part of a segment is 32 granules (64 MiB on a data-centre GPU)."""
    heads, dim = (1, 64) if setting.is_dry else (8, 128)
    spec = KVCacheSpec((KVGroupSpec((0, 1)),), heads, dim, dim, "bfloat16", 64)
    layouts = make_segment_layouts(
        spec,
        slots_per_segment=32 * granule // (heads * dim * 2),
        auto_segment_bytes=1,
        auto_min_slots=1,
        granule_bytes=granule,
        machine_bytes=machine_bytes,
        budget_bytes=0,
    )
    return spec, layouts


@contextmanager
def opened(setting: Setting) -> Iterator[tuple[CudaVmmBacking, VmmDriver, SegmentLayout]]:
    """A reserved backing, closed in the end."""
    driver = make_driver(setting)
    backing = make_backing(setting, driver)
    _, total = driver.memory_info()
    spec, layouts = make_layouts(setting, backing.granule_bytes, total)
    backing.reserve(spec, layouts)
    try:
        yield backing, driver, layouts[0]
    finally:
        setting.synchronize()
        backing.close()


def check_contents(setting: Setting, journal: Journal) -> None:
    """What is written is read, the view stays, and the driver's figure follows."""
    with opened(setting) as (backing, driver, layout):
        view = backing.view(0, Plane.KEY)
        ids = [SegmentId(1), SegmentId(2), SegmentId(5)]
        free_before, _ = driver.memory_info()
        backing.map(G0, ids)
        free_mapped, _ = driver.memory_info()
        wanted = len(ids) * layout.segment_bytes
        judged = free_before - free_mapped
        journal.judge(
            "memory falls by what is mapped",
            judged >= wanted,
            f"{judged} of {wanted} bytes",
            mapped_mib=wanted / MIB,
            fell_mib=judged / MIB,
        )
        with setting.runtime.computing():
            for number in ids:
                first = number * layout.slots_per_segment
                view[first : first + layout.slots_per_segment].fill_(float(number))
            setting.synchronize()
            rows = [view[number * layout.slots_per_segment] for number in ids]
            holds = all(
                bool((row == float(number)).all()) for row, number in zip(rows, ids, strict=True)
            )
            crossing = view[2 * layout.slots_per_segment - 1 : 2 * layout.slots_per_segment + 1]
            holds &= crossing[:, 0, 0].tolist() == [1.0, 2.0]
        journal.judge("contents, also across a border", holds, "other numbers were read")
        backing.unmap(G0, ids)
        free_after, _ = driver.memory_info()
        journal.judge(
            "memory comes back after unmapping",
            free_after + SLACK_BYTES >= free_before,
            f"{free_before - free_after} bytes are missing",
            missing_mib=max(0, free_before - free_after) / MIB,
        )
        backing.map(G0, ids[:1])
        with setting.runtime.computing():
            view[layout.slots_per_segment].fill_(7.0)
            setting.synchronize()
            again = bool((view[layout.slots_per_segment] == 7.0).all())
        journal.judge("the same address after a remap", again, "other numbers were read")
        backing.unmap(G0, ids[:1])


def check_failures(setting: Setting, journal: Journal) -> None:
    """More than the device has is refused with everything as it was."""
    with opened(setting) as (backing, driver, layout):
        free, total = driver.memory_info()
        held = backing.held_bytes
        too_many = min(layout.max_segments - 1, total // layout.segment_bytes + 1)
        ids = [SegmentId(number) for number in range(1, too_many + 1)]
        try:
            backing.map(G0, ids)
            journal.fail("too much is refused", "it was mapped")
        except BackingError as error:
            after, _ = driver.memory_info()
            same = backing.held_bytes == held and after + SLACK_BYTES >= free
            journal.judge("too much is refused", same, "something stays held", said=str(error)[:80])
        backing.map(G0, ids[:1])
        journal.note("the next map works")
        backing.unmap(G0, ids[:1])


def check_host_tier(setting: Setting, journal: Journal) -> None:
    """Segments go to the host's memory and back, are read on either, and how fast all that is."""
    driver = make_driver(setting)
    try:
        host_granule = driver.host_granularity()
    except BackingError as error:
        journal.fail("the host's memory in the device's ranges", str(error))
        return
    make_tensor = host_bytes if setting.is_dry else None
    margin = 0 if setting.is_dry else 1 << 30
    backing = CudaVmmHostBacking(
        driver, make_tensor=make_tensor, margin_bytes=0, host_margin_bytes=margin
    )
    _, total = driver.memory_info()
    spec, layouts = make_layouts(setting, backing.granule_bytes, total)
    backing.reserve(spec, layouts)
    try:
        journal.note("granularity of the host's memory", bytes=host_granule)
        _move_and_read(setting, journal, backing, driver, layouts[0])
    finally:
        setting.synchronize()
        backing.close()


def _move_and_read(
    setting: Setting,
    journal: Journal,
    backing: CudaVmmHostBacking,
    driver: HostVmmDriver,
    layout: SegmentLayout,
) -> None:
    ids = [SegmentId(1), SegmentId(2)]
    backing.map(G0, ids)
    view = backing.view(0, Plane.KEY)
    spans = [slice(n * layout.slots_per_segment, (n + 1) * layout.slots_per_segment) for n in ids]

    def holds() -> bool:
        with setting.runtime.computing():
            found = [bool((view[s] == float(n)).all()) for s, n in zip(spans, ids, strict=True)]
        return all(found)

    with setting.runtime.computing():
        for span, number in zip(spans, ids, strict=True):
            view[span].fill_(float(number))
    setting.synchronize()
    rates = {"read_on_device_gib_s": _read_rate(setting, view[spans[0]])}
    free_before, _ = driver.memory_info()
    rates["demote_gib_s"] = _move_rate(setting, lambda: backing.demote(G0, ids[:1]), layout)
    free_after, _ = driver.memory_info()
    gained = free_after - free_before
    journal.judge("a segment on the host reads as before", holds(), "other numbers were read")
    journal.judge(
        "the device's memory comes back",
        gained + SLACK_BYTES >= layout.segment_bytes,
        f"{gained} bytes",
        gained_mib=gained / MIB,
    )
    rates["read_on_host_gib_s"] = _read_rate(setting, view[spans[0]])
    with setting.runtime.computing():
        view[spans[0].start].fill_(1.0)  # written where it lies
        view[spans[1].start].copy_(view[spans[0].start + 1])  # and copied from
        copied = bool((view[spans[1].start] == 1.0).all())
        view[spans[1].start].fill_(2.0)
    setting.synchronize()
    journal.judge("a copy from the host to the device", copied, "other numbers were read")
    rates["promote_gib_s"] = _move_rate(setting, lambda: backing.promote(G0, ids[:1]), layout)
    journal.judge("it reads the same when it is back", holds(), "other numbers were read")
    journal.note("rates of the host tier", segment_mib=layout.segment_bytes / MIB, **rates)
    backing.map_lower(G0, [SegmentId(3)])
    backing.unmap_lower(G0, [SegmentId(3)])
    backing.unmap(G0, ids)
    journal.judge("nothing stays pinned", backing.lower_bytes() == 0, "handles are left")


def _move_rate(setting: Setting, move: Callable[[], None], layout: SegmentLayout) -> float:
    setting.synchronize()
    began = time.perf_counter()
    move()
    return layout.segment_bytes / (1 << 30) / (time.perf_counter() - began)


def _read_rate(setting: Setting, part: torch.Tensor) -> float:
    """GiB/s at which the device sums a part, median of a few; the host's clock."""
    times: list[float] = []
    with setting.runtime.computing():
        for _ in range(3 if setting.is_dry else 10):
            began = time.perf_counter()
            float(part.view(torch.int16).sum())
            times.append(time.perf_counter() - began)
    return part.nbytes / (1 << 30) / statistics.median(times)


def latency_table(setting: Setting, journal: Journal) -> None:
    """Create, map, open, unmap and release, by the size of a handle."""
    driver = make_driver(setting)
    minimum = driver.granularity(recommended=False)
    advised = driver.granularity(recommended=True)
    journal.note("granularity", minimum_bytes=minimum, recommended_bytes=advised)
    count = 4 if setting.is_dry else 24
    for size in handle_sizes(setting.is_dry, advised):
        address = driver.reserve_address(count * size, advised)
        times: dict[str, list[float]] = {}
        for number in range(count):
            for name, micros in _life_of_a_handle(driver, address + number * size, size).items():
                times.setdefault(name, []).append(micros)
        driver.free_address(address, count * size)
        medians = {name: statistics.median(values) for name, values in times.items()}
        up = medians["create_us"] + medians["map_us"] + medians["open_us"]
        journal.note(
            f"handles of {size / MIB:g} MiB", **medians, gib_per_s=size / (1 << 30) / (up / 1e6)
        )


def _life_of_a_handle(driver: VmmDriver, address: int, size: int) -> dict[str, float]:
    """Microseconds of each call from its creation to its release."""
    marks = [time.perf_counter()]
    handle = driver.create_handle(size)
    marks.append(time.perf_counter())
    driver.map(address, size, handle)
    marks.append(time.perf_counter())
    driver.set_access(address, size)
    marks.append(time.perf_counter())
    driver.unmap(address, size)
    marks.append(time.perf_counter())
    driver.release_handle(handle)
    marks.append(time.perf_counter())
    names = ("create_us", "map_us", "open_us", "unmap_us", "release_us")
    spans = itertools.pairwise(marks)
    return {name: (b - a) * 1e6 for name, (a, b) in zip(names, spans, strict=True)}


def growth_stall(setting: Setting, journal: Journal) -> None:
    """Work on mapped segments goes on while others are mapped and unmapped on another thread."""
    with opened(setting) as (backing, _, layout):
        backing.map(G0, [SegmentId(1)])
        view = backing.view(1, Plane.VALUE)
        part = view[layout.slots_per_segment : 2 * layout.slots_per_segment]
        with setting.runtime.computing():
            part.fill_(1.0)
        setting.synchronize()
        quiet, wrong_before = _rounds(setting, part, 20 if setting.is_dry else 300, lambda: True)
        stop, errors, grown = threading.Event(), [], [0]

        def grow() -> None:
            try:
                while not stop.is_set():
                    ids = [SegmentId(2), SegmentId(3)]
                    backing.map(G0, ids)
                    backing.unmap(G0, ids)
                    grown[0] += 1
            except BackingError as error:
                errors.append(str(error))

        thread = threading.Thread(target=grow)
        thread.start()
        try:
            least = 20 if setting.is_dry else 300
            busy, wrong = _rounds(setting, part, least, lambda: grown[0] >= 2 or bool(errors))
        finally:
            stop.set()
            thread.join()
        journal.judge(
            "growth under work",
            not errors and wrong == wrong_before == 0,
            f"{errors or 'other numbers were read'}",
            rounds_of_growth=grown[0],
            median_ms=statistics.median(busy),
            median_ms_without=statistics.median(quiet),
            longest_ms=max(busy),
            longest_ms_without=max(quiet),
        )
        backing.unmap(G0, [SegmentId(1)])


def _rounds(
    setting: Setting, part: torch.Tensor, least: int, enough: Callable[[], bool]
) -> tuple[list[float], int]:
    """Milliseconds of at least so many sums over `part` of ones, and how many were wrong."""
    times: list[float] = []
    wrong = 0
    with setting.runtime.computing():
        while len(times) < least or not enough():
            began = time.perf_counter()
            mean = float(part.float().mean())
            times.append((time.perf_counter() - began) * 1e3)
            wrong += mean != 1.0
            if setting.seconds_left <= 0:
                break
    return times, wrong


PARTS = (
    ("contents", check_contents),
    ("failures", check_failures),
    ("host tier", check_host_tier),
    ("latencies", latency_table),
    ("growth", growth_stall),
)

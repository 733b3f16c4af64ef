"""The CUDA backing over a driver that keeps the rules: every path, and every call's failure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from sglang.srt.errors import BackingError, InvariantError
from sglang.srt.mem_cache.kv_layout import (
    GroupId,
    GroupKind,
    KVCacheSpec,
    KVGroupSpec,
    SegmentId,
    SegmentLayout,
)
from sglang.srt.mem_cache.segment_backing.base import Plane, StagedBacking, layer_planes
from sglang.srt.mem_cache.segment_backing.cuda_vmm import (
    MAX_WAIT_S,
    CudaVmmBacking,
    _ArrayInterface,
)
from sglang.srt.mem_cache.segment_cuts import (
    make_segment_layouts,
)
from sglang.srt.mem_cache.segment_manager import SegmentManager
from sglang.srt.mem_cache.segment_state import SegmentState
from srt.mem_cache.fake_cuda_driver import FakeCudaDriver, kinds_since

GRANULE = 256
ONE = KVCacheSpec((KVGroupSpec((0, 1)),), 1, 4, 2, "float32", 4)
TWO = KVCacheSpec(
    (KVGroupSpec((0, 2)), KVGroupSpec((1,), GroupKind.SLIDING, 8)), 1, 4, 2, "float32", 4
)
LATENT = KVCacheSpec((KVGroupSpec((0, 1)),), 1, 3, 2, "float32", 4, values_in_keys=True)
INDEXED = replace(LATENT, index_dim=1, index_layers=(1,))
SPECS = pytest.mark.parametrize(
    "spec", [ONE, TWO, LATENT, INDEXED], ids=["one group", "two groups", "latents", "index keys"]
)
HANDLES = pytest.mark.parametrize("handle_bytes", [None, GRANULE, 3 * GRANULE])


def num_planes(spec: KVCacheSpec) -> int:
    return sum(
        len(layer_planes(spec, layout, layer))
        for layout in layouts_of(spec)
        for layer in spec.groups[layout.group].layers
    )


def layouts_of(spec: KVCacheSpec, granule: int = GRANULE) -> tuple[SegmentLayout, ...]:
    """Segments of 128 tokens: a key plane's part is 8 granules, a value plane's 4; latents' 6.

    Index keys of a layer take 2.
    """
    return make_segment_layouts(
        spec,
        slots_per_segment=128,
        auto_segment_bytes=1,
        auto_min_slots=1,
        granule_bytes=granule,
        machine_bytes=8 * 128 * spec.bytes_per_token,
        budget_bytes=0,
    )


def make(
    spec: KVCacheSpec, handle_bytes: int | None = None, **options: object
) -> tuple[CudaVmmBacking, FakeCudaDriver]:
    driver = FakeCudaDriver(granule=GRANULE)
    backing = CudaVmmBacking(
        driver, handle_bytes=handle_bytes, margin_bytes=0, pause=lambda _: None, **options
    )
    backing.reserve(spec, layouts_of(spec))
    return backing, driver


def ids(*segments: int) -> tuple[SegmentId, ...]:
    return tuple(SegmentId(segment) for segment in segments)


def refusal_of(operation: Callable[[], None]) -> str | None:
    """What the BackingError of an operation says, None when there is none."""
    try:
        operation()
    except BackingError as error:
        return str(error)
    return None


def all_groups(spec: KVCacheSpec) -> list[GroupId]:
    return [GroupId(g) for g in range(spec.num_groups)]


@SPECS
@HANDLES
def test_reserve_takes_a_range_per_plane_and_backs_page_zero(
    spec: KVCacheSpec, handle_bytes: int | None
) -> None:
    backing, driver = make(spec, handle_bytes)
    layouts = layouts_of(spec)
    assert isinstance(backing, StagedBacking)
    assert len(driver.ranges) == num_planes(spec)
    assert sum(driver.ranges.values()) == sum(layout.reserved_bytes for layout in layouts)
    assert driver.used_bytes == backing.held_bytes == sum(one.fixed_bytes for one in layouts)
    for address in driver.ranges:
        driver.touch(address, GRANULE)
        with pytest.raises(AssertionError, match="not mapped"):
            driver.touch(address + GRANULE, 1)
    backing.close()
    assert driver.state() == ({}, [], {})
    assert not driver.events


@SPECS
@HANDLES
def test_segments_come_and_go_and_leave_no_trace(
    spec: KVCacheSpec, handle_bytes: int | None
) -> None:
    backing, driver = make(spec, handle_bytes)
    before = driver.state()
    layouts = layouts_of(spec)
    for group in all_groups(spec):
        backing.map(group, ids(3, 1, 2))
    fixed = sum(layout.fixed_bytes for layout in layouts)
    assert driver.used_bytes == fixed + 3 * sum(layout.segment_bytes for layout in layouts)
    biggest = max(driver.handles.values())
    widest = (6 if spec.values_in_keys else 8) * GRANULE  # keys of a segment
    assert biggest == (widest if handle_bytes is None else handle_bytes)
    for plane in backing._planes:
        driver.touch(plane.address + plane.segment_bytes, 3 * plane.segment_bytes)
    for group in all_groups(spec):
        backing.unmap(group, ids(2))
        backing.map(group, ids(2))
        backing.unmap(group, ids(1, 2, 3))
    assert driver.state() == before
    backing.close()
    backing.close()
    assert driver.state() == ({}, [], {})


def test_handles_are_created_when_prepared_and_mapped_when_committed() -> None:
    backing, driver = make(ONE)
    start = len(driver.calls)
    backing.prepare(GroupId(0), ids(1, 2))
    assert kinds_since(driver, start) == ["memory_info", "create_handle"]
    start = len(driver.calls)
    backing.commit(GroupId(0), ids(1, 2))
    assert kinds_since(driver, start) == ["map", "set_access"]
    # neighbours are opened together: once a plane
    assert driver.calls[start:].count("set_access") == 4
    start = len(driver.calls)
    backing.unmap(GroupId(0), ids(1, 2))
    steps = ["record_event", "event_done", "unmap", "release_handle"]
    assert kinds_since(driver, start) == steps
    before = driver.state()
    backing.prepare(GroupId(0), ids(5))
    backing.discard(GroupId(0), ids(5))
    assert driver.state() == before
    backing.prepare(GroupId(0), ids(5))
    backing.close()
    assert driver.state() == ({}, [], {})


@SPECS
@HANDLES
def test_whichever_call_fails_everything_is_as_before(
    spec: KVCacheSpec, handle_bytes: int | None
) -> None:
    """Call n fails for n = 1, 2, 3, ... until the operation succeeds."""
    group = GroupId(spec.num_groups - 1)
    operations: list[tuple[str, Callable[[CudaVmmBacking], None]]] = [
        ("map", lambda backing: backing.map(group, ids(3, 5, 6))),
        ("unmap", lambda backing: backing.unmap(group, ids(1, 2))),
    ]
    for name, operation in operations:
        failures = 0
        for n in range(1, 1000):
            backing, driver = make(spec, handle_bytes)
            backing.map(group, ids(1, 2))
            before, held = driver.state(), backing.held_bytes
            driver.fail_at = n
            refusal = refusal_of(lambda: operation(backing))  # noqa: B023 - called at once
            succeeded = driver.fail_at > 0
            if refusal is not None:
                failures += 1
                assert "CUDA_ERROR_TOLD_TO_FAIL" in refusal
                assert driver.state() == before, f"{name}: call {n}"
                assert backing.held_bytes == held == driver.used_bytes
                operation(backing)
            elif not succeeded:
                # Only a release may fail without a word: the handle is kept and tried again.
                assert backing.held_bytes == driver.used_bytes
                assert "1 stuck" in repr(backing)
            driver.fail_at = 0
            backing.map(group, ids(7))
            assert "0 stuck" in repr(backing)
            backing.close()
            assert driver.state() == ({}, [], {})
            if succeeded:
                break
        else:
            pytest.fail("never succeeded")
        assert failures >= 5, name


@HANDLES
def test_whichever_call_of_a_discard_fails_no_byte_is_forgotten(handle_bytes: int | None) -> None:
    """Only handles are released, and one that is refused is kept: no error, and tried again."""
    for n in range(1, 1000):
        backing, driver = make(ONE, handle_bytes)
        backing.map(GroupId(0), ids(1))
        before = driver.state()
        backing.prepare(GroupId(0), ids(2, 5))
        driver.fail_at = n
        backing.discard(GroupId(0), ids(2, 5))
        refused = driver.fail_at == 0
        assert backing.held_bytes == driver.used_bytes
        assert ("1 stuck" in repr(backing)) == refused
        assert (driver.state() == before) != refused
        driver.fail_at = 0
        backing.map(GroupId(0), ids(2, 5))
        backing.unmap(GroupId(0), ids(2, 5))
        assert "0 stuck" in repr(backing)
        assert driver.state() == before
        backing.close()
        assert driver.state() == ({}, [], {})
        if not refused:
            break
    parts = 2 * 2  # layers, planes
    assert n > parts


@SPECS
def test_whichever_call_of_reserve_fails_nothing_is_held(spec: KVCacheSpec) -> None:
    n = 0
    while True:
        n += 1
        driver = FakeCudaDriver(granule=GRANULE)
        backing = CudaVmmBacking(driver, margin_bytes=0)
        driver.fail_at = n
        try:
            backing.reserve(spec, layouts_of(spec))
        except BackingError:
            assert driver.state() == ({}, [], {}), f"call {n}"
            driver.fail_at = 0
            backing.reserve(spec, layouts_of(spec))
            backing.close()
            continue
        break
    driver.fail_at = 0
    # a range, a handle, a mapping and access for every plane
    assert n == 4 * num_planes(spec) + 1
    backing.close()


def test_whichever_call_of_close_fails_the_rest_is_given_back() -> None:
    n, refused = 0, 0
    while True:
        n += 1
        backing, driver = make(ONE)
        backing.map(GroupId(0), ids(1))
        driver.fail_at = n
        refusal = refusal_of(backing.close)
        if refusal is not None:
            refused += 1
            assert "can't close the CUDA memory" in refusal
            backing.close()
        if driver.fail_at:
            break
        # at most what the one call was about is left
        assert len(driver.mappings) <= 1
        assert len(driver.handles) <= 1
        assert len(driver.ranges) <= 1
    assert refused > 10
    assert driver.state() == ({}, [], {})


def test_unmapping_waits_for_the_work_that_may_read() -> None:
    pauses: list[float] = []
    driver = FakeCudaDriver(granule=GRANULE)
    backing = CudaVmmBacking(driver, margin_bytes=0, pause=pauses.append)
    backing.reserve(ONE, layouts_of(ONE))
    backing.map(GroupId(0), ids(1))
    address, length = next(iter(driver.ranges.items()))
    part = length // layouts_of(ONE)[0].max_segments
    driver.launch(address + part, part)
    driver.finish_after = 5
    backing.unmap(GroupId(0), ids(1))  # the driver asserts that no reader is left
    assert len(pauses) == 5
    assert pauses == sorted(pauses)
    backing.map(GroupId(0), ids(1))
    reader = driver.launch(address + part, part)
    driver.finish_after = None
    before = driver.state()
    with pytest.raises(BackingError, match="did not end within 60 s"):
        backing.unmap(GroupId(0), ids(1))
    assert driver.state() == before
    assert sum(pauses) >= MAX_WAIT_S
    driver.finish(reader)
    backing.close()


def test_an_unmap_that_can_be_neither_done_nor_undone_ends_the_process() -> None:
    backing, driver = make(ONE)
    backing.map(GroupId(0), ids(1))
    driver.fail_kind = {"unmap": 2}
    driver.fail_always = {"map"}
    with pytest.raises(InvariantError, match="mapped KV memory was lost"):
        backing.unmap(GroupId(0), ids(1))


def test_a_full_device_is_refused_before_and_by_the_driver() -> None:
    layouts = layouts_of(ONE)
    room = layouts[0].fixed_bytes + 2 * layouts[0].segment_bytes
    driver = FakeCudaDriver(granule=GRANULE, total_bytes=room)
    backing = CudaVmmBacking(driver, margin_bytes=GRANULE)
    backing.reserve(ONE, layouts)
    backing.map(GroupId(0), ids(1))
    with pytest.raises(BackingError, match=r"wanted.*free on the device"):
        backing.map(GroupId(0), ids(2))
    assert "create_handle" not in driver.calls[-1:]
    driver = FakeCudaDriver(granule=GRANULE, total_bytes=room)
    backing = CudaVmmBacking(driver, margin_bytes=0)
    backing.reserve(ONE, layouts)
    driver.memory_info = lambda: (1 << 40, 1 << 40)  # type: ignore[method-assign]
    before = driver.state()
    with pytest.raises(BackingError, match="cuMemCreate failed with CUDA_ERROR_OUT_OF_MEMORY"):
        backing.map(GroupId(0), ids(1, 2, 3))
    assert driver.state() == before


def test_the_granule_is_the_recommended_one_and_bounds_handles() -> None:
    backing = CudaVmmBacking(FakeCudaDriver(granule=64, recommended=256))
    assert backing.granule_bytes == 256
    with pytest.raises(BackingError, match="no multiple of its minimum"):
        CudaVmmBacking(FakeCudaDriver(granule=100, recommended=256))
    for wrong in (0, 100, 384):
        with pytest.raises(ValueError, match="no multiple of 256"):
            CudaVmmBacking(FakeCudaDriver(granule=64, recommended=256), handle_bytes=wrong)
    with pytest.raises(InvariantError, match="not whole granules"):
        backing.reserve(ONE, layouts_of(ONE, granule=1))


def test_wrong_ids_are_a_bug_of_the_caller() -> None:
    backing, driver = make(ONE)
    before = driver.state()
    for wrong in (ids(0), ids(1, 1), ids(9)):
        with pytest.raises(InvariantError, match="wrong or repeated"):
            backing.map(GroupId(0), wrong)
    backing.map(GroupId(0), ids(1))
    with pytest.raises(InvariantError, match="that has some"):
        backing.map(GroupId(0), ids(1))
    backing.unmap(GroupId(0), ids(1))
    assert driver.state() == before
    with pytest.raises(InvariantError, match="reserved before"):
        backing.reserve(ONE, layouts_of(ONE))
    backing.close()
    with pytest.raises(InvariantError, match="was closed"):
        backing.map(GroupId(0), ids(1))
    with pytest.raises(InvariantError, match="not been reserved"):
        backing.view(0, Plane.KEY)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8_e4m3"])
def test_views_span_the_whole_plane(dtype: str) -> None:
    spec = KVCacheSpec((KVGroupSpec((0, 1)),), 2, 16, 8, dtype, 4)
    asked: list[tuple[int, int]] = []

    def make_tensor(address: int, length: int) -> torch.Tensor:
        asked.append((address, length))
        return torch.zeros(length, dtype=torch.uint8)

    driver = FakeCudaDriver(granule=GRANULE)
    backing = CudaVmmBacking(driver, margin_bytes=0, make_tensor=make_tensor)
    layouts = layouts_of(spec)
    backing.reserve(spec, layouts)
    keys = [backing.view(layer, Plane.KEY) for layer in (0, 1)]
    values = [backing.view(layer, Plane.VALUE) for layer in (0, 1)]
    assert {tuple(view.shape) for view in keys} == {(layouts[0].num_slots, 2, 16)}
    assert {tuple(view.shape) for view in values} == {(layouts[0].num_slots, 2, 8)}
    assert sorted(asked) == sorted(driver.ranges.items())
    assert backing.resident_bytes() is None
    interface = _ArrayInterface(4096, 512).__cuda_array_interface__
    assert interface["data"] == (4096, False)
    assert (interface["shape"], interface["typestr"]) == ((512,), "|u1")


@SPECS
def test_the_manager_maps_in_two_stages_and_undoes_a_refused_commit(spec: KVCacheSpec) -> None:
    """The device is asked for memory on the thread, and for a mapping only when polled."""
    backing, driver = make(spec)
    layouts = layouts_of(spec)
    budget = 4 * sum(layout.segment_bytes for layout in layouts)
    manager = SegmentManager(
        layouts, backing, budget_bytes=budget, reserve_segments=0, idle_release_s=30.0
    )
    before = driver.state()
    wanted = [layout.pages_per_segment for layout in layouts]
    now = 0.0
    for failing in range(1, 100):
        plan = manager.plan_growth(wanted)
        assert plan is not None
        ticket = manager.apply(plan)
        manager._runner._executor.submit(lambda: None).result()  # the thread is through
        assert len(driver.mappings) == len(before[2])  # type: ignore[index]
        driver.fail_kind = {"map": failing} if failing % 2 else {"set_access": failing // 2}
        outcome = manager.poll(ticket)
        assert outcome is not None
        if outcome.succeeded and all(left for left in driver.fail_kind.values()):
            break
        assert not outcome.succeeded
        assert driver.state() == before
        assert manager.mapped_bytes == 0
        manager.check()
        now += 10.0
        manager.note_time(now)
    driver.fail_kind = {}
    for layout in layouts:
        record = manager.segments(layout.group)[SegmentId(1)]
        assert record.state is SegmentState.MAPPED
    assert backing.held_bytes == manager.mapped_bytes + manager.fixed_bytes
    manager.check()
    manager.close()
    assert driver.state() == ({}, [], {})


def test_a_refused_create_in_the_second_group_discards_the_first() -> None:
    backing, driver = make(TWO)
    layouts = layouts_of(TWO)
    manager = SegmentManager(
        layouts, backing, budget_bytes=1 << 20, reserve_segments=0, idle_release_s=30.0
    )
    before = driver.state()
    plan = manager.plan_growth([layout.pages_per_segment for layout in layouts])
    assert plan is not None
    driver.fail_kind = {"create_handle": 5}  # four planes in group 0
    outcome = manager.wait(manager.apply(plan))
    assert outcome.refused == "create_handle failed with CUDA_ERROR_TOLD_TO_FAIL"
    assert driver.state() == before
    manager.check()
    manager.close()

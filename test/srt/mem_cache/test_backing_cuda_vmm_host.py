"""The CUDA backing's host tier over a driver that keeps the rules: moves, and every failure."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sglang.srt.errors import BackingError, InvariantError
from sglang.srt.mem_cache.kv_layout import GroupId, KVCacheSpec
from sglang.srt.mem_cache.segment_backing.base import StagedTieredBacking
from sglang.srt.mem_cache.segment_backing.cuda_vmm_host import CudaVmmHostBacking
from srt.crossed import crossed
from srt.mem_cache.fake_cuda_driver import FakeCudaDriver, kinds_since
from srt.mem_cache.test_backing_cuda_vmm import (
    GRANULE,
    HANDLES,
    LATENT,
    ONE,
    SPECS,
    TWO,
    ids,
    layouts_of,
    refusal_of,
)

G0 = GroupId(0)
PER_SEGMENT = 2 * (8 + 4) * GRANULE  # of `ONE`: keys and values of two layers


def make(
    spec: KVCacheSpec, handle_bytes: int | None = None, **options: object
) -> tuple[CudaVmmHostBacking, FakeCudaDriver]:
    driver = FakeCudaDriver(granule=GRANULE)
    backing = CudaVmmHostBacking(
        driver,
        handle_bytes=handle_bytes,
        margin_bytes=0,
        host_margin_bytes=0,
        host_available_bytes=lambda: 1 << 30,
        pause=lambda _: None,
        **options,  # type: ignore[arg-type]
    )
    backing.reserve(spec, layouts_of(spec))
    return backing, driver


def write(
    backing: CudaVmmHostBacking, driver: FakeCudaDriver, group: GroupId, *segments: int
) -> None:
    for piece in backing._pieces(group, ids(*segments)):
        driver.write(piece.address, ("content of", piece.address))


def check_contents(
    backing: CudaVmmHostBacking, driver: FakeCudaDriver, group: GroupId, *segments: int
) -> None:
    for piece in backing._pieces(group, ids(*segments)):
        assert driver.read(piece.address) == ("content of", piece.address)


@SPECS
@HANDLES
def test_segments_go_down_and_up_with_their_contents(
    spec: KVCacheSpec, handle_bytes: int | None
) -> None:
    backing, driver = make(spec, handle_bytes)
    layouts = layouts_of(spec)
    before = driver.state()
    group = GroupId(spec.num_groups - 1)
    size = layouts[group].segment_bytes
    assert isinstance(backing, StagedTieredBacking)
    backing.map(group, ids(1, 2, 3))
    write(backing, driver, group, 1, 2, 3)
    used = driver.used_bytes
    backing.demote(group, ids(2, 3))
    assert (driver.used_bytes, driver.host_bytes) == (used - 2 * size, 2 * size)
    assert backing.lower_bytes() == driver.host_bytes
    assert backing.held_bytes == driver.used_bytes + driver.host_bytes
    check_contents(backing, driver, group, 1, 2, 3)
    backing.promote(group, ids(3))
    assert (driver.used_bytes, driver.host_bytes) == (used - size, size)
    check_contents(backing, driver, group, 1, 2, 3)
    backing.map_lower(group, ids(5))
    assert driver.host_bytes == 2 * size
    write(backing, driver, group, 5)
    backing.promote(group, ids(5))
    check_contents(backing, driver, group, 5)
    backing.unmap_lower(group, ids(2))
    backing.unmap(group, ids(1, 3, 5))
    assert backing.lower_bytes() == driver.host_bytes == 0
    assert driver.state() == before
    backing.map(group, ids(1))
    backing.demote(group, ids(1))
    backing.prepare_move(group, ids(1), to_lower=False)
    backing.close()
    backing.close()
    assert driver.state() == ({}, [], {})


def test_a_copy_is_made_aside_and_takes_the_place_when_readers_are_done() -> None:
    backing, driver = make(ONE)
    backing.map(G0, ids(1))
    write(backing, driver, G0, 1)
    piece = backing._pieces(G0, ids(1))[0]
    reader = driver.launch(piece.address, piece.length)
    start = len(driver.calls)
    backing.prepare_move(G0, ids(1), to_lower=True)
    steps = ["create_host_handle", "map", "set_access", "copy", "unmap"]
    assert kinds_since(driver, start) == steps
    assert backing.lower_bytes() == 0, "it is not there yet"
    driver.finish_after = 3
    start = len(driver.calls)
    backing.commit_move(G0, ids(1))
    assert reader not in driver.readers
    steps = ["record_event", "event_done", "unmap", "map", "set_access", "release_handle"]
    assert kinds_since(driver, start) == steps
    check_contents(backing, driver, G0, 1)
    assert backing.lower_bytes() == PER_SEGMENT
    before = driver.state()
    backing.prepare_move(G0, ids(1), to_lower=False)
    backing.discard_move(G0, ids(1))
    assert driver.state() == before


@pytest.mark.parametrize(
    ("spec", "handle_bytes"),
    crossed([TWO, ONE, LATENT], [None, GRANULE, 3 * GRANULE]),
)
def test_whichever_call_of_a_move_fails_everything_is_as_before(
    spec: KVCacheSpec, handle_bytes: int | None
) -> None:
    """Call n fails for n = 1, 2, 3, ... until the move succeeds; contents are whole throughout."""
    group = GroupId(spec.num_groups - 1)
    moves: list[tuple[str, Callable[[CudaVmmHostBacking], None]]] = [
        ("demote", lambda backing: backing.demote(group, ids(1, 2))),
        ("promote", lambda backing: backing.promote(group, ids(3, 4))),
        ("map_lower", lambda backing: backing.map_lower(group, ids(6, 7))),
        ("unmap_lower", lambda backing: backing.unmap_lower(group, ids(3, 4))),
    ]
    for name, move in moves:
        kinds: set[str] = set()
        for n in range(1, 1000):
            backing, driver = make(spec, handle_bytes)
            backing.map(group, ids(1, 2, 3, 4))
            write(backing, driver, group, 1, 2, 3, 4)
            backing.demote(group, ids(3, 4))
            before, held, below = driver.state(), backing.held_bytes, backing.lower_bytes()
            driver.fail_at, start = n, len(driver.calls)
            refusal = lost = None
            try:
                refusal = refusal_of(lambda: move(backing))  # noqa: B023 - called at once
            except InvariantError as error:
                lost = error
            reached = driver.fail_at == 0
            failed = driver.calls[start + n - 1] if reached else ""
            driver.fail_at = 0
            if lost is not None:
                # only the scratch range, whose mapping can't be undone: the process must end
                assert failed == "unmap", name
                continue
            if refusal is not None:
                kinds.add(failed)
                assert driver.state() == before, f"{name}: call {n}"
                assert (backing.held_bytes, backing.lower_bytes()) == (held, below)
                check_contents(backing, driver, group, 1, 2, 3, 4)
                move(backing)
            elif reached:
                assert failed == "release_handle", f"{name}: call {n} failed without a word"
                assert "0 stuck" not in repr(backing)
            backing.close()
            assert driver.state() == ({}, [], {})
            if not reached:
                break
        else:
            pytest.fail("never succeeded")
        wanted = {
            "demote": {"create_host_handle", "copy", "map", "set_access", "unmap", "record_event"},
            "promote": {"create_handle", "copy", "map", "set_access", "unmap", "memory_info"},
            "map_lower": {"create_host_handle", "map", "set_access"},
            "unmap_lower": {"record_event", "event_done", "unmap"},
        }[name]
        assert wanted <= kinds, name


def test_memory_that_cannot_be_put_back_ends_the_process() -> None:
    backing, driver = make(ONE)
    backing.map(G0, ids(1))
    backing.prepare_move(G0, ids(1), to_lower=True)
    driver.fail_always = {"map"}
    with pytest.raises(InvariantError, match="mapped KV memory was lost"):
        backing.commit_move(G0, ids(1))


def test_the_host_and_the_device_keep_their_margins() -> None:
    driver = FakeCudaDriver(granule=GRANULE, total_bytes=5 * PER_SEGMENT)
    left = [2 * PER_SEGMENT]
    backing = CudaVmmHostBacking(
        driver,
        margin_bytes=PER_SEGMENT,
        host_margin_bytes=PER_SEGMENT,
        host_available_bytes=lambda: left[0],
        pause=lambda _: None,
    )
    backing.reserve(ONE, layouts_of(ONE))
    backing.map(G0, ids(1, 2))
    with pytest.raises(BackingError, match=r"can't pin 2 KV segments: .* available on the host"):
        backing.demote(G0, ids(1, 2))
    backing.demote(G0, ids(1))
    left[0] -= 1
    with pytest.raises(BackingError, match="can't pin 1 KV segments"):
        backing.map_lower(G0, ids(3))
    backing.map(G0, ids(3, 4))
    with pytest.raises(BackingError, match="free on the device"):
        backing.promote(G0, ids(1))
    backing.unmap(G0, ids(4))
    backing.promote(G0, ids(1))
    assert backing.lower_bytes() == 0


def test_a_move_to_where_a_segment_is_breaks_the_rules() -> None:
    backing, _ = make(TWO)
    backing.map(G0, ids(1))
    with pytest.raises(InvariantError, match="are there already"):
        backing.prepare_move(G0, ids(1), to_lower=False)


def test_a_host_granule_that_does_not_fit_is_refused() -> None:
    class Coarse(FakeCudaDriver):
        def host_granularity(self) -> int:
            return 2 * GRANULE

    with pytest.raises(BackingError, match="the device's granule of 256 is no multiple"):
        CudaVmmHostBacking(Coarse(granule=GRANULE))

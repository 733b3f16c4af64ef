"""The mmap backing on real memory: figures of the kernel, contents, wide offsets, mappings."""

from __future__ import annotations

import mmap
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

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
from sglang.srt.mem_cache.segment_backing import KV_TORCH_DTYPES, Plane, make_backing
from sglang.srt.mem_cache.segment_backing.mmap import (
    MmapBacking,
    read_huge_page_bytes,
    unsupported_reason,
)
from sglang.srt.mem_cache.segment_backing.segment_plane import round_to, widen
from sglang.srt.mem_cache.segment_cuts import (
    make_segment_layouts,
)
from sglang.srt.mem_cache.segment_manager import SegmentManager

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the mmap backing needs Linux")

PAGE = mmap.PAGESIZE
MIB = 1 << 20
G = GroupId(0)
SMALL = KVCacheSpec((KVGroupSpec((0, 1)),), 2, 16, 8, "float32", 16)
TWO = KVCacheSpec(
    (KVGroupSpec((0, 2)), KVGroupSpec((1,), GroupKind.SLIDING, 64)), 2, 16, 8, "bfloat16", 16
)


def layouts_of(
    spec: KVCacheSpec, slots: int = 64, machine_bytes: int = 4 * MIB
) -> tuple[SegmentLayout, ...]:
    return make_segment_layouts(
        spec,
        slots_per_segment=slots,
        auto_segment_bytes=1,
        auto_min_slots=1,
        granule_bytes=PAGE,
        machine_bytes=machine_bytes,
        budget_bytes=0,
    )


def ids(*segments: int) -> list[SegmentId]:
    return [SegmentId(segment) for segment in segments]


@contextmanager
def reserved(
    spec: KVCacheSpec, layouts: tuple[SegmentLayout, ...], *, debug_protect: bool = False
) -> Iterator[MmapBacking]:
    backing = MmapBacking(debug_protect=debug_protect)
    backing.reserve(spec, layouts)
    try:
        yield backing
    finally:
        backing.close()


def resident(backing: MmapBacking) -> int:
    figure = backing.resident_bytes()
    assert figure is not None
    return figure


def num_mappings(backing: MmapBacking) -> int:
    """The kernel's mappings inside the reserved range."""
    low, high = backing._address, backing._address + backing._length
    count = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        count += start < high and end > low
    return count


@pytest.mark.parametrize("debug_protect", [False, True])
@pytest.mark.parametrize("spec", [SMALL, TWO], ids=["one group", "two groups"])
def test_resident_memory_is_exactly_what_is_mapped(spec: KVCacheSpec, debug_protect: bool) -> None:
    layouts = layouts_of(spec)
    fixed = sum(layout.fixed_bytes for layout in layouts)
    with reserved(spec, layouts, debug_protect=debug_protect) as backing:
        assert resident(backing) == fixed
        expected = fixed
        for layout in layouts:
            backing.map(layout.group, ids(1, 2, 5))
            expected += 3 * layout.segment_bytes
            assert resident(backing) == expected
        for layout in layouts:
            backing.unmap(layout.group, ids(2))
            expected -= layout.segment_bytes
            assert resident(backing) == expected
            backing.unmap(layout.group, ids(5, 1))
            expected -= 2 * layout.segment_bytes
            assert resident(backing) == expected
        assert expected == fixed


def test_views_have_the_spec_s_shape_and_planes_do_not_overlap() -> None:
    layouts = layouts_of(TWO)
    with reserved(TWO, layouts) as backing:
        for layout in layouts:
            backing.map(layout.group, ids(1))
        marks = {}
        for layer in range(3):
            layout = layouts[1] if layer == 1 else layouts[0]
            for plane in (Plane.KEY, Plane.VALUE):
                view = backing.view(layer, plane)
                assert view.shape == (layout.num_slots, 2, 16 if plane is Plane.KEY else 8)
                assert view.dtype == torch.bfloat16
                first = layout.slots_per_segment
                marks[layer, plane] = (first, layer + 0.5 * (plane is Plane.VALUE))
                view[first : 2 * first] = marks[layer, plane][1]
        for (layer, plane), (first, mark) in marks.items():
            assert bool((backing.view(layer, plane)[first : 2 * first] == mark).all())


@pytest.mark.parametrize("dtype", sorted(KV_TORCH_DTYPES))
def test_every_kv_dtype_has_a_view(dtype: str) -> None:
    spec = KVCacheSpec((KVGroupSpec((0,)),), 2, 16, 16, dtype, 16)
    layouts = layouts_of(spec)
    with reserved(spec, layouts) as backing:
        backing.map(G, ids(1))
        view = backing.view(0, Plane.VALUE)
        assert view.dtype == KV_TORCH_DTYPES[dtype]
        slot = layouts[0].slots_per_segment
        view[slot] = round_to(torch.full((2, 16), 0.5), view.dtype)
        read = widen(backing.view(0, Plane.VALUE)[slot], torch.float32)
        assert read.shape == (2, 16)
        assert read.unique().tolist() == [0.5]


def test_memory_reads_zero_after_it_was_given_back() -> None:
    layouts = layouts_of(SMALL)
    first = layouts[0].slots_per_segment
    with reserved(SMALL, layouts) as backing:
        keys = backing.view(0, Plane.KEY)
        backing.map(G, ids(1, 2))
        assert keys[first : 3 * first].count_nonzero() == 0
        keys[first : 3 * first] = 7.0
        backing.unmap(G, ids(1))
        assert keys[first : 2 * first].count_nonzero() == 0
        assert bool((keys[2 * first : 3 * first] == 7.0).all())
        backing.map(G, ids(1))
        assert keys[first : 2 * first].count_nonzero() == 0


def test_the_dump_page_is_always_there() -> None:
    layouts = layouts_of(SMALL)
    with reserved(SMALL, layouts, debug_protect=True) as backing:
        before = resident(backing)
        for layer in (0, 1):
            for plane in (Plane.KEY, Plane.VALUE):
                backing.view(layer, plane)[: SMALL.page_size] = 1.0
        assert resident(backing) == before


def test_a_managed_pool_returns_to_its_idle_state() -> None:
    layouts = layouts_of(TWO, machine_bytes=16 * MIB)
    backing = MmapBacking()
    backing.reserve(TWO, layouts)
    manager = SegmentManager(
        layouts, backing, budget_bytes=4 * MIB, reserve_segments=1, idle_release_s=30.0
    )
    idle = resident(backing)
    assert idle == manager.mapped_bytes + manager.fixed_bytes
    for _ in range(3):
        plan = manager.plan_growth((30, 50))
        assert plan is not None
        assert manager.wait(manager.apply(plan)).succeeded
        assert resident(backing) == manager.mapped_bytes + manager.fixed_bytes > 3 * idle
        shrink = manager.plan_shrink(30.0)
        assert shrink is not None
        assert manager.wait(manager.apply(shrink)).succeeded
        assert resident(backing) == idle
    manager.close()


def test_a_stray_write_shows_in_the_resident_figure() -> None:
    layouts = layouts_of(SMALL)
    with reserved(SMALL, layouts) as backing:
        before = resident(backing)
        backing.view(1, Plane.VALUE)[3 * layouts[0].slots_per_segment] = 1.0
        assert resident(backing) == before + PAGE


def test_a_stray_read_does_not_count() -> None:
    layouts = layouts_of(SMALL)
    with reserved(SMALL, layouts) as backing:
        before = resident(backing)
        assert backing.view(1, Plane.VALUE)[3 * layouts[0].slots_per_segment].sum() == 0
        assert resident(backing) == before


def test_the_number_of_kernel_mappings_does_not_grow() -> None:
    layouts = layouts_of(SMALL, machine_bytes=64 * MIB)
    with reserved(SMALL, layouts) as backing:
        before = num_mappings(backing)
        assert before <= 3 * 4 + 1
        scattered = ids(*range(1, layouts[0].max_segments, 2))
        assert len(scattered) > 100
        backing.map(G, scattered)
        assert num_mappings(backing) == before
        backing.unmap(G, scattered[::2])
        assert num_mappings(backing) == before


def test_planes_stand_between_guards_and_carry_their_advice() -> None:
    """Flags as in proc(5): nh no huge pages, dc not in children, dd not in core dumps."""
    layouts = layouts_of(SMALL)
    with reserved(SMALL, layouts) as backing:
        low, high = backing._address, backing._address + backing._length
        seen: list[tuple[str, set[str]]] = []
        inside, access = False, ""
        for line in Path("/proc/self/smaps").read_text().splitlines():
            words = line.split()
            if words[0] == "VmFlags:" and inside:
                seen.append((access, set(words[1:])))
            elif not words[0].endswith(":"):
                start, end = (int(part, 16) for part in words[0].split("-"))
                inside, access = low <= start and end <= high, words[1]
        first, last = backing._planes[0], backing._planes[-1]
        assert low + PAGE <= first.address
        # wherever the system puts the range, not only where its alignment leaves space
        assert backing._place(SMALL, layouts)[0][0].address == PAGE
        assert last.address + last.length + PAGE <= high
    accesses = [access for access, _ in seen]
    # the outermost guards may have been joined with a neighbour's
    assert "".join(accesses).strip("-p") == "---p".join(["rw-p"] * 4).strip("-p")
    wanted = {"dc", "dd"}
    if Path("/sys/kernel/mm/transparent_hugepage").exists():
        wanted.add("nh")
    advice = [flags for access, flags in seen if access == "rw-p"]
    assert len(advice) == 4
    assert all(wanted <= flags for flags in advice)


def test_reserving_two_tebibytes_is_cheap_and_holds_nothing() -> None:
    spec = KVCacheSpec((KVGroupSpec((0, 1)),), 8, 128, 128, "bfloat16", 64)
    layouts = layouts_of(spec, slots=8192, machine_bytes=2 << 40)
    assert layouts[0].reserved_bytes >= 2 << 40
    with reserved(spec, layouts) as backing:
        assert resident(backing) == layouts[0].fixed_bytes
        assert backing.view(1, Plane.KEY).shape[0] == layouts[0].num_slots


@pytest.mark.parametrize("boundary", [1 << 31, 1 << 32, 1 << 33])
def test_offsets_beyond_32_bits_of_bytes_and_of_elements(boundary: int) -> None:
    """Slots around 2^31 and 2^32 bytes, and elements, of one plane: written, read, distinct."""
    spec = KVCacheSpec((KVGroupSpec((0,)),), 8, 128, 128, "bfloat16", 64)
    (layout,) = layouts_of(spec, slots=64, machine_bytes=80 << 30)
    with reserved(spec, (layout,)) as backing:
        keys = backing.view(0, Plane.KEY)
        slot = boundary // layout.k_bytes_per_slot
        assert keys.element_size() * keys.stride(0) * slot == boundary
        below, above = (layout.segment_of(layout.page_of(s)) for s in (slot - 1, slot))
        wrapped = layout.segment_of(layout.page_of(slot % ((1 << 31) // layout.k_bytes_per_slot)))
        assert (above, wrapped) == (below + 1, 0)
        before = resident(backing)
        backing.map(G, [below, above])
        keys[slot - 1] = 1.0
        keys[slot] = 2.0
        values = torch.full((1, 8, 128), 3.0, dtype=torch.bfloat16)
        keys.index_copy_(0, torch.tensor([slot + 1]), values)
        assert keys[slot - 1 : slot + 2, 0, 0].tolist() == [1.0, 2.0, 3.0]
        assert keys.index_select(0, torch.tensor([slot, slot - 1]))[:, 7, 127].tolist() == [2, 1]
        # had an offset wrapped, it would have committed memory somewhere else
        assert resident(backing) == before + 2 * layout.segment_bytes
        assert keys[0, 0, 0] == 0


def test_huge_pages_are_used_only_where_they_end_with_the_segment() -> None:
    huge = read_huge_page_bytes()
    if not huge:
        pytest.skip("this system has no transparent huge pages")
    spec = KVCacheSpec((KVGroupSpec((0,)),), 8, 128, 64, "bfloat16", 64)
    slots = huge // spec.k_bytes_per_slot_layer  # V planes have half a huge page per segment
    layouts = layouts_of(spec, slots=slots, machine_bytes=64 * huge)
    with reserved(spec, layouts) as backing:
        assert [plane.huge for plane in backing._planes] == [True, False]
        assert backing._planes[0].address % huge == 0
        assert resident(backing) == layouts[0].fixed_bytes
        backing.map(G, ids(3))
        backing.map(G, ids(5))
        assert resident(backing) == layouts[0].fixed_bytes + 2 * layouts[0].segment_bytes
        backing.unmap(G, ids(3))
        assert resident(backing) == layouts[0].fixed_bytes + layouts[0].segment_bytes


def test_other_threads_run_while_memory_is_mapped() -> None:
    """With forced switches off, the counter moves only when the lock is released."""
    spec = KVCacheSpec((KVGroupSpec((0,)),), 8, 128, 128, "bfloat16", 64)
    layouts = layouts_of(spec, slots=16384, machine_bytes=1 << 30)
    segments = (256 * MIB) // layouts[0].segment_bytes
    counted = 0
    started, stop = threading.Event(), threading.Event()

    def count() -> None:
        nonlocal counted
        while not stop.is_set():
            counted += 1
            started.set()
            time.sleep(0)  # offers the lock; does not wait

    thread = threading.Thread(target=count)
    interval = sys.getswitchinterval()
    # reading the headroom from files would release the lock, too
    backing = MmapBacking(available_bytes=lambda: 1 << 50)
    backing.reserve(spec, layouts)
    with closing(backing):
        thread.start()
        try:
            assert started.wait(60)
            sys.setswitchinterval(1000.0)
            before = counted
            backing.map(G, ids(*range(1, segments + 1)))
            after = counted
        finally:
            sys.setswitchinterval(interval)
            stop.set()
            thread.join()
    assert after > before


def test_wrong_ids_are_bugs() -> None:
    layouts = layouts_of(SMALL)
    with reserved(SMALL, layouts) as backing:
        for wrong in (ids(0), ids(1, 1), ids(layouts[0].max_segments), ids(-1)):
            with pytest.raises(InvariantError, match="wrong or repeated"):
                backing.map(G, wrong)
        with pytest.raises(InvariantError, match="reserved before"):
            backing.reserve(SMALL, layouts)
        assert resident(backing) == layouts[0].fixed_bytes


def test_layouts_that_are_not_whole_pages_are_bugs() -> None:
    layouts = make_segment_layouts(
        SMALL,
        slots_per_segment=16,
        auto_segment_bytes=1,
        auto_min_slots=1,
        granule_bytes=1,
        machine_bytes=MIB,
        budget_bytes=0,
    )
    with pytest.raises(InvariantError, match="whole pages"):
        MmapBacking().reserve(SMALL, layouts)


def test_closing_gives_the_range_back_and_ends_use() -> None:
    backing = MmapBacking()
    backing.close()
    with pytest.raises(InvariantError, match="not been reserved"):
        backing.view(0, Plane.KEY)
    backing.reserve(SMALL, layouts_of(SMALL))
    low, high = backing._address, backing._address + backing._length
    backing.map(G, ids(1))
    backing.close()
    backing.close()
    assert backing.resident_bytes() is None
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        assert not (low < end <= high and low <= start < high)
    with pytest.raises(InvariantError, match="closed"):
        backing.map(G, ids(1))


STRAY_ACCESS = """
import sys
from sglang.srt.mem_cache.kv_layout import *
from sglang.srt.mem_cache.segment_cuts import *
from sglang.srt.mem_cache.segment_backing import Plane, make_backing
spec = KVCacheSpec((KVGroupSpec((0,)),), 2, 16, 16, "float32", 16)
layouts = make_segment_layouts(spec, slots_per_segment=64, auto_segment_bytes=1, auto_min_slots=1,
                               granule_bytes=4096, machine_bytes=1 << 20, budget_bytes=0)
backing = make_backing("mmap", debug_protect=True)
backing.reserve(spec, layouts)
backing.map(GroupId(0), [SegmentId(1)])
slot = layouts[0].slots_per_segment
backing.view(0, Plane.KEY)[slot] = 1.0
if sys.argv[1] == "unmapped":
    backing.unmap(GroupId(0), [SegmentId(1)])
print("about to touch", flush=True)
print(float(backing.view(0, Plane.KEY)[slot].sum()))
"""


@pytest.mark.parametrize("case", ["mapped", "unmapped"])
def test_debug_protect_ends_the_process_at_a_stray_access(case: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STRAY_ACCESS, case],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(Path(__file__).parents[3] / "python"), "OMP_NUM_THREADS": "1"},
        timeout=200,
        check=False,
    )
    if case == "mapped":
        assert done.stdout == "about to touch\n32.0\n"
        assert done.returncode == 0
    else:
        assert done.stdout == "about to touch\n"
        assert done.returncode == -11


def test_strict_overcommit_and_other_systems_are_refused_with_a_way_out(tmp_path: Path) -> None:
    path = tmp_path / "proc/sys/vm/overcommit_memory"
    path.parent.mkdir(parents=True)
    path.write_text("2\n")
    with pytest.raises(BackingError, match=r"strict overcommit.*--kv-backing segment_table"):
        MmapBacking(system_root=tmp_path)
    path.write_text("1\n")
    assert unsupported_reason(tmp_path) is None


def test_huge_pages_that_are_never_used_do_not_count(tmp_path: Path) -> None:
    assert read_huge_page_bytes(tmp_path) == 0
    directory = tmp_path / "sys/kernel/mm/transparent_hugepage"
    directory.mkdir(parents=True)
    (directory / "hpage_pmd_size").write_text("2097152\n")
    for setting, expected in (("always madvise [never]", 0), ("always [madvise] never", 2 * MIB)):
        (directory / "enabled").write_text(setting)
        assert read_huge_page_bytes(tmp_path) == expected


def test_the_factory_knows_its_names() -> None:
    assert make_backing("auto").name == make_backing("mmap").name == "mmap"
    assert make_backing("static").name == "static"
    assert make_backing("segment_table").name == "segment_table"
    with pytest.raises(ValueError, match="unknown KV backing"):
        make_backing("cuda")

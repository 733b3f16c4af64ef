"""Every host backing under a limit that somebody else sets: of a cgroup, and of the process.

The process limits are real ones, in a process of its own: what is refused there is refused by the
kernel, and not by a look at a figure.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sglang.srt.errors import BackingError
from sglang.srt.mem_cache.kv_layout import (
    GroupId,
    KVCacheSpec,
    KVGroupSpec,
    SegmentId,
    SegmentLayout,
)
from sglang.srt.mem_cache.segment_backing.base import SegmentBacking
from sglang.srt.mem_cache.segment_backing.mmap import MmapBacking
from sglang.srt.mem_cache.segment_backing.segment_table import SegmentTableBacking
from sglang.srt.mem_cache.segment_backing.static import StaticBacking
from sglang.srt.mem_cache.segment_cuts import (
    make_segment_layouts,
    trim_layouts_to_budget,
)
from sglang.srt.utils.host_memory import read_host_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits as Linux has them")

MIB = 1 << 20
G = GroupId(0)
SPEC = KVCacheSpec((KVGroupSpec((0, 1)),), 2, 16, 16, "float32", 16)
CGROUP = "sys/fs/cgroup"


def layouts_of_five_segments() -> tuple[SegmentLayout, ...]:
    layouts = make_segment_layouts(
        SPEC,
        slots_per_segment=64,
        auto_segment_bytes=1,
        auto_min_slots=1,
        granule_bytes=mmap.PAGESIZE,
        machine_bytes=MIB,
        budget_bytes=0,
    )
    return trim_layouts_to_budget(layouts, 5 * layouts[0].segment_bytes)


class Machine:
    """Much memory, and one cgroup whose limit is `limit` bytes above what it uses at first."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name, text in {
            "proc/meminfo": "MemTotal: 99999999 kB\nMemAvailable: 88888888 kB\n",
            "proc/self/cgroup": "0::/\n",
            "proc/self/mountinfo": f"30 23 0:26 / /{CGROUP} rw - cgroup2 cgroup2 rw\n",
        }.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        (root / CGROUP).mkdir(parents=True)
        self.set(0, 0)

    def set(self, limit: int, used: int) -> None:
        (self.root / CGROUP / "memory.max").write_text(f"{10 * MIB + limit}\n")
        (self.root / CGROUP / "memory.current").write_text(f"{10 * MIB + used}\n")

    def available(self) -> int:
        return read_host_memory(self.root).available_bytes


@pytest.mark.parametrize("make", [MmapBacking, SegmentTableBacking])
def test_a_cgroup_s_limit_refuses_a_map_and_a_higher_one_does_not(
    make: Callable[..., SegmentBacking], tmp_path: Path
) -> None:
    machine, layouts = Machine(tmp_path), layouts_of_five_segments()
    (layout,) = layouts
    backing = make(available_bytes=machine.available, margin_bytes=100)

    def use(limit: int) -> int:
        held = backing.resident_bytes() or 0
        machine.set(limit, held)
        return held

    for limit in (0, layout.fixed_bytes + 99):
        use(limit)
        with pytest.raises(BackingError, match=r"wanted, .* available"):
            backing.reserve(SPEC, layouts)
        assert backing.resident_bytes() is None
    limit = layout.fixed_bytes + 2 * layout.segment_bytes + 100
    use(limit)
    backing.reserve(SPEC, layouts)
    for segment in (2, 4):
        use(limit)
        backing.map(G, [SegmentId(segment)])
    held = use(limit)
    for wanted in ([1], [1, 3]):
        with pytest.raises(BackingError, match=r"wanted, .* available"):
            backing.map(G, [SegmentId(segment) for segment in wanted])
        assert backing.resident_bytes() == held
    backing.unmap(G, [SegmentId(4)])
    use(limit)
    backing.map(G, [SegmentId(1)])  # what was given back may be had again
    assert backing.resident_bytes() == held
    use(limit + 2 * layout.segment_bytes)
    backing.map(G, [SegmentId(3), SegmentId(4)])
    assert backing.resident_bytes() == held + 2 * layout.segment_bytes
    backing.close()


def test_a_cgroup_s_limit_refuses_static_memory_at_start(tmp_path: Path) -> None:
    machine, layouts = Machine(tmp_path), layouts_of_five_segments()
    (layout,) = layouts
    needed = layout.fixed_bytes + (layout.max_segments - 1) * layout.segment_bytes
    backing = StaticBacking(available_bytes=machine.available, margin_bytes=100)
    machine.set(needed + 99, 0)
    with pytest.raises(BackingError, match="static KV pool needs"):
        backing.reserve(SPEC, layouts)
    assert backing.resident_bytes() is None
    machine.set(needed + 100, 0)
    backing.reserve(SPEC, layouts)
    backing.close()


UNDER_LIMITS = """
import json, resource
from sglang.srt.errors import BackingError
from sglang.srt.mem_cache.kv_layout import *
from sglang.srt.mem_cache.segment_cuts import *
from sglang.srt.mem_cache.segment_backing import make_backing

FREE = resource.RLIM_INFINITY
WHICH = {"VmSize": resource.RLIMIT_AS, "VmData": resource.RLIMIT_DATA}
SPEC = KVCacheSpec((KVGroupSpec((0, 1)),), 2, 16, 16, "float32", 16)
LAYOUTS = make_segment_layouts(SPEC, slots_per_segment=1 << 15, auto_segment_bytes=1,
    auto_min_slots=1, granule_bytes=4096, machine_bytes=80 << 20, budget_bytes=0)

def limit(which, room):
    lines = open("/proc/self/status").read().splitlines()
    held = next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which + ":"))
    resource.setrlimit(WHICH[which], (held + room, FREE))

def attempt(act, *arguments):
    try:
        act(*arguments)
    except BackingError as error:
        return str(error)
    return None

def under(name, which, at):
    backing = make_backing(name, debug_protect=name == "mmap")
    said, figures = [], []
    if at == "map":
        backing.reserve(SPEC, LAYOUTS)
    limit(which, 40 << 20)
    if at == "reserve":
        said.append(attempt(backing.reserve, SPEC, LAYOUTS))
        figures.append(backing.resident_bytes())
        resource.setrlimit(WHICH[which], (FREE, FREE))
        backing.reserve(SPEC, LAYOUTS)
    else:
        for segments in ([1], [2], [3, 4], [5], [3]):
            said.append(attempt(backing.map, 0, segments))
            figures.append(backing.resident_bytes())
        resource.setrlimit(WHICH[which], (FREE, FREE))
        backing.map(0, [3, 4])
    figures.append(backing.resident_bytes())
    backing.close()
    return said, figures

cases = [("mmap", "VmData", "map"), ("segment_table", "VmSize", "map"),
         ("mmap", "VmSize", "reserve"), ("static", "VmSize", "reserve")]
layout = LAYOUTS[0]
sizes = (layout.segment_bytes, layout.fixed_bytes, layout.max_segments)
print(json.dumps([sizes, [under(*case) for case in cases]]))
"""


def test_what_the_kernel_refuses_leaves_everything_as_it_was() -> None:
    """40 MiB may still be taken, a segment is 16 MiB: no third one fits, alone or with another."""
    done = subprocess.run(
        [sys.executable, "-c", UNDER_LIMITS],
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # a thread's stack counts as well
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (segment, fixed, count), cases = json.loads(done.stdout)
    assert segment == 16 * MIB
    # a table's granule is a byte: half of what mmap has to take for page 0
    for (said, figures), first in zip(cases[:2], (fixed, fixed // 2), strict=True):
        assert said[:2] == [None, None]
        assert all("Cannot allocate memory" in refusal for refusal in said[2:])
        assert figures == [first + n * segment for n in (1, 2, 2, 2, 2, 4)]
    (mmap_said, mmap_figures), (static_said, static_figures) = cases[2:]
    assert "is there a limit on virtual memory (ulimit -v)?" in mmap_said[0]
    assert mmap_figures == [None, fixed]
    assert "Cannot allocate memory" in static_said[0]
    assert static_figures[0] is None
    assert static_figures[1] >= (count - 1) * segment

"""What a KV segment on disk costs: to move it there, and to read it from there.

    PYTHONPATH=python python benchmark/memory/bench_disk.py --path /var/tmp --markdown

The column `segmented` is what lies on disk, `static` what lies in memory. Reading is one pass over
K and V of every layer in their order, as a decode step reads them, on one thread; `dropped` means
that the page cache was emptied of the file before.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench_common import MIB, Report, Row, in_turns, make_spec, medians, parser, seconds_of, show
from sglang.srt.mem_cache.kv_layout import (
    GroupId,
    SegmentId,
    SegmentLayout,
)
from sglang.srt.mem_cache.segment_backing import Plane
from sglang.srt.mem_cache.segment_backing.disk_file import DiskFile
from sglang.srt.mem_cache.segment_backing.mmap_disk import MmapDiskBacking
from sglang.srt.mem_cache.segment_cuts import (
    make_segment_layouts,
)

G = GroupId(0)


class Pool:
    """Some segments of SmolLM2's shape, all written."""

    def __init__(self, path: Path, num_segments: int, slots: int) -> None:
        self.spec = make_spec(23_040, 64)
        self.disk = DiskFile(path)
        self.backing = MmapDiskBacking(self.disk)
        self.layout: SegmentLayout = make_segment_layouts(
            self.spec,
            slots_per_segment=slots,
            auto_segment_bytes=1,
            auto_min_slots=1,
            granule_bytes=self.backing.granule_bytes,
            machine_bytes=2 * num_segments * slots * 23_040,
            budget_bytes=0,
        )[0]
        self.backing.reserve(self.spec, (self.layout,))
        self.segments = tuple(SegmentId(n) for n in range(1, 1 + num_segments))
        self.backing.map(G, self.segments)
        self.planes = [
            self.backing.view(layer, plane)[self.layout.slots_per_segment :][
                : num_segments * self.layout.slots_per_segment
            ]
            .view(torch.int64)
            .flatten()
            for layer in self.spec.groups[0].layers
            for plane in (Plane.KEY, Plane.VALUE)
        ]
        for number, plane in enumerate(self.planes):
            plane.fill_(number)

    @property
    def num_bytes(self) -> int:
        return len(self.segments) * self.layout.segment_bytes

    def read(self) -> None:
        """Every byte once; raises where one is wrong."""
        for number, plane in enumerate(self.planes):
            if int(plane.sum()) != number * len(plane):
                raise RuntimeError(f"plane {number} does not read what was written")

    def drop_cache(self) -> None:
        """Nothing of the file stays in memory; call it before anything was read through it."""
        os.fsync(self.disk.fd)
        os.posix_fadvise(self.disk.fd, 0, 0, os.POSIX_FADV_DONTNEED)


def gib_per_s(pool: Pool, act: Callable[[], object]) -> float:
    return pool.num_bytes / seconds_of(act) / (1 << 30)


def one_pool(path: Path, num_segments: int, slots: int, state: str) -> float:
    """GiB/s of reading all in `state`, or of moving all to disk, on a fresh pool."""
    pool = Pool(path, num_segments, slots)
    try:
        pool.read()
        if state == "memory":
            return gib_per_s(pool, pool.read)
        if state == "move":
            return gib_per_s(pool, lambda: [pool.backing.demote(G, (s,)) for s in pool.segments])
        pool.backing.demote(G, pool.segments)
        if state == "dropped":
            pool.drop_cache()
        elif state == "again":
            pool.read()
        return gib_per_s(pool, pool.read)
    finally:
        pool.backing.close()


def main(argv: Sequence[str] | None = None) -> Report:
    args = parser(__doc__.splitlines()[0])
    args.add_argument("--path", type=Path, default=Path("/var/tmp"), help="where the file lies")
    args.add_argument("--segments", type=int, default=16)
    args.add_argument("--slots", type=int, default=1024, help="tokens in a segment")
    settings = args.parse_args(argv)
    torch.set_num_threads(1)
    states = ("memory", "move", "first", "again", "dropped")
    size = (settings.path, settings.segments, settings.slots)
    ways = {state: lambda state=state: one_pool(*size, state) for state in states}
    found = medians(in_turns(settings.repeats, ways))
    total = settings.segments * settings.slots * 23_040 / MIB
    report = Report(
        "the disk tier", {"MiB": total, "slots": settings.slots, "repeats": settings.repeats}
    )
    read = found["memory"]
    report.rows += [
        Row("moving segments to disk", found["move"], None, "GiB/s"),
        Row("reading, the first time after the move", found["first"], read, "GiB/s"),
        Row("reading, in the page cache", found["again"], read, "GiB/s"),
        Row("reading, page cache dropped", found["dropped"], read, "GiB/s"),
    ]
    show(report, markdown=settings.markdown)
    return report


if __name__ == "__main__":
    main()

"""What block tables weigh: many rows of a very long context of which little is used.

    PYTHONPATH=python python benchmark/memory/bench_tables.py --markdown

The figure has two parts: the page ids by the kernel's resident figure of the address space that
they stand in, and objects, arrays and lists by what the interpreter counts as allocated
(tracemalloc). What the kernel's own page tables grew by is told beside it. Two ways to fill: every
row in one extend, and all rows growing by turns, so that their pages lie scattered. Then every row
is freed. Bytes are counted, not timed, so once is enough (--repeats does nothing). A dense table is
rows x context x 4 bytes.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench_common import MIB, Report, Row, closing, make_memory, parser, show
from sglang.srt.mem_cache.allocation import KVMemory, PageNeed
from sglang.srt.mem_cache.segment_backing.host_calls import read_smaps_resident

GOAL_ROW_BYTES = 8 << 10
SEGMENT_TOKENS = 65_536


@dataclass
class Weight:
    """Bytes of the tables (ids resident, objects), pages in use, runs; bytes when all are freed."""

    ids: int
    objects: int
    pages: int
    runs: int
    page_tables: int
    freed: int


def resident_ids(memory: KVMemory) -> int:
    """Bytes of the tables' address space that the kernel has in memory."""
    ids = memory.rows.groups[0].space.ids
    resident = read_smaps_resident(ids.ctypes.data, ids.ctypes.data + ids.nbytes)
    assert resident is not None
    return resident


def page_table_bytes() -> int:
    """What the kernel's page tables of this process take."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmPTE:"):
            return int(line.split()[1]) * 1024
    return 0


def object_bytes() -> int:
    """What the interpreter has allocated for tables since tracemalloc began."""
    names = ("block_table", "table_rows", "table_space", "memory_pool", "lease")
    here = [tracemalloc.Filter(True, f"*/mem_cache/{name}.py") for name in names]
    snapshot = tracemalloc.take_snapshot().filter_traces(here)
    return sum(entry.size for entry in snapshot.statistics("filename"))


def measure(rows: int, tokens: int, turns: int, page_size: int) -> Weight:
    """What tables weigh after `rows` rows grew to `tokens` in `turns`."""
    total = rows * tokens + 4 * SEGMENT_TOKENS
    with closing(
        make_memory("mmap", tokens=total, page_size=page_size, slots_per_segment=SEGMENT_TOKENS)
    ) as memory:
        memory.ladder.ensure([rows * (tokens // page_size + 1)])
        before = page_table_bytes()
        tracemalloc.start()
        leases = [memory.open(np.empty(0, np.int32), max_prefix=0) for _ in range(rows)]
        for turn in range(1, turns + 1):
            for lease in leases:
                need = PageNeed(lease, tokens * turn // turns - lease.num_tokens)
                placement = memory.alloc_for_extend([need])
                assert placement is not None
                del placement
        objects = object_bytes()
        tracemalloc.stop()
        tables = [lease.tables[0] for lease in leases]
        found = Weight(
            resident_ids(memory),
            objects,
            sum(table.num_pages for table in tables),
            sum(len(table.runs) for table in tables),
            max(0, page_table_bytes() - before),
            0,
        )
        for lease in leases:
            memory.close(lease, None, 0)
        found.freed = resident_ids(memory)
        return found


def main(argv: Sequence[str] | None = None) -> Report:
    args = parser(__doc__.splitlines()[0])
    args.add_argument("--rows", type=int, default=256)
    args.add_argument("--context", type=int, default=10_000_000)
    args.add_argument("--used-percent", type=float, default=1.0)
    settings = args.parse_args(argv)
    report = Report("block tables", dict(vars(settings)))
    del report.settings["markdown"]
    tokens = int(settings.context * settings.used_percent / 100)
    dense = settings.rows * settings.context * 4
    for page_size in (64, 1):
        for turns in (1, 12):
            add_rows(report, settings, dense, tokens, turns, page_size)
    report.notes.append("the static column is what a dense table takes: rows x context x 4 bytes.")
    show(report, markdown=settings.markdown)
    return report


def add_rows(
    report: Report, settings: object, dense: int, tokens: int, turns: int, page_size: int
) -> None:
    found = measure(settings.rows, tokens, turns, page_size)
    size = found.ids + found.objects
    how = f"page size {page_size}, {turns} extend(s) a row, {found.runs} runs"
    report.rows.append(Row(f"tables: {how}", size / MIB, dense / MIB, "MiB"))
    spare = (size - 4 * found.pages) / settings.rows
    goal = f"<= {GOAL_ROW_BYTES:,} B"
    met = spare <= GOAL_ROW_BYTES
    report.rows.append(Row(f"beyond 4 B a page: {how}", spare, None, "B/row", goal, met))
    each = found.page_tables / settings.rows
    report.rows.append(Row(f"the kernel's page tables: {how}", each, None, "B/row"))
    gone = found.freed / MIB
    report.rows.append(
        Row(f"ids when all rows are freed: {how}", gone, None, "MiB", "0", gone == 0)
    )


if __name__ == "__main__":
    main()

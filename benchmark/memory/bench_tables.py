"""What block tables weigh: many rows of a very long context of which little is used.

    PYTHONPATH=python python benchmark/memory/bench_tables.py --markdown

The figure is what the interpreter itself counts as allocated (tracemalloc), so lists, objects and
spare room are in it. Two ways to fill: every row in one extend, and all rows growing by turns, so
that their pages lie scattered. Bytes are counted, not timed, so once is enough (--repeats does
nothing). A dense table is rows x context x 4 bytes.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence

import numpy as np

from bench_common import MIB, Report, Row, closing, make_memory, parser, show
from sglang.srt.mem_cache.allocation import PageNeed

GOAL_ROW_BYTES = 8 << 10
SEGMENT_TOKENS = 65_536


def measure(rows: int, tokens: int, turns: int, page_size: int) -> tuple[int, int, int]:
    """(bytes of the tables, pages in use, runs) after `rows` rows grew to `tokens` in `turns`."""
    total = rows * tokens + 4 * SEGMENT_TOKENS
    with closing(
        make_memory("mmap", tokens=total, page_size=page_size, slots_per_segment=SEGMENT_TOKENS)
    ) as memory:
        leases = [memory.open(np.empty(0, np.int32), max_prefix=0) for _ in range(rows)]
        memory.ladder.ensure([rows * (tokens // page_size + 1)])
        tracemalloc.start()
        for turn in range(1, turns + 1):
            for lease in leases:
                need = PageNeed(lease, tokens * turn // turns - lease.num_tokens)
                placement = memory.alloc_for_extend([need])
                assert placement is not None
                del placement
        snapshot = tracemalloc.take_snapshot()
        tracemalloc.stop()
        here = [
            tracemalloc.Filter(True, f"*/mem_cache/{f}.py") for f in ("block_table", "id_array")
        ]
        size = sum(entry.size for entry in snapshot.filter_traces(here).statistics("filename"))
        pages = sum(lease.tables[0].num_pages for lease in leases)
        runs = sum(len(lease.tables[0].runs) for lease in leases)
        return size, pages, runs


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
    size, pages, pieces = measure(settings.rows, tokens, turns, page_size)
    how = f"page size {page_size}, {turns} extend(s) a row, {pieces} runs"
    report.rows.append(Row(f"tables: {how}", size / MIB, dense / MIB, "MiB"))
    spare = (size - 4 * pages) / settings.rows
    goal = f"<= {GOAL_ROW_BYTES:,} B"
    met = spare <= GOAL_ROW_BYTES
    report.rows.append(Row(f"beyond 4 B a page: {how}", spare, None, "B/row", goal, met))


if __name__ == "__main__":
    main()

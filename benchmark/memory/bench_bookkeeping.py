"""The bookkeeping of one very long prefill, chunk by chunk: is it linear?

    PYTHONPATH=python python benchmark/memory/bench_bookkeeping.py --markdown

Everything that the scheduler and the batch do about memory for each chunk, and nothing else:
pages, block table, slots, the snapshot that attention gets, and the prefix tree. A chunk's cost
near the end over its cost near the start shows whether it grows with what was computed before.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np

from bench_common import (
    BACKINGS,
    Report,
    Row,
    closing,
    cpu_seconds_of,
    make_memory,
    parser,
    show,
)
from sglang.srt.mem_cache.allocation import PageNeed

SEGMENT_TOKENS = 65_536
GOAL_TOTAL_S, GOAL_GROWTH = 1.0, 2.0


def prefill(backing: str, token_ids: np.ndarray, chunk: int, page_size: int) -> dict[str, float]:
    """Seconds of the parts of one prefill, its end and a second request that hits all of it."""
    tokens = len(token_ids)
    steps: list[float] = []
    with closing(
        make_memory(
            backing,
            tokens=tokens + 4 * SEGMENT_TOKENS,
            page_size=page_size,
            slots_per_segment=SEGMENT_TOKENS,
        )
    ) as memory:
        lease = memory.open(token_ids, max_prefix=tokens - 1)
        memory.ladder.ensure([tokens // page_size + 1])  # mapping is measured elsewhere

        def step(end: int) -> None:
            need = PageNeed(lease, end - lease.num_tokens)
            assert memory.alloc_for_extend([need]) is not None
            lease.tables[0].snapshot()
            memory.cache_prefix(lease, token_ids, end)
            memory.on_step_boundary(0.0, (chunk // page_size,))

        for end in range(chunk, tokens + chunk, chunk):
            steps.append(cpu_seconds_of(lambda end=end: step(min(end, tokens))))
        closed = cpu_seconds_of(lambda: memory.close(lease, token_ids, tokens))
        again = []
        opened = cpu_seconds_of(
            lambda: again.append(memory.open(token_ids, max_prefix=tokens - page_size))
        )
        memory.close(again[0], None, 0)
        memory.audit()
        tenth = max(1, len(steps) // 10)
    return {
        "total": sum(steps) + closed,
        "first tenth": statistics.median(steps[:tenth]),
        "last tenth": statistics.median(steps[-tenth:]),
        "largest": max(steps),
        "close": closed,
        "open": opened,
    }


def main(argv: Sequence[str] | None = None) -> Report:
    args = parser(__doc__.splitlines()[0])
    args.add_argument("--tokens", type=int, default=10_000_000)
    args.add_argument("--chunk", type=int, default=8192)
    settings = args.parse_args(argv)
    report = Report("bookkeeping of one prefill", dict(vars(settings)))
    del report.settings["markdown"]
    token_ids = np.random.default_rng(1).integers(0, 50_000, settings.tokens).astype(np.int32)
    for page_size in (64, 1):
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in BACKINGS}
        for _ in range(settings.repeats):
            for name in BACKINGS:
                runs[name].append(prefill(name, token_ids, settings.chunk, page_size))
        found = {
            name: {part: statistics.median(run[part] for run in some) for part in some[0]}
            for name, some in runs.items()
        }
        add_rows(report, found["mmap"], found["static"], page_size)
    report.notes.append("times are what the calling thread costs (CPU time).")
    show(report, markdown=settings.markdown)
    return report


def add_rows(report: Report, ours: dict[str, float], static: dict[str, float], page: int) -> None:
    def row(what: str, part: str, scale: float, unit: str, goal: float | None = None) -> None:
        value = ours[part] * scale
        met = None if goal is None else value < goal
        words = "" if goal is None else f"< {goal:g} {unit}"
        name = f"{what}, page size {page}"
        report.rows.append(Row(name, value, static[part] * scale, unit, words, met))

    row("all chunks and the end", "total", 1, "s", GOAL_TOTAL_S)
    row("chunk, median of the first tenth", "first tenth", 1e6, "us")
    row("chunk, median of the last tenth", "last tenth", 1e6, "us")
    growth = [part["last tenth"] / part["first tenth"] for part in (ours, static)]
    goal = f"< {GOAL_GROWTH:g}"
    name = f"last tenth over first tenth, page size {page}"
    report.rows.append(Row(name, *growth, "x", goal, growth[0] < GOAL_GROWTH))
    row("slowest chunk", "largest", 1000, "ms")
    row("end of the request", "close", 1000, "ms")
    row("open of a request that hits all of it", "open", 1000, "ms")


if __name__ == "__main__":
    main()

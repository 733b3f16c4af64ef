"""What it costs to find pages: long extends, their release, and batched decode steps.

    PYTHONPATH=python python benchmark/memory/bench_allocator.py --markdown

`allocator` rows time `PageAllocator` alone, `memory` rows all that the scheduler pays (ladder,
block tables, slots). The pool holds 2 bytes per token, so that mapping costs next to nothing.
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
    in_turns,
    make_memory,
    medians,
    parser,
    show,
)
from sglang.srt.mem_cache.allocation import DecodeRows, KVMemory, PageNeed

NO_TOKENS = np.empty(0, np.int32)
GOAL_PAGE_US, GOAL_CALL_US = 1.0, 20.0
SEGMENT_TOKENS = 65_536


def _memory(backing: str, tokens: int, page_size: int) -> KVMemory:
    return make_memory(
        backing, tokens=tokens, page_size=page_size, slots_per_segment=SEGMENT_TOKENS
    )


def extend_and_free(backing: str, tokens: int, chunk: int, page_size: int) -> tuple[float, float]:
    """Microseconds per page to take `tokens` in extends of `chunk`, and to give them back."""
    with closing(_memory(backing, tokens + 2 * SEGMENT_TOKENS, page_size)) as memory:
        lease = memory.open(NO_TOKENS, max_prefix=0)
        memory.ladder.ensure([tokens // page_size])  # mapping is measured elsewhere

        def take() -> None:
            for _ in range(tokens // chunk):
                assert memory.alloc_for_extend([PageNeed(lease, chunk)]) is not None

        pages = tokens // page_size
        taken = cpu_seconds_of(take)
        freed = cpu_seconds_of(lambda: memory.close(lease, None, 0))
        return taken / pages * 1e6, freed / pages * 1e6


def decode_calls(backing: str, batch: int, calls: int, page_size: int) -> float:
    """Mean microseconds of one `alloc_for_decode` of `batch` rows, over `calls` calls."""
    tokens = batch * (calls + 2 * page_size) + 2 * SEGMENT_TOKENS
    with closing(_memory(backing, tokens, page_size)) as memory:
        leases = [memory.open(NO_TOKENS, max_prefix=0) for _ in range(batch)]
        for i, lease in enumerate(leases):  # rows start pages at different steps
            memory.alloc_for_extend([PageNeed(lease, 1 + i % page_size)])
        memory.ladder.ensure([batch * (calls // page_size + 1)])
        rows = DecodeRows.of(leases)  # as the scheduler keeps it while the same requests go on

        def run() -> None:
            for _ in range(calls):
                assert memory.alloc_for_decode(rows) is not None

        return cpu_seconds_of(run) / calls * 1e6


def page_calls(backing: str, batch: int, calls: int, page_size: int) -> float:
    """Mean microseconds that the allocator alone takes to give one page to each of `batch` rows."""
    pages = batch * (calls + 2)
    with closing(_memory(backing, pages * page_size + 2 * SEGMENT_TOKENS, page_size)) as memory:
        allocator = memory.allocators[0]
        memory.ladder.ensure([pages])
        last = np.array([int(allocator.alloc_pages(1)[0]) for _ in range(batch)])
        times = []
        for _ in range(calls):
            hints = (last + 1).tolist()
            times.append(
                cpu_seconds_of(lambda hints=hints: last.put(range(batch), _each(allocator, hints)))
            )
        return statistics.fmean(times) * 1e6


def _each(allocator: object, hints: list[int]) -> np.ndarray:
    return allocator.alloc_each(hints)


def main(argv: Sequence[str] | None = None) -> Report:
    args = parser(__doc__.splitlines()[0])
    args.add_argument("--tokens", type=int, default=10_000_000)
    args.add_argument("--chunk", type=int, default=8192)
    args.add_argument("--batch", type=int, default=256)
    args.add_argument("--decodes", type=int, default=1_000_000, help="tokens, over the batch")
    settings = args.parse_args(argv)
    tokens = settings.tokens - settings.tokens % settings.chunk
    report = Report("allocator", {**vars(settings), "tokens": tokens})
    del report.settings["markdown"]
    for page_size in (64, 16, 1):
        extends(report, settings, tokens, page_size)
    for page_size in (64, 1):
        calls = settings.decodes // settings.batch
        if page_size == 1:
            calls = max(1, calls // 20)
            report.notes.append(f"decode at page size 1: {calls} calls a measurement.")
        found = medians(
            in_turns(
                settings.repeats,
                {
                    name: lambda name=name, n=calls, size=page_size: decode_calls(
                        name, settings.batch, n, size
                    )
                    for name in BACKINGS
                },
            )
        )
        goal = f"< {GOAL_CALL_US:g} us"
        what = f"memory: decode step of {settings.batch} rows, page size {page_size}"
        met = found["mmap"] < GOAL_CALL_US
        report.rows.append(Row(what, found["mmap"], found["static"], "us/call", goal, met))
    one_page_each(report, settings)
    report.notes.append("times are what the calling thread costs (CPU time).")
    show(report, markdown=settings.markdown)
    return report


def extends(report: Report, settings: object, tokens: int, page_size: int) -> None:
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in BACKINGS}
    for _ in range(settings.repeats):
        for name in BACKINGS:
            runs[name].append(extend_and_free(name, tokens, settings.chunk, page_size))
    for i, verb in enumerate(("take", "free")):
        segmented, static = (statistics.median(run[i] for run in runs[n]) for n in BACKINGS)
        what = f"memory: {verb} {tokens:,} tokens, page size {page_size}"
        met = segmented < GOAL_PAGE_US
        report.rows.append(Row(what, segmented, static, "us/page", "< 1 us", met))


def one_page_each(report: Report, settings: object) -> None:
    calls = max(1, settings.decodes // settings.batch // 64)
    ways = {n: lambda n=n: page_calls(n, settings.batch, calls, 64) for n in BACKINGS}
    found = medians(in_turns(settings.repeats, ways))
    each = {name: value / settings.batch for name, value in found.items()}
    what = f"allocator: one page for each of {settings.batch} rows"
    met = each["mmap"] < GOAL_PAGE_US
    report.rows.append(Row(what, each["mmap"], each["static"], "us/page", "< 1 us", met))


if __name__ == "__main__":
    main()

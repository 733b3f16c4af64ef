"""How long a KV pool takes to start, and what it weighs before the first token.

    PYTHONPATH=python python benchmark/memory/bench_start.py --markdown

The static pool commits all memory at start; where that is more than `--static-bytes` or 60 % of
what is available, as many tokens as fit are used instead, and the report says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from bench_common import MIB, Report, Row, make_memory, parser, resident_bytes, seconds_of, show
from sglang.srt.mem_cache.allocation import KVMemory
from sglang.srt.utils.host_memory import read_host_memory

GOAL_MS, GOAL_MIB = 50, 20


def measure(backing: str, tokens: int, bytes_per_token: int) -> tuple[float, float]:
    """Milliseconds and resident MiB that one start adds."""
    made: list[KVMemory] = []
    before = resident_bytes()
    seconds = seconds_of(
        lambda: made.append(
            make_memory(backing, tokens=tokens, page_size=64, bytes_per_token=bytes_per_token)
        )
    )
    weight = resident_bytes() - before
    made[0].close_pool()
    return seconds * 1000, weight / MIB


def main(argv: Sequence[str] | None = None) -> Report:
    args = parser(__doc__.splitlines()[0])
    args.add_argument("--tokens", type=int, default=10_000_000)
    args.add_argument("--static-bytes", type=int, default=5_200_000_000)
    settings = args.parse_args(argv)
    room = min(settings.static_bytes, int(read_host_memory().available_bytes * 0.6))
    report = Report("start of a pool", {"tokens": settings.tokens, "repeats": settings.repeats})
    for bytes_per_token in (512, 23_040):
        fitting = min(settings.tokens, room // bytes_per_token)
        if fitting < settings.tokens:
            need = settings.tokens * bytes_per_token / 1e9
            report.notes.append(
                f"static at {bytes_per_token:,} B/token would take {need:.1f} GB at start, more "
                f"than {room / 1e9:.1f} GB; it was measured with {fitting:,} tokens."
            )
        measure("mmap", settings.tokens, bytes_per_token)  # imports and caches, once
        add_rows(report, settings.repeats, bytes_per_token, settings.tokens, fitting)
    show(report, markdown=settings.markdown)
    return report


def add_rows(report: Report, repeats: int, width: int, tokens: int, static_tokens: int) -> None:
    found: dict[str, list[tuple[float, float]]] = {"mmap": [], "static": []}
    ways: dict[str, Callable[[], tuple[float, float]]] = {
        "mmap": lambda: measure("mmap", tokens, width),
        "static": lambda: measure("static", static_tokens, width),
    }
    for _ in range(repeats):
        for name, way in ways.items():
            found[name].append(way())
    for i, (what, unit, goal) in enumerate([("time", "ms", GOAL_MS), ("memory", "MiB", GOAL_MIB)]):
        segmented, static = (statistics.median(run[i] for run in found[n]) for n in ways)
        report.rows.append(
            Row(
                f"{what} to start {tokens:,} tokens of {width:,} B",
                segmented,
                static,
                unit,
                f"< {goal} {unit}",
                segmented < goal,
            )
        )


if __name__ == "__main__":
    main()

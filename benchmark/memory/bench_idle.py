"""What stays mapped when decodes that ended at different times are over, prefixes kept.

    PYTHONPATH=python python benchmark/memory/bench_idle.py --markdown

Requests with prompts and answers of different lengths come and go, some of their prefixes are
evicted at random afterwards, as a busy cache would have it, and the idle clock passes. Then the
pages are packed as `POST /compact_kv` packs them, and the clock passes again. The packed floor is
what the cached pages alone would take.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np

from bench_common import BACKINGS, MIB, Report, Row, closing, make_memory, parser, show
from sglang.srt.mem_cache.allocation import KVLease, KVMemory, PageNeed
from sglang.srt.mem_cache.compaction import compact

IDLE_S = 30.0
GOAL_RATIO, GOAL_COMPACT_RATIO = 1.1, 1.0
COMPACT_BYTES = 64 << 20  # a turn's share, as the scheduler has it


def serve_staggered(memory: KVMemory, requests: int, batch: int, rng: np.random.Generator) -> None:
    """Run `requests` requests, at most `batch` at a time, each with an end of its own."""
    running: list[tuple[KVLease, np.ndarray, int]] = []
    waiting = requests
    while waiting or running:
        while waiting and len(running) < batch:
            prompt, answer = int(rng.integers(50, 1500)), int(rng.integers(10, 600))
            ids = rng.integers(0, 50_000, prompt + answer).astype(np.int32)
            lease = memory.open(ids, max_prefix=prompt - 1)
            assert lease is not None
            need = PageNeed(lease, prompt - lease.num_tokens)
            assert memory.alloc_for_extend([need]) is not None
            running.append((lease, ids, prompt + answer))
            waiting -= 1
        assert memory.alloc_for_decode([PageNeed(lease, 1) for lease, _, _ in running]) is not None
        going = []
        for lease, ids, end in running:
            if lease.num_tokens >= end:
                memory.close(lease, ids, end)
            else:
                going.append((lease, ids, end))
        running = going
        memory.on_step_boundary(0.0)


def pass_idle_time(memory: KVMemory, began: float) -> None:
    """Let the idle clock run out and every unmap come to its end."""
    for now in (began, began + 2 * IDLE_S, began + 4 * IDLE_S):
        memory.on_step_boundary(now)
        for ticket in memory.manager.pending():
            memory.manager.wait(ticket)
        memory.on_step_boundary(now)


def measure(backing: str, settings: object, seed: int, kept: float) -> dict[str, float]:
    """Bytes and ratios after one run in which `kept` of the cached tokens survive."""
    rng = np.random.default_rng(seed)
    tokens = settings.requests * 2100 + 64 * settings.segment_tokens
    with closing(
        make_memory(
            backing,
            tokens=tokens,
            page_size=64,
            bytes_per_token=512,
            slots_per_segment=settings.segment_tokens,
            idle_release_s=IDLE_S,
            prefix_idle_s=-1.0,
        )
    ) as memory:
        serve_staggered(memory, settings.requests, settings.batch, rng)
        memory.cache.evict(int(memory.cache.num_pages * (1 - kept)))
        pass_idle_time(memory, 0.0)
        memory.audit()
        found = figures(memory)
        found["moved"] = pack(memory)
        pass_idle_time(memory, 10 * IDLE_S)
        memory.audit()
        found.update({f"packed {key}": value for key, value in figures(memory).items()})
        return found


def pack(memory: KVMemory) -> float:
    """Move pages until nothing is left to move; MiB that were copied.

    A static pool keeps its segments however they are filled, so there nothing is moved.
    """
    moved = 0
    while memory.manager.backing.elastic:
        done = compact(memory, COMPACT_BYTES)
        if done is None:
            break
        moved += done.moved_bytes
    return moved / MIB


def figures(memory: KVMemory) -> dict[str, float]:
    """What is mapped and resident now, and its ratios to the packed floor."""
    page_bytes = memory.page_size * memory.spec.bytes_per_token
    segment_bytes = memory.manager.layouts[0].segment_bytes
    floor = memory.cache.num_pages * page_bytes
    mapped = memory.manager.mapped_bytes
    resident = memory.manager.backing.resident_bytes()
    assert resident is not None
    return {
        "floor": floor / MIB,
        "mapped": mapped / MIB,
        "resident": resident / MIB,
        "ratio": max(0, mapped - segment_bytes) / floor,
        "resident ratio": max(0, resident - segment_bytes) / floor,
    }


def main(argv: Sequence[str] | None = None) -> Report:
    args = parser(__doc__.splitlines()[0])
    args.add_argument("--requests", type=int, default=400)
    args.add_argument("--batch", type=int, default=64)
    args.add_argument("--segment-tokens", type=int, default=8192)
    settings = args.parse_args(argv)
    report = Report("idle footprint", dict(vars(settings)))
    del report.settings["markdown"]
    for kept in (1.0, 0.5, 0.1):
        runs = {name: [] for name in BACKINGS}
        for seed in range(settings.repeats):
            for name in BACKINGS:
                runs[name].append(measure(name, settings, seed, kept))
        found = {
            name: {key: statistics.median(run[key] for run in some) for key in some[0]}
            for name, some in runs.items()
        }
        when = f"{kept:.0%} of the cache kept"
        add_rows(report, found["mmap"], found["static"], when, "", GOAL_RATIO)
        when = f"{when}, compacted"
        report.rows.append(Row(f"{when}: bytes moved", found["mmap"]["moved"], None, "MiB"))
        add_rows(report, found["mmap"], found["static"], when, "packed ", GOAL_COMPACT_RATIO)
    report.notes.append(
        "where part of the cache was evicted at random, its holes can only be closed by compaction."
    )
    report.notes.append("a static pool is not compacted: its segments stay mapped in any case.")
    show(report, markdown=settings.markdown)
    return report


def add_rows(
    report: Report,
    ours: dict[str, float],
    static: dict[str, float],
    when: str,
    prefix: str,
    goal: float,
) -> None:
    for key, what in (
        ("floor", "packed floor"),
        ("mapped", "mapped"),
        ("resident", "resident, the kernel's figure"),
    ):
        key = prefix + key
        report.rows.append(Row(f"{when}: {what}", ours[key], static[key], "MiB"))
    for key, what in (("ratio", "mapped"), ("resident ratio", "resident")):
        key = prefix + key
        name = f"{when}: ({what} - 1 segment) / floor"
        met = ours[key] <= goal
        report.rows.append(Row(name, ours[key], static[key], "x", f"<= {goal}", met))


if __name__ == "__main__":
    main()

"""What one sum over the ranks of a machine costs, over sockets and in shared memory.

    PYTHONPATH=python OMP_NUM_THREADS=1 python benchmark/ranks/bench_all_reduce.py --markdown

Every rank is a process. Both ways are measured in turns (A B A B ...) between the same processes,
a burst of sums at a time; figures are medians over the bursts of microseconds a sum, on rank 0.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from sglang.srt.distributed.communicator import Communicator
from sglang.srt.distributed.process_group import connect_ranks
from sglang.srt.utils.rendezvous import RankPlace, Rendezvous

WAYS = ("sockets", "shared")
TIMEOUT_S = 60.0


def burst(group: Communicator, num_bytes: int, count: int) -> float:
    """Microseconds of one of `count` sums of bfloat16 tensors."""
    tensor = torch.ones(num_bytes // 2, dtype=torch.bfloat16)
    began = time.perf_counter()
    for _ in range(count):
        group.all_reduce(tensor)
    return (time.perf_counter() - began) / count * 1e6


def run_rank(
    rank: int,
    places: Sequence[Rendezvous],
    settings: dict[str, Any],
    answer: Connection,
) -> None:
    torch.set_num_threads(1)
    groups: dict[str, Communicator] = {}
    for way, place in zip(WAYS, places, strict=True):
        links = connect_ranks(
            place, RankPlace(rank, settings["ranks"]), TIMEOUT_S, shared_memory=way == "shared"
        ).links
        assert links is not None
        groups[way] = links.compute
    times: dict[int, dict[str, list[float]]] = {}
    for num_bytes in settings["sizes"]:
        times[num_bytes] = {way: [] for way in WAYS}
        for _ in range(settings["bursts"] + 1):
            for way, group in groups.items():
                times[num_bytes][way].append(burst(group, num_bytes, settings["count"]))
    answer.send({size: {way: t[1:] for way, t in ways.items()} for size, ways in times.items()})


def measure(settings: dict[str, Any]) -> list[dict[str, Any]]:
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        meetings = [Rendezvous.for_ranks(settings["ranks"], folder) for folder in (one, two)]
        receiver, sender = spawn.Pipe(duplex=False)
        _, unread = spawn.Pipe(duplex=False)
        ranks = [
            spawn.Process(
                target=run_rank,
                args=(r, [m[r] for m in meetings], settings, unread if r else sender),
            )
            for r in range(settings["ranks"])
        ]
        for process in ranks:
            process.start()
        told = receiver.recv()
        for process in ranks:
            process.join()
    return [
        {
            "ranks": settings["ranks"],
            "bytes": size,
            **{way: round(statistics.median(t), 1) for way, t in ways.items()},
            "ratio": round(
                statistics.median(
                    b / a for a, b in zip(ways["sockets"], ways["shared"], strict=True)
                ),
                3,
            ),
        }
        for size, ways in told.items()
    ]


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| ranks | bytes | sockets, us | shared, us | ratio |", "|---:|---:|---:|---:|---:|"]
    for row in rows:
        lines.append("| " + " | ".join(f"{value:,}" for value in row.values()) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", default="2,3", help="numbers of ranks")
    parser.add_argument("--sizes", default="1152,9216,65536,262144", help="bytes of a tensor")
    parser.add_argument("--bursts", type=int, default=15)
    parser.add_argument("--count", type=int, default=100, help="sums of a burst")
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args(argv)
    rows = []
    for ranks in args.ranks.split(","):
        sizes = [int(size) for size in args.sizes.split(",")]
        rows += measure(
            {"ranks": int(ranks), "sizes": sizes, "bursts": args.bursts, "count": args.count}
        )
    print(as_markdown(rows) if args.markdown else json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

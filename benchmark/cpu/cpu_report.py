"""What the CPU benchmarks share: their flags, and a report that names the machine."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sgl_kernel import cpu_isa

sys.path.insert(0, str(Path(__file__).parents[1] / "memory"))

from bench_common import describe_machine

Clock = Callable[[], float]


def parser(doc: str, rounds: int, cpu_time: bool = False) -> argparse.ArgumentParser:
    """--threads (PyTorch's), --rounds, --cpu-time if wanted; with the first line of `doc`."""
    found = argparse.ArgumentParser(description=doc.splitlines()[0])
    found.add_argument("--threads", type=int, default=torch.get_num_threads())
    found.add_argument("--rounds", type=int, default=rounds)
    if cpu_time:
        found.add_argument("--cpu-time", action="store_true", help="count one thread's own time")
    return found


def clock_and_threads(args: argparse.Namespace) -> tuple[Clock, int]:
    """What the flags ask for, of PyTorch too: one thread's own time, or the wall's of --threads."""
    threads = 1 if args.cpu_time else args.threads
    torch.set_num_threads(threads)
    return time.thread_time if args.cpu_time else time.perf_counter, threads


def print_report(
    name: str, settings: dict[str, Any], parts: dict[str, Any], **machine: Any
) -> None:
    """One JSON object: the benchmark's name, its settings, the machine and the measured parts."""
    report = {
        "benchmark": name,
        "settings": settings,
        "machine": {**describe_machine(), "isa": cpu_isa().name, **machine},
        **parts,
    }
    print(json.dumps(report, indent=2))

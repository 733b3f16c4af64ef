"""What the machine shows: memory of all processes of a server, and how fast it reads memory."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

_PAGE = os.sysconf("SC_PAGE_SIZE")
_READ_PASSES = 5


@dataclass
class MemoryPeak:
    """The most memory that a process and its children had at once, in bytes.

    `rss`: the sum of what is resident in each, so shared pages count once per process. `pss`: the
    same with shared pages counted once in all, looked at less often. `by_process`: the most that
    each had by itself, by its title. None when there was nothing to look at.
    """

    rss: int | None = None
    pss: int | None = None
    by_process: dict[str, int] = field(default_factory=dict)


@contextlib.contextmanager
def watched_memory(
    pid: int | None, every_s: float = 0.25, pss_every_s: float = 5.0
) -> Iterator[MemoryPeak]:
    """Sample the processes while the block runs; once more, with pss, at its end."""
    peak = MemoryPeak()
    if pid is None:
        yield peak
        return
    done = threading.Event()

    def sample() -> None:
        next_pss = 0.0
        while not done.wait(every_s):
            with_pss = time.monotonic() >= next_pss
            if with_pss:
                next_pss = time.monotonic() + pss_every_s
            _look(pid, peak, with_pss=with_pss)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield peak
    finally:
        done.set()
        sampler.join()
        _look(pid, peak, with_pss=True)


def _look(pid: int, peak: MemoryPeak, *, with_pss: bool) -> None:
    rss = pss = 0
    for process in _family(pid):
        # One that ends while it is looked at has no memory.
        with contextlib.suppress(OSError, psutil.NoSuchProcess):
            own = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * _PAGE
            rss += own
            title = " ".join(process.cmdline()) or process.name()
            name = title.partition(" ")[0] if title.startswith("sglang") else "server"
            peak.by_process[name] = max(own, peak.by_process.get(name, 0))
            if with_pss:
                pss += _pss(process.pid)
    peak.rss = max(rss, peak.rss or 0)
    if with_pss:
        peak.pss = max(pss, peak.pss or 0)


def _family(pid: int) -> list[psutil.Process]:
    try:
        first = psutil.Process(pid)
        return [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _pss(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def read_bandwidth(size_bytes: int) -> float:
    """Bytes per second at which all cores together read memory: the best of a few reductions.

    The buffer has `size_bytes`, which should be several times the last cache; it is freed again.
    """
    buffer = torch.ones(size_bytes // 4, dtype=torch.int32)
    floats = buffer.view(torch.float32)
    ways: tuple[Callable[[], object], ...] = (buffer.amax, floats.sum, floats.amax)
    best = 0.0
    for _ in range(_READ_PASSES):
        for way in ways:
            began = time.perf_counter()
            way()
            best = max(best, size_bytes / (time.perf_counter() - began))
    return best


def describe_machine() -> dict[str, Any]:
    """What the figures depend on: processor, cores, memory, kernel, load, commit, date (UTC)."""
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False)
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_1min": round(os.getloadavg()[0], 2),
        "commit": commit.stdout.strip() or "unknown",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }

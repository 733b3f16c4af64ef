"""What the CPU benchmarks share: their flags, and a report that names the machine."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from sgl_kernel import cpu_isa

sys.path.insert(0, str(Path(__file__).parents[1] / "memory"))

from bench_common import describe_machine


def parser(doc: str, rounds: int) -> argparse.ArgumentParser:
    """--threads (PyTorch's) and --rounds; described by the first line of `doc`."""
    found = argparse.ArgumentParser(description=doc.splitlines()[0])
    found.add_argument("--threads", type=int, default=torch.get_num_threads())
    found.add_argument("--rounds", type=int, default=rounds)
    return found


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

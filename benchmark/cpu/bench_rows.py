"""Norms and gates of rows: PyTorch's passes against the native kernels, through the layers.

Measured in turns, figures are medians; "speedup" is PyTorch's time over the native one. JSON out.

    python benchmark/cpu/bench_rows.py [--threads N] [--rounds 7]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from bench_attention import medians
from cpu_report import parser, print_report
from sgl_kernel import rms_norm, silu_and_mul

ROWS = (1, 16, 2048, 8192)
WIDTHS = (512, 576, 2048)
DTYPES = (torch.bfloat16, torch.float32)
Way = Callable[[], object]


def norm_ways(rows: int, width: int, dtype: torch.dtype, threads: int) -> dict[str, Way]:
    x, residual = torch.randn(rows, width).to(dtype), torch.randn(rows, width)
    weight = torch.ones(width, dtype=dtype)

    def by_torch() -> torch.Tensor:
        total = x + residual
        return F.rms_norm(total, (width,), weight.float(), 1e-5).to(dtype)

    return {
        "torch": by_torch,
        "native": lambda: rms_norm(x, weight, 1e-5, residual, num_threads=threads),
    }


def gate_ways(rows: int, width: int, dtype: torch.dtype, threads: int) -> dict[str, Way]:
    x = torch.randn(rows, 4 * width).to(dtype)

    def by_torch() -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    return {"torch": by_torch, "native": lambda: silu_and_mul(x, num_threads=threads)}


def repeat(way: Way, calls: int) -> None:
    for _ in range(calls):
        way()


def measure(ways: dict[str, Way], rows: int, rounds: int) -> dict[str, Any]:
    calls = max(1, 4096 // rows)
    repeated = {name: partial(repeat, way, calls) for name, way in ways.items()}
    seconds = {
        name: value / calls for name, value in medians(repeated, rounds, time.perf_counter).items()
    }
    return {
        "us": {name: round(value * 1e6, 1) for name, value in seconds.items()},
        "speedup": round(seconds["torch"] / seconds["native"], 2),
    }


def main() -> None:
    args = parser(__doc__, rounds=7).parse_args()
    torch.set_num_threads(args.threads)
    found = [
        {
            "what": what,
            "rows": rows,
            "width": width,
            "dtype": str(dtype).removeprefix("torch."),
            **measure(make(rows, width, dtype, args.threads), rows, args.rounds),
        }
        for what, make in (("residual + norm", norm_ways), ("silu and mul", gate_ways))
        for dtype in DTYPES
        for width in WIDTHS
        for rows in ROWS
    ]
    print_report("cpu_rows", vars(args), {"rows": found})


if __name__ == "__main__":
    main()

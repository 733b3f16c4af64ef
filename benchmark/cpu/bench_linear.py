"""Products of a few rows: the native kernel, PyTorch's product, and the way by float32.

Measured in turns, figures are medians. "gb_s" counts the weight once, "of_read" is its share of
what a plain loop reads per second from as much memory. Each shape has as many weights in turn as
pass the last-level cache, as the layers of a model do. With --cpu-time one thread's own time is
counted instead of the wall's. Prints JSON.

    python benchmark/cpu/bench_linear.py [--threads N] [--cpu-time] [--rounds 7]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from bench_attention import medians
from cpu_report import Clock, clock_and_threads, parser, print_report
from sgl_kernel import linear, read_sum
from sglang.srt.layers.products import cpu_multiplies, widened_linear

SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576), (2048, 8192),
          (4096, 14336))  # fmt: skip
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
DTYPES = (torch.bfloat16, torch.float32)
ALL_BYTES = 160 << 20  # of the weights in turn


def for_each(way: Callable[[torch.Tensor], object], weights: list[torch.Tensor]) -> None:
    for weight in weights:
        way(weight)


def measure(
    outs: int,
    width: int,
    rows: int,
    dtype: torch.dtype,
    threads: int,
    rounds: int,
    clock: Clock,
) -> dict[str, Any]:
    copies = -(-ALL_BYTES // (outs * width * dtype.itemsize))
    weights = [torch.randn(outs, width).div_(width**0.5).to(dtype) for _ in range(copies)]
    x = torch.randn(rows, width).to(dtype)
    ways: dict[str, Callable[[torch.Tensor], object]] = {
        "native": lambda weight: linear(x, weight, num_threads=threads),
        "torch": lambda weight: F.linear(x, weight),
        "read": lambda weight: read_sum(weight, threads),
    }
    if dtype is not torch.float32:
        ways["widened"] = lambda weight: widened_linear(x, weight)
    calls = {name: partial(for_each, way, weights) for name, way in ways.items()}
    seconds = {name: value / copies for name, value in medians(calls, rounds, clock).items()}
    num_bytes = weights[0].nbytes
    return {
        "outs": outs,
        "width": width,
        "rows": rows,
        "dtype": str(dtype).removeprefix("torch."),
        "gb_s": {name: round(num_bytes / value / 1e9, 2) for name, value in seconds.items()},
        "gflop_s": round(2 * rows * outs * width / seconds["native"] / 1e9, 1),
        "of_read": round(seconds["read"] / seconds["native"], 3),
        "torch_over_native": round(seconds["torch"] / seconds["native"], 2),
    }


def main() -> None:
    args = parser(__doc__, rounds=7, cpu_time=True).parse_args()
    clock, threads = clock_and_threads(args)
    products = [
        measure(outs, width, rows, dtype, threads, args.rounds, clock)
        for dtype in DTYPES
        for outs, width in SHAPES
        for rows in ROWS
    ]
    multiplies = cpu_multiplies(torch.bfloat16)
    print_report(
        "cpu_linear", vars(args), {"products": products}, torch_multiplies_bfloat16=multiplies
    )


if __name__ == "__main__":
    main()

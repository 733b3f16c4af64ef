"""Products with quantised weights: by codes, and with the same weight in bfloat16.

"engine" is what a layer does, "codes" the kernel alone, "rounded" the same with inputs rounded to
bytes, where the processor multiplies those, "tiles" with the weight rounded to bfloat16, where it
has matrix tiles, "tiled" a tile of numbers at a time by PyTorch, "bfloat16" what a layer does with
numbers, "native bfloat16" its kernel alone.
Measured in turns, medians, microseconds a product; "speedup" is bfloat16 over engine, "gb_s" the
codes and scales read per second, "of_read" that as a share of what a plain loop reads. Each shape
has as many weights in turn as pass the last-level cache, as the layers of a model do. With
--cpu-time one thread's own time is counted instead of the wall's. Prints JSON.

    python benchmark/cpu/bench_quantized.py [--threads N] [--cpu-time] [--rounds 5]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench_attention import medians
from cpu_report import Clock, clock_and_threads, parser, print_report
from sgl_kernel import QuantizedWeight, has_byte_dots, has_tiles, read_sum
from sgl_kernel import linear as native_linear
from sglang.srt.layers.products import linear, tiled_linear
from sglang.srt.layers.quantization.matrix import QuantizedMatrix

SHAPES = ((960, 576), (3072, 576), (576, 1536), (49152, 576), (2048, 8192))
ROWS = (1, 2, 4, 8, 16, 32, 64, 512)
NATIVE = ("codes", "native bfloat16")  # not measured for more rows than 64
MXFP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice each
LAYOUTS = {
    "4 bits, min": (4, True, None),
    "4 bits, values": (4, False, MXFP4),
    "8 bits": (8, False, None),
    "FP8": (0, False, None),
}
FP8_GROUP = 128  # inputs of a scale
ALL_BYTES = 96 << 20  # of the codes in turn
GROUP = 32


def make(layout: str, outs: int, width: int) -> QuantizedWeight:
    bits, with_mins, values = LAYOUTS[layout]
    if layout == "FP8":
        numbers = (torch.randn(outs, width) * 40).to(torch.float8_e4m3fn)
        return QuantizedWeight(numbers, torch.rand(outs, -(-width // FP8_GROUP)), group=FP8_GROUP)
    dtype = torch.uint8 if bits == 4 else torch.int8
    codes = torch.randint(0, 100, (outs, width * bits // 8)).to(dtype)
    scales = torch.rand(outs, width // GROUP).half()
    mins = -scales if with_mins else None
    return QuantizedWeight(codes, scales, mins, gain=2.0**-10, values=values)


def left_out(layout: str, rows: int) -> set[str]:
    """The ways that so many rows don't go, or that this processor or these codes have not."""
    missing = {"tiled"} if rows < 32 else set(NATIVE) if rows > 64 else set()
    missing |= set() if has_byte_dots() and layout != "FP8" else {"rounded"}
    return missing | (set() if has_tiles() else {"tiles"})


def fill(weight: QuantizedWeight, threads: int, tile: torch.Tensor, first: int) -> None:
    """Write the outputs from `first` on into `tile`."""
    weight.rows(first, first + len(tile)).dequantize_into(tile, num_threads=threads)


def for_each(way: Callable[[int], object], count: int) -> None:
    for i in range(count):
        way(i)


def measure(
    layout: str, outs: int, width: int, threads: int, rounds: int, clock: Clock
) -> list[dict[str, Any]]:
    first = make(layout, outs, width)
    count = -(-ALL_BYTES // first.nbytes)
    weights = [first, *(make(layout, outs, width) for _ in range(count - 1))]
    matrices = [QuantizedMatrix([weight]) for weight in weights]
    wide = [torch.randn(outs, width).bfloat16() for _ in range(-(-count // 3))]
    found = []
    for rows in ROWS:
        x = torch.randn(rows, width).bfloat16()
        ways: dict[str, Callable[[int], object]] = {
            "engine": lambda i, x=x: matrices[i].product(x),
            "codes": lambda i, x=x: weights[i].multiply(x, num_threads=threads),
            "rounded": lambda i, x=x: weights[i].multiply(
                x, num_threads=threads, round_inputs=True
            ),
            "tiles": lambda i, x=x: weights[i].multiply(x, num_threads=threads, round_weight=True),
            "tiled": lambda i, x=x: tiled_linear(
                x, (outs, width), partial(fill, weights[i], threads), None, torch.bfloat16
            ),
            "bfloat16": lambda i, x=x: linear(x, wide[i % len(wide)]),
            "native bfloat16": lambda i, x=x: native_linear(
                x, wide[i % len(wide)], num_threads=threads
            ),
        }
        for name in left_out(layout, rows):
            del ways[name]
        if first.codes.nbytes % 64 == 0:
            ways["read"] = lambda i: read_sum(weights[i].codes.view(torch.uint8), threads)
        some = max(1, count // max(1, rows // 8))
        calls = {name: partial(for_each, way, some) for name, way in ways.items()}
        times = medians(calls, rounds, clock)
        us = {name: round(value / some * 1e6, 1) for name, value in times.items()}
        row: dict[str, Any] = {"layout": layout, "outs": outs, "width": width, "rows": rows}
        row["us"] = us
        row["speedup"] = round(us["bfloat16"] / us["engine"], 2)
        if "codes" in us:
            row["gb_s"] = round(first.nbytes / us["codes"] / 1e3, 2)
        if "codes" in us and "read" in us:
            share = us["read"] * first.nbytes / first.codes.nbytes / us["codes"]
            row["of_read"] = round(share, 3)
        if "rounded" in us and "codes" in us:
            row["codes_over_rounded"] = round(us["codes"] / us["rounded"], 2)
        if "tiled" in us and "rounded" in us:
            row["tiled_over_rounded"] = round(us["tiled"] / us["rounded"], 2)
        if "tiles" in us and "rounded" in us:
            row["rounded_over_tiles"] = round(us["rounded"] / us["tiles"], 2)
        if "tiles" in us and "tiled" in us:
            row["tiled_over_tiles"] = round(us["tiled"] / us["tiles"], 2)
        found.append(row)
    return found


def main() -> None:
    args = parser(__doc__, rounds=5, cpu_time=True).parse_args()
    clock, threads = clock_and_threads(args)
    products = []
    for layout in LAYOUTS:
        for outs, width in SHAPES:
            products += measure(layout, outs, width, threads, args.rounds, clock)
    print_report("cpu_quantized", vars(args), {"products": products})


if __name__ == "__main__":
    main()

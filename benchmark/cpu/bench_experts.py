"""A mixture's experts for a few rows: all in one native call, and one expert after the other.

Both compute the layer of sglang/srt/layers/moe.py over the same weights, in turns; figures are
medians. "gb_s" counts the weights of the experts that were chosen, once. The layer has as many
experts as pass the last-level cache. Prints JSON.

    python benchmark/cpu/bench_experts.py [--threads N] [--cpu-time] [--rounds 5]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench_attention import medians
from bench_quantized import make as make_weight
from cpu_report import Clock, clock_and_threads, parser, print_report
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers.expert_weights import ExpertLayout
from sglang.srt.layers.moe import Experts, Routing
from sglang.srt.utils.native import native_kernels

# (experts, chosen, hidden, width): Qwen3-30B-A3B's, and a quarter of gpt-oss-20b's experts.
SHAPES = ((128, 8, 2048, 768), (8, 4, 2880, 2880))
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


def make(shape: tuple[int, int, int, int], kind: str) -> Experts:
    """Random experts in bfloat16, rounded to bytes ("int8"), or in codes as MXFP4 has them."""
    experts, _, hidden, width = shape
    layer = Experts(
        experts,
        hidden,
        width,
        layout=ExpertLayout.STACKED if kind == "mxfp4" else ExpertLayout.MERGED,
        parallel=ParallelState(),
        dtype=torch.bfloat16,
    )
    if kind == "mxfp4":
        for part in ("gate", "up"):
            weight = make_weight("4 bits, values", experts * width, hidden)
            layer.weight_loader("gate_up_proj", weight, (None, part))
        weight = make_weight("4 bits, values", experts * hidden, width)
        layer.weight_loader("down_proj", weight, (None, "down"))
        return layer
    for parameter in layer.parameters():
        parameter.data.normal_(0.0, 0.02)
    kernels = native_kernels()
    if kind == "int8" and kernels is not None:
        layer.quantize(kernels)
    return layer


def bytes_read(layer: Experts, routing: Routing) -> int:
    matrices = (one.matrix for one in (layer.gate, layer.up, layer.down) if one)
    parts = {id(one): one.nbytes for one in matrices}
    whole = sum(parameter.nbytes for parameter in layer.parameters()) + sum(parts.values())
    return whole * len(routing.experts.unique()) // layer.num_experts


def measure(
    layer: Experts, shape: tuple[int, int, int, int], rows: int, rounds: int, clock: Clock
) -> dict[str, Any]:
    experts, chosen, hidden, _ = shape
    x = torch.randn(rows, hidden).bfloat16()
    order = torch.rand(rows, experts).argsort(1)[:, :chosen].contiguous()
    routing = Routing(order, torch.rand(rows, chosen))
    mixture = layer._native(native_kernels())

    def native() -> object:
        return layer._add_ranks(mixture, x, routing, None)

    def one_by_one() -> object:
        return layer._one_by_one(x, routing)

    calls: dict[str, Callable[[], object]] = {"native": native, "one_by_one": one_by_one}
    with torch.inference_mode():
        seconds = medians(calls, rounds, clock)
    return {
        "shape": shape,
        "rows": rows,
        "ms": {name: round(1e3 * value, 3) for name, value in seconds.items()},
        "gb_s": round(bytes_read(layer, routing) / seconds["native"] / 1e9, 2),
        "one_by_one_over_native": round(seconds["one_by_one"] / seconds["native"], 2),
    }


def main() -> None:
    args = parser(__doc__, rounds=5, cpu_time=True).parse_args()
    clock, _ = clock_and_threads(args)
    found = {}
    for kind in ("bfloat16", "int8", "mxfp4"):
        found[kind] = []
        for shape in SHAPES:
            layer = make(shape, kind)
            found[kind] += [measure(layer, shape, rows, args.rounds, clock) for rows in ROWS]
    print_report("cpu_experts", vars(args), found)


if __name__ == "__main__":
    main()

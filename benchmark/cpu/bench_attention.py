"""How near the native attention comes to the machine's ceilings, and how far from torch.

Decode is compared with reading the same bytes in a plain loop, extend with torch's matrix product
of the same type and its fused attention; all are measured in turns, figures are medians and ratios
of medians. With --cpu-time one thread's own time is counted instead of the wall's: other processes
then do not count, but only one thread can be measured. --isa lowers the kernels' instructions;
torch's are lowered by ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA and MKL_ENABLE_INSTRUCTIONS. Prints
JSON.

    python benchmark/cpu/bench_attention.py [--threads N] [--cpu-time] [--rounds 5] [--long]
        [--only extend] [--dtype float32] [--kv-dtype fp8_e4m3] [--isa AVX2]
"""

from __future__ import annotations

import mmap
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from cpu_report import parser, print_report
from sgl_kernel import AttentionTables, Isa, QueryBlocks, cpu_isa, paged_attention, read_sum

PAGE = 64
KV_DTYPES = {
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "int8": torch.int8,
}
HUGE_PAGE = 2 << 20  # bytes, or a multiple of what the system has
ROWS = 4096  # distinct random tokens; copied over the whole pool


class Shape(NamedTuple):
    """Requests of so many tokens, of which `new` are computed."""

    requests: int
    tokens: int
    new: int
    kv_heads: int
    group: int
    dim: int


DECODE = (
    Shape(16, 4096, 1, 3, 3, 64),
    Shape(16, 4096, 1, 8, 4, 128),
    Shape(1, 1 << 20, 1, 1, 1, 128),
    Shape(1, 1 << 20, 1, 3, 3, 64),
    Shape(1, 1 << 20, 1, 1, 4, 128),
)
LONG = Shape(1, 10_000_000, 1, 1, 4, 128)  # 5 GiB of K and V
EXTEND = (Shape(1, 2048, 2048, 3, 3, 64), Shape(1, 4096, 2048, 3, 3, 64),
          Shape(1, 2048, 2048, 8, 4, 128))  # fmt: skip


class Kind(NamedTuple):
    """What all shapes are measured in."""

    dtype: torch.dtype
    isa: Isa
    kv_dtype: torch.dtype


def huge_pages(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Elements in huge pages where the system has them, as the pool's segments lie."""
    room = mmap.mmap(-1, count * dtype.itemsize + 2 * HUGE_PAGE)
    room.madvise(mmap.MADV_HUGEPAGE)
    elements = torch.frombuffer(room, dtype=dtype)
    first = -elements.data_ptr() % HUGE_PAGE // dtype.itemsize
    return elements[first : first + count]


def packed(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x [*, D] in the type of a plane; of int8 [*, D + 4], the scale behind each head's bytes."""
    if dtype != torch.int8:
        return x.to(dtype)
    scale = x.abs().amax(-1, keepdim=True) / 127
    return torch.cat([(x / scale).round().to(torch.int8), scale.view(torch.int8)], -1)


class Problem:
    """Tensors of a shape, every request's pages in a row."""

    def __init__(self, shape: Shape, kind: Kind) -> None:
        self.shape, self.kind = shape, kind
        pages = -(-shape.tokens // PAGE)
        slots = (shape.requests * pages + 1) * PAGE
        self.k, self.v = (self._plane(slots) for _ in range(2))
        ids = [np.arange(i * pages, (i + 1) * pages, dtype=np.int32) for i in range(shape.requests)]
        self.tables = AttentionTables(ids, [0] * shape.requests, PAGE)
        each = np.arange(shape.requests)
        news = np.full(shape.requests, shape.new)
        self.blocks = QueryBlocks(each * shape.new, news, shape.tokens - news, each)
        heads = shape.kv_heads * shape.group
        self.q = torch.randn(shape.requests * shape.new, heads, shape.dim).to(kind.dtype)
        self.out = torch.empty_like(self.q)

    def _plane(self, slots: int) -> torch.Tensor:
        rows = torch.randn(ROWS, self.shape.kv_heads, self.shape.dim)
        rows = packed(rows, self.kind.kv_dtype)
        plane = huge_pages(slots * rows[0].numel(), rows.dtype).view(slots, *rows.shape[1:])
        for start in range(0, slots, ROWS):
            plane[start : start + ROWS] = rows[: min(ROWS, slots - start)]
        return plane

    def attend(self, threads: int) -> None:
        paged_attention(
            self.q, self.k, self.v, self.tables, self.blocks, out=self.out,
            scale=self.shape.dim**-0.5, num_threads=threads, isa=self.kind.isa,
        )  # fmt: skip

    def read(self, threads: int) -> None:
        read_sum(self.k, threads)
        read_sum(self.v, threads)


def medians(
    calls: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Seconds of each call, taken in turns after one round that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            began = clock()
            call()
            if turn:
                taken[name].append(clock() - began)
    return {name: statistics.median(values) for name, values in taken.items()}


def measure_decode(
    shape: Shape, kind: Kind, threads: int, rounds: int, clock: Callable[[], float]
) -> dict[str, Any]:
    problem = Problem(shape, kind)
    seconds = medians(
        {"read": lambda: problem.read(threads), "attend": lambda: problem.attend(threads)},
        rounds,
        clock,
    )
    num_bytes = shape.requests * shape.tokens * problem.k[0].nbytes * 2
    return {
        "shape": shape._asdict(),
        "read_gb_s": round(problem.k.nbytes * 2 / seconds["read"] / 1e9, 2),
        "attention_gb_s": round(num_bytes / seconds["attend"] / 1e9, 2),
        "of_read": round(
            num_bytes / (problem.k.nbytes * 2) * seconds["read"] / seconds["attend"], 3
        ),
        "goal": 0.8,
    }


def measure_extend(
    shape: Shape, kind: Kind, threads: int, rounds: int, clock: Callable[[], float]
) -> dict[str, Any]:
    problem = Problem(shape, kind)
    matrix = torch.randn(2048, 2048).to(kind.dtype)
    new, prefix = shape.new, shape.tokens - shape.new
    q = problem.q.transpose(0, 1)[None]
    # Numbers of q's own type, since torch attends over no bytes; their values change no time.
    heads = (1, shape.kv_heads * shape.group, new, shape.dim)
    own = [torch.randn(heads).to(kind.dtype) for _ in "kv"]
    seconds = medians(
        {
            "matmul": lambda: matrix @ matrix,
            "torch": lambda: torch.nn.functional.scaled_dot_product_attention(
                q, *own, is_causal=True
            ),
            "attend": lambda: problem.attend(threads),
        },
        rounds,
        clock,
    )
    flops = 4 * shape.dim * shape.kv_heads * shape.group
    own_pairs = new * (new + 1) / 2
    speed = flops * (own_pairs + new * prefix) / seconds["attend"] / 1e9
    ceiling = 2 * 2048**3 / seconds["matmul"] / 1e9
    return {
        "shape": shape._asdict(),
        "matmul_gflop_s": round(ceiling),
        "torch_own_chunk_gflop_s": round(flops * own_pairs / seconds["torch"] / 1e9),
        "attention_gflop_s": round(speed),
        "of_matmul": round(speed / ceiling, 3),
        "goal": 0.6,
    }


def main() -> None:
    flags = parser(__doc__, rounds=5)
    flags.add_argument("--cpu-time", action="store_true", help="count one thread's own time")
    flags.add_argument("--long", action="store_true", help="10M tokens too: 5 GiB of memory")
    flags.add_argument("--only", choices=("decode", "extend"), help="measure that alone")
    flags.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    flags.add_argument("--kv-dtype", choices=KV_DTYPES, help="of K and V; by default that of q")
    flags.add_argument("--isa", choices=[isa.name for isa in Isa], default=cpu_isa().name)
    args = flags.parse_args()
    threads = 1 if args.cpu_time else args.threads
    clock = time.thread_time if args.cpu_time else time.perf_counter
    torch.set_num_threads(threads)
    dtype = getattr(torch, args.dtype)
    kind = Kind(dtype, Isa[args.isa], KV_DTYPES.get(args.kv_dtype, dtype))
    settings = {"threads": threads, "rounds": args.rounds, "cpu_time": args.cpu_time,
                "dtype": args.dtype, "kv_dtype": args.kv_dtype or args.dtype,
                "isa": args.isa}  # fmt: skip
    parts = {}
    if args.only != "extend":
        shapes = (*DECODE, LONG) if args.long else DECODE
        parts["decode"] = [measure_decode(x, kind, threads, args.rounds, clock) for x in shapes]
    if args.only != "decode":
        parts["extend"] = [measure_extend(x, kind, threads, args.rounds, clock) for x in EXTEND]
    print_report("cpu_attention", settings, parts)


if __name__ == "__main__":
    main()

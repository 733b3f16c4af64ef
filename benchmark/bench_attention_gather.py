"""At which run length does reading scattered pages in place beat gathering them first?

Times one decode query over a table of equal slot runs, both ways in turns in one process, and
prints medians. `TorchNativeTuning.min_run_bytes` rests on the crossing point.

    PYTHONPATH=python python benchmark/bench_attention_gather.py [--tokens 8192] [--threads 2]
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch

from sglang.srt.layers.attention.torch_native_backend import (
    TorchNativeAttnBackend,
    TorchNativeTuning,
)
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.block_table import BlockTable
from sglang.srt.mem_cache.kv_layout import KVCacheSpec, KVGroupSpec
from sglang.srt.model_executor.forward_batch_info import (
    BatchGeometry,
    ForwardBatch,
    ForwardMode,
)
from sglang.srt.utils.progress import Progress

PAGE = 64
SHAPES = {"3 kv heads x 64": (3, 3, 64), "8 kv heads x 128": (8, 4, 128)}  # kv heads, group, width


class Pool:
    """K and V of one layer in bf16."""

    def __init__(self, slots: int, heads: int, width: int) -> None:
        self.k = torch.randn(slots, heads, width).bfloat16()
        self.v = torch.randn(slots, heads, width).bfloat16()

    def get_key_buffer(self, layer: int) -> torch.Tensor:
        del layer
        return self.k

    def get_value_buffer(self, layer: int) -> torch.Tensor:
        del layer
        return self.v


def make_batch(
    pool: Pool, backend: TorchNativeAttnBackend, tokens: int, run_pages: int
) -> ForwardBatch:
    pages = np.arange(1, 1 + tokens // PAGE, dtype=np.int32)
    chunks = [pages[i : i + run_pages] for i in range(0, len(pages), run_pages)]
    np.random.default_rng(0).shuffle(chunks)
    table = BlockTable(PAGE)
    table.extend(np.concatenate(chunks))
    geometry = BatchGeometry(
        seq_lens=np.array([tokens]),
        extend_prefix_lens=np.array([tokens - 1]),
        extend_seq_lens=np.array([1]),
        q_starts=np.array([0]),
        logits_rows=np.array([0]),
        block_tables=((table.snapshot(),),),
        page_size=PAGE,
    )
    one = torch.zeros(1, dtype=torch.int64)
    return ForwardBatch(
        forward_mode=ForwardMode.DECODE,
        input_ids=one,
        positions=one,
        geometry=geometry,
        out_cache_loc=(one,),
        logits_rows=one,
        token_to_kv_pool=pool,
        attn_backend=backend,
        attn_plan=backend.plan(geometry),
        progress=Progress(),
    )


def compare(tokens: int, run_pages: int, heads: int, group: int, width: int) -> tuple[float, float]:
    """Median microseconds of a layer, runs read in place and runs gathered."""
    spec = KVCacheSpec((KVGroupSpec((0,)),), heads, width, width, "bfloat16", PAGE)
    layer = RadixAttention(heads * group, width, width**-0.5, heads, 0)
    pool = Pool(tokens + 2 * PAGE, heads, width)
    q = torch.randn(1, heads * group, width).bfloat16()
    ways = []
    for min_run_bytes in (0, 1 << 40):
        backend = TorchNativeAttnBackend(spec, TorchNativeTuning(min_run_bytes=min_run_bytes))
        ways.append((backend, make_batch(pool, backend, tokens, run_pages)))
    times: list[list[float]] = [[], []]
    outs = [torch.empty(0), torch.empty(0)]
    for turn in range(43):
        for i, (backend, batch) in enumerate(ways):
            began = time.perf_counter()
            outs[i] = backend.forward(q, layer, batch, rows_pruned=False)
            if turn >= 3:
                times[i].append((time.perf_counter() - began) * 1e6)
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=2e-2)
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.tokens} tokens, bf16, page size {PAGE}, {args.threads} threads")
    header = ("shape", "run tokens", "run KiB of K", "in place us", "gathered us")
    print("{:>18} {:>11} {:>13} {:>12} {:>12}".format(*header))
    with torch.inference_mode():
        for name, (heads, group, width) in SHAPES.items():
            for run_pages in (1, 2, 4, 8, 16, 32):
                in_place, gathered = compare(args.tokens, run_pages, heads, group, width)
                run = run_pages * PAGE
                print(
                    f"{name:>18} {run:>11} {run * heads * width * 2 / 1024:>13.0f} "
                    f"{in_place:>12.0f} {gathered:>12.0f}"
                )


if __name__ == "__main__":
    main()

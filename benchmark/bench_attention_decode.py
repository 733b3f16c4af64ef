"""Does computing short decode queries together beat one kernel call each?

Times one layer's attention for a batch of decoding requests, both ways in turns in one process,
and prints medians. `TorchNativeTuning.batch_row_bytes` rests on which shapes gain.

    PYTHONPATH=python python benchmark/bench_attention_decode.py [--threads 2]
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import cast

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
CASES = ((4, 60), (32, 60), (32, 100), (32, 300), (32, 700), (16, 2000))  # requests, tokens each


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
    pool: Pool, backend: TorchNativeAttnBackend, requests: int, tokens: int
) -> ForwardBatch:
    """`requests` requests of `tokens` tokens, each contiguous, that decode one token."""
    pages = -(-tokens // PAGE)
    tables = []
    for request in range(requests):
        table = BlockTable(PAGE)
        first = 1 + request * (pages + 1)
        table.extend(np.arange(first, first + pages, dtype=np.int32))
        tables.append(table.snapshot())
    rows = np.arange(requests)
    geometry = BatchGeometry(
        seq_lens=np.full(requests, tokens),
        extend_prefix_lens=np.full(requests, tokens - 1),
        extend_seq_lens=np.ones(requests, np.int64),
        q_starts=rows,
        logits_rows=rows,
        block_tables=(tuple(tables),),
        page_size=PAGE,
    )
    zeros = torch.zeros(requests, dtype=torch.int64)
    return ForwardBatch(
        forward_mode=ForwardMode.DECODE,
        input_ids=zeros,
        positions=zeros,
        geometry=geometry,
        out_cache_loc=(zeros,),
        logits_rows=torch.from_numpy(rows),
        token_to_kv_pool=pool,
        attn_backend=backend,
        attn_plan=backend.plan(geometry),
        progress=Progress(),
    )


def compare(requests: int, tokens: int, heads: int, group: int, width: int) -> tuple[float, float]:
    """Median microseconds of a layer, a call each and together."""
    spec = KVCacheSpec((KVGroupSpec((0,)),), heads, width, width, "bfloat16", PAGE)
    layer = RadixAttention(heads * group, width, width**-0.5, heads, 0)
    pool = Pool(PAGE * (2 + requests * (2 + tokens // PAGE)), heads, width)
    q = torch.randn(requests, heads * group, width).bfloat16()
    ways = []
    for batch_row_bytes in (0, 1 << 20):
        backend = TorchNativeAttnBackend(spec, TorchNativeTuning(batch_row_bytes=batch_row_bytes))
        ways.append((backend, make_batch(pool, backend, requests, tokens)))
    times: list[list[float]] = [[], []]
    outs = [torch.empty(0), torch.empty(0)]
    for turn in range(33):
        for i, (backend, batch) in enumerate(ways):
            began = time.perf_counter()
            outs[i] = backend.forward(q, layer, batch, rows_pruned=False)
            if turn >= 3:
                times[i].append((time.perf_counter() - began) * 1e6)
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=2e-2)
    return cast(tuple[float, float], tuple(statistics.median(t) for t in times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"bf16, page size {PAGE}, {args.threads} threads")
    header = ("shape", "requests", "tokens", "each us", "together us")
    print("{:>18} {:>9} {:>7} {:>12} {:>12}".format(*header))
    with torch.inference_mode():
        for name, (heads, group, width) in SHAPES.items():
            for requests, tokens in CASES:
                each, together = compare(requests, tokens, heads, group, width)
                print(f"{name:>18} {requests:>9} {tokens:>7} {each:>12.0f} {together:>12.0f}")


if __name__ == "__main__":
    main()

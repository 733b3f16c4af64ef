"""One layer's latent attention over all tokens, and over those that are chosen.

Numbers of DeepSeek-V3.2: rows of 576, index keys of 128, 64 index heads, 2,048 tokens chosen. The
last `--queries` tokens of a request attend to all tokens (dense) and to chosen ones (sparse), in
turns in one process; choosing and attending are timed apart too. Prints JSON, times in
milliseconds, medians of the turns.

    PYTHONPATH=python python benchmark/cpu/bench_sparse.py [--threads 2] [--heads 128] [--queries 1]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.attention.registry import get_attention_backend
from sglang.srt.layers.attention.sparse_cpu_backend import SparseCpuBackend
from sglang.srt.layers.attention.token_choice import IndexQuery
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.block_table import BlockTable
from sglang.srt.mem_cache.index_planes import IndexPlanes
from sglang.srt.mem_cache.kv_layout import KVCacheSpec, KVGroupSpec
from sglang.srt.model_executor.forward_batch_info import BatchGeometry, ForwardBatch, ForwardMode
from sglang.srt.utils.progress import Progress

PAGE = 64
LATENT, ROTARY, INDEX, INDEX_HEADS, TOPK = 512, 64, 128, 64, 2048


class Pool:
    """Latents and index keys of one layer in bf16, as many as the longest context needs."""

    def __init__(self, slots: int) -> None:
        self.rows = torch.randn(slots, 1, LATENT + ROTARY).bfloat16()
        self.index_planes = IndexPlanes({0: torch.randn(slots, 1, INDEX).bfloat16()})

    def get_key_buffer(self, layer: int) -> torch.Tensor:
        del layer
        return self.rows

    def get_value_buffer(self, layer: int) -> torch.Tensor:
        del layer
        return self.rows[..., :LATENT]


def batch_of(pool: Pool, backend: AttentionBackend, tokens: int, queries: int) -> ForwardBatch:
    """A request of `tokens` tokens in runs of 16 pages, of which the last `queries` are new."""
    count = -(-tokens // PAGE)
    runs = np.arange(1, 1 + 16 * (-(-count // 16)), dtype=np.int32).reshape(-1, 16)
    table = BlockTable(PAGE)
    table.extend(np.random.default_rng(1).permutation(runs).reshape(-1)[:count])
    one = np.ones(1, np.int64)
    geometry = BatchGeometry(
        seq_lens=one * tokens,
        extend_prefix_lens=one * (tokens - queries),
        extend_seq_lens=one * queries,
        q_starts=one * 0,
        logits_rows=one * 0,
        block_tables=((table.snapshot(),),),
        page_size=PAGE,
    )
    zeros = torch.zeros(queries, dtype=torch.int64)
    return ForwardBatch(
        forward_mode=ForwardMode.MIXED,
        input_ids=zeros,
        positions=zeros,
        geometry=geometry,
        out_cache_loc=(zeros,),
        logits_rows=zeros[:1],
        token_to_kv_pool=pool,
        attn_backend=backend,
        attn_plan=backend.plan(geometry),
        progress=Progress(),
    )


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1e3


def measure(
    pool: Pool, backend: str | None, heads: int, tokens: int, queries: int, turns: int
) -> dict[str, Any]:
    kind = get_attention_backend(backend, "cpu")
    group = (KVGroupSpec((0,)),)
    spec = KVCacheSpec(group, 1, LATENT + ROTARY, LATENT, "bfloat16", PAGE, True, INDEX, (0,))
    dense, single = kind(spec), kind(replace(spec, page_size=1))
    sparse = SparseCpuBackend(dense, single, TOPK)  # type: ignore[arg-type]
    width = LATENT + ROTARY
    layer = RadixAttention(heads, width, 192**-0.5, 1, 0, v_head_dim=LATENT, values_in_keys=True)
    q = torch.randn(queries, heads * width).bfloat16()
    index_heads = torch.randn(queries, INDEX_HEADS, INDEX).bfloat16()
    query = IndexQuery(index_heads, torch.rand(queries, INDEX_HEADS))
    whole = batch_of(pool, dense, tokens, queries)
    times: dict[str, list[float]] = {"dense": [], "choose": [], "attend": []}
    for turn in range(turns + 2):
        chosen = batch_of(pool, sparse, tokens, queries)
        took = {
            "dense": timed(
                lambda: dense.forward(heads_of(q, layer), layer, whole, rows_pruned=False)
            ),
            "choose": timed(lambda b=chosen: choose(sparse, query, layer, b)),
            "attend": timed(
                lambda b=chosen: sparse.forward(heads_of(q, layer), layer, b, rows_pruned=False)
            ),
        }
        if turn >= 2:
            for name, value in took.items():
                times[name].append(value)
    medians = {name: statistics.median(values) for name, values in times.items()}
    medians["sparse"] = statistics.median(
        map(sum, zip(times["choose"], times["attend"], strict=True))
    )
    return {
        "backend": kind.name,
        "tokens": tokens,
        **{f"{name}_ms": round(value, 3) for name, value in medians.items()},
        "ratio": round(medians["sparse"] / medians["dense"], 3),
    }


def heads_of(q: torch.Tensor, layer: RadixAttention) -> torch.Tensor:
    return q.view(-1, layer.num_heads, layer.head_dim)


def choose(
    backend: SparseCpuBackend, query: IndexQuery, layer: RadixAttention, batch: ForwardBatch
) -> None:
    if backend.chooses(batch, rows_pruned=False):
        backend.choose(query, layer, batch, rows_pruned=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--heads", type=int, default=128, help="query heads of this rank")
    parser.add_argument("--queries", type=int, default=1, help="new tokens of the request")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--backend", help="cpu or torch_native; the default is the server's")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 16384, 65536, 131072])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pool = Pool((2 + 16 * (2 + max(args.tokens) // PAGE // 16)) * PAGE)
    with torch.inference_mode():
        found = [
            measure(pool, args.backend, args.heads, tokens, args.queries, args.turns)
            for tokens in args.tokens
        ]
    print(
        json.dumps(
            {
                "heads": args.heads,
                "threads": args.threads,
                "queries": args.queries,
                "layers": found,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()

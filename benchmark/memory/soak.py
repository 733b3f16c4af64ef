"""Minutes of random requests, aborts, refused maps and budget changes: what is left over?

    PYTHONPATH=python python benchmark/memory/soak.py --minutes 10

Real schedulers over real mmap memory, turn by turn, with a worker whose model is a checksum of
what it reads back through the block tables: a page lost, shared wrongly or reused too early
changes an answer. After every epoch: each request has exactly one final answer with the right
tokens, every page has one owner, and after the idle times the mapped bytes are the reserve again.
Prints one JSON object; exits 1 at the first thing that is wrong.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench_common import MIB, describe_machine, resident_bytes

sys.path.insert(0, str(Path(__file__).parents[2] / "test"))

from sglang.srt.mem_cache.allocation import KVMemory
from sglang.srt.mem_cache.kv_layout import KVCacheSpec, KVGroupSpec
from sglang.srt.mem_cache.segment_backing import make_backing
from srt.managers.scheduler_harness import (
    FlakyBacking,
    Harness,
    expected_output,
)

PAGE = 16
SEGMENT_TOKENS = 1024
SEGMENTS = 12
IDLE_S, PREFIX_IDLE_S = 30.0, 300.0
MAX_GROWTH_BYTES = 64 * MIB


class SoakError(Exception):
    """Something was wrong; the message says what."""


class Pool:
    """One scheduler with memory of its own, through many epochs."""

    def __init__(self, groups: int, reserve: int, overlap: bool, rng: random.Random) -> None:
        layers = ((0, 1),) if groups == 1 else ((0,), (1,))
        specs = tuple(KVGroupSpec(layers=some) for some in layers)
        spec = KVCacheSpec(specs, 1, 1, 1, "float32", PAGE)
        self.rng = rng
        self.reserve = reserve
        self.is_stormy = False
        backing = FlakyBacking(
            make_backing("mmap"), lambda _number: self.is_stormy and rng.random() < 0.3
        )
        self.memory = KVMemory.create(
            spec,
            backing,
            budget_bytes=SEGMENTS * SEGMENT_TOKENS * spec.bytes_per_token,
            machine_bytes=2 * SEGMENTS * SEGMENT_TOKENS * spec.bytes_per_token,
            max_requests=64,
            slots_per_segment=SEGMENT_TOKENS,
            reserve_segments=reserve,
            idle_release_s=IDLE_S,
            prefix_idle_s=PREFIX_IDLE_S,
        )
        self.harness = Harness(
            self.memory, page_size=PAGE, overlap=overlap, context_length=SEGMENT_TOKENS * 4
        )
        self.budget = self.memory.manager.budget_bytes
        self.idle_bytes = self.memory.manager.mapped_bytes
        self.most_mapped = 0
        self.ends: Counter[str] = Counter()
        self.num_requests = 0

    def run_epoch(self, number: int, requests: int) -> None:
        """Requests come, some are aborted, all end; then time passes and memory goes."""
        sent = self._traffic(number, requests)
        self._finish()
        self._check_answers(sent)
        self.harness.scheduler.drain()
        self.memory.audit()
        self._pass_idle_time()
        # what the stand-in channel and worker remember is theirs, not the engine's
        self.harness.channel.outs.clear()
        self.harness.channel.replies.clear()
        self.harness.worker.steps.clear()

    def _traffic(self, number: int, requests: int) -> dict[str, tuple[list[int], int]]:
        rng = self.rng
        shared = np.random.default_rng(number).integers(0, 900, 600).tolist()
        sent: dict[str, tuple[list[int], int]] = {}
        for i in range(requests):
            rid = f"e{number}-{i}"
            own = np.random.default_rng(rng.randrange(1 << 30)).integers(0, 900, 300).tolist()
            prompt = shared[: rng.randrange(0, 600)] + own[: rng.randrange(1, 300)]
            sent[rid] = (prompt, rng.choice((0, 1, 5, 20, 60, rng.randrange(0, 150))))
            self.harness.send(rid, *sent[rid])
            if rng.random() < 0.2:
                self.harness.abort(f"e{number}-{rng.randrange(i + 1)}")
            if rng.random() < 0.02:
                self.is_stormy = not self.is_stormy
            if rng.random() < 0.02:
                self.memory.manager.set_budget(rng.choice((self.budget // 2, self.budget)))
            if rng.random() < 0.7:
                self.harness.turn(rng.randrange(1, 6))
                self.harness.now += rng.choice((0.0, 0.1, 1.0, 5.0))
            self.most_mapped = max(self.most_mapped, self.memory.manager.mapped_bytes)
        return sent

    def _finish(self) -> None:
        for _ in range(200_000):
            if not self.harness.scheduler.busy:
                return
            self.harness.turn()
            self.harness.now += 0.05
        raise SoakError(f"still busy: {self.harness.scheduler.requests()}")

    def _check_answers(self, sent: dict[str, tuple[list[int], int]]) -> None:
        news: dict[str, list[Any]] = {rid: [] for rid in sent}
        for out in self.harness.channel.outs:
            news[out.rid].append(out)
        for rid, (prompt, count) in sent.items():
            ends = [out.finish_reason for out in news[rid] if out.finish_reason is not None]
            if len(ends) != 1 or news[rid][-1].finish_reason is None:
                raise SoakError(f"{rid} has {len(ends)} final answers")
            tokens = [
                token
                for out in news[rid]
                for token in np.frombuffer(out.output_ids, "<i4").tolist()
            ]
            if tokens != expected_output(prompt, len(tokens)):
                raise SoakError(f"{rid} has wrong tokens")
            kind = ends[0].type
            if kind != "abort" and len(tokens) != count:
                raise SoakError(f"{rid} ended by {kind} after {len(tokens)} of {count} tokens")
            self.ends[f"{kind} {ends[0].status_code}" if kind == "abort" else kind] += 1
        self.num_requests += len(sent)

    def _pass_idle_time(self) -> None:
        self.is_stormy = False
        manager = self.memory.manager
        manager.set_budget(self.budget)
        for _ in range(40):
            self.harness.now += PREFIX_IDLE_S / 8
            self.harness.turn()
            self.harness.settle()
        resident = manager.backing.resident_bytes()
        if manager.mapped_bytes != self.idle_bytes:
            raise SoakError(f"idle, but {manager.mapped_bytes} bytes mapped, not {self.idle_bytes}")
        if resident != manager.mapped_bytes + manager.fixed_bytes:
            raise SoakError(f"idle, but the system counts {resident} bytes")
        state = self.memory.memory_object()
        if self.memory.leases or state["pages"]["used"] or state["pages"]["cached"]:
            raise SoakError(f"idle, but not empty: {self.memory!r}")


def soak(seconds: float, requests: int, seed: int) -> dict[str, Any]:
    """Epochs over four pools in turns until the time is up. Raises SoakError, InvariantError."""
    rng = random.Random(seed)
    kinds = [(1, 0, True), (2, 0, True), (1, 1, False), (2, 1, False)]
    pools = [Pool(*kind, random.Random(rng.random())) for kind in kinds]
    machine = describe_machine()  # before the run: the commit is that of the code it loads
    began = time.monotonic()
    epochs, after_first = 0, 0
    while epochs < len(pools) or time.monotonic() - began < seconds:
        pools[epochs % len(pools)].run_epoch(epochs, requests)
        epochs += 1
        if epochs == 2 * len(pools):
            gc.collect()
            after_first = resident_bytes()
    gc.collect()
    growth = resident_bytes() - after_first if after_first else 0
    if growth > MAX_GROWTH_BYTES:
        raise SoakError(f"the process grew by {growth:,} bytes")
    ends = sum((pool.ends for pool in pools), Counter())
    stats = [one for pool in pools for one in pool.memory.manager.stats()]
    told = {
        "seconds": round(time.monotonic() - began, 1),
        "seed": seed,
        "epochs": epochs,
        "requests": sum(pool.num_requests for pool in pools),
        "ends": dict(sorted(ends.items())),
        "retractions": sum(pool.harness.scheduler.counters.num_retractions for pool in pools),
        "maps": sum(one.map_count for one in stats),
        "refused_maps": sum(one.refused_count for one in stats),
        "unmaps": sum(one.unmap_count for one in stats),
        "most_mapped_bytes": [pool.most_mapped for pool in pools],
        "idle_bytes": [pool.memory.manager.mapped_bytes for pool in pools],
        "process_growth_bytes": growth,
        "machine": machine,
    }
    for pool in pools:
        pool.memory.close_pool()
    return told


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("--minutes", type=float, default=10.0)
    args.add_argument("--requests", type=int, default=200, help="of one epoch")
    args.add_argument("--seed", type=int, default=1)
    settings = args.parse_args(argv)
    torch.set_num_threads(1)
    told = soak(settings.minutes * 60, settings.requests, settings.seed)
    print(json.dumps(told, indent=2))
    return told


if __name__ == "__main__":
    try:
        main()
    except SoakError as error:
        sys.exit(f"soak: {error}")

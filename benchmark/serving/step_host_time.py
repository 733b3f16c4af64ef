"""The host's time for a decode step at a short and at a long context.

    PYTHONPATH=python:benchmark/memory python benchmark/serving/step_host_time.py

Two schedulers with real memory (2 bytes per token) take steps in turns; the worker answers at once
and computes nothing, so a step is all that the host does besides the model: deciding, pages, the
forward batch, results, messages. The attention backend's own plans belong to the model's side and
are not in it. Prints JSON; the time is the thread's own, so other processes hardly count.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np

from bench_common import cpu_seconds_of, describe_machine, in_turns, make_memory, medians
from bench_growth import MemoryChannel
from sglang.srt.managers.generation_result import GenerationBatchResult
from sglang.srt.managers.io_struct import TokenizedGenerateReqInput, int32_buffer
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_limits import SchedulerLimits
from sglang.srt.mem_cache.allocation import KVPlacement
from sglang.srt.mem_cache.capacity import request_page_bounds
from sglang.srt.model_executor.forward_batch_info import BatchGeometry, ForwardBatch
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils.progress import Progress

PAGE = 64
SEGMENT_TOKENS = 65_536
CHUNK = 65_536
GOAL_RATIO = 1.1


class IdleWorker:
    """Answers every step with token 7 at once."""

    def submit(
        self, forward_batch: ForwardBatch, info: SamplingBatchInfo
    ) -> Future[GenerationBatchResult]:
        count = sum(index >= 0 for index in info.sample_index)
        size = forward_batch.batch_size
        future: Future[GenerationBatchResult] = Future()
        ids = np.full(count, 7, np.int64)
        future.set_result(GenerationBatchResult(ids, [None] * count, [None] * size, 1e-3))
        return future


class NoPlan:
    """Stands in for an attention backend."""

    def plan(self, geometry: BatchGeometry) -> int:
        return len(geometry.seq_lens)


class Side:
    """A scheduler whose requests have `context` tokens in all computed and decode."""

    def __init__(self, context: int, batch: int, steps: int) -> None:
        self.memory = make_memory(
            "mmap",
            tokens=context + (batch + 4) * SEGMENT_TOKENS,
            page_size=PAGE,
            slots_per_segment=SEGMENT_TOKENS,
            prefill_chunk=CHUNK,
            idle_release_s=1e9,
            prefix_idle_s=1e9,
            max_cached_tokens=None,
        )
        self.now = 0.0
        self.channel = MemoryChannel()
        progress = Progress()

        def make_batch(step: ScheduleBatch, placement: KVPlacement) -> ForwardBatch:
            return ForwardBatch.from_schedule_batch(
                step,
                placement,
                pool=self.memory.kv_pool,
                backend=NoPlan(),
                page_size=PAGE,
                progress=progress,
            )

        limits = SchedulerLimits(
            page_size=PAGE,
            context_length=context + SEGMENT_TOKENS,
            context_length_requested=context + SEGMENT_TOKENS,
            max_running_requests=batch,
            chunk_tokens=CHUNK,
            adaptive_chunk=False,
            policy="fcfs",
            stream_interval=1,
            overlap=False,
            window_pages=request_page_bounds(self.memory.spec, CHUNK),
            random_seed=1,
        )
        self.scheduler = Scheduler(
            memory=self.memory,
            worker=IdleWorker(),
            make_batch=make_batch,
            channel=self.channel,
            limits=limits,
            progress=progress,
            clock=self.clock,
        )
        for number in range(batch):
            # Whole pages, so that both sides take new pages in the same steps.
            ids = (np.arange(context // batch // PAGE * PAGE, dtype=np.int32) + number) % 30_000
            params = SamplingParams(max_new_tokens=4 * steps + 64, ignore_eos=True)
            self.channel.inbox.append(
                TokenizedGenerateReqInput(f"r{number}", memoryview(int32_buffer(ids)), params, True)
            )
        self.scheduler.turn()
        while any(req.num_output < 8 for req in self.scheduler.requests()):
            self.scheduler.turn()

    def clock(self) -> float:
        self.now += 1e-4
        return self.now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", default="1000,10000000", help="tokens of all requests")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2000)
    settings = parser.parse_args()
    contexts = [int(text) for text in settings.contexts.split(",")]
    sides = {str(one): Side(one, settings.batch, settings.steps) for one in contexts}

    def step_of(side: Side) -> Callable[[], float]:
        return lambda: cpu_seconds_of(side.scheduler.turn)

    found = in_turns(settings.steps, {name: step_of(side) for name, side in sides.items()})
    for name, side in sides.items():
        if side.scheduler.num_running != settings.batch:
            raise SystemExit(f"a request of the side {name} ended too early")
    typical = medians(found)
    base = typical[str(contexts[0])]
    results = [
        {
            "context": int(name),
            "step_us_median": round(1e6 * value, 1),
            "step_us_mean": round(1e6 * sum(found[name]) / len(found[name]), 1),
            "ratio": round(value / base, 3),
            "met": value / base <= GOAL_RATIO,
        }
        for name, value in typical.items()
    ]
    report = {
        "benchmark": "host time of a decode step",
        "settings": vars(settings),
        "machine": describe_machine(),
        "goal_ratio": GOAL_RATIO,
        "results": results,
    }
    print(json.dumps(report, indent=2))
    for side in sides.values():
        side.memory.close_pool()


if __name__ == "__main__":
    main()

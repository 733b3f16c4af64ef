"""The host's work of a decode step, counted, not timed: it does not follow the context.

The worker computes nothing here, so a context of ten million tokens is pages and numbers only.
"""

from __future__ import annotations

import sys
import tracemalloc
from concurrent.futures import Future
from types import FrameType

import numpy as np

from sglang.srt.managers.generation_result import GenerationBatchResult
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from srt.managers.scheduler_harness import Harness, make_memory
from srt.mem_cache.fake_backing import FakeBacking

PAGE = 64
PAGES_PER_SEGMENT = 1024
CHUNK = 1 << 16
SHORT_CONTEXT, LONG_CONTEXT = 1_000, 10_000_000
STEPS = 48  # less than a page: both contexts take as many new pages, none or one


class IdleWorker:
    """Answers every step with token 7 at once and touches no memory of the pool."""

    def submit(
        self, forward_batch: ForwardBatch, info: SamplingBatchInfo
    ) -> Future[GenerationBatchResult]:
        count = sum(index >= 0 for index in info.sample_index)
        future: Future[GenerationBatchResult] = Future()
        future.set_result(
            GenerationBatchResult(
                np.full(count, 7, np.int64), [None] * count, [None] * forward_batch.batch_size, 1e-3
            )
        )
        return future


def decoding(context: int) -> Harness:
    """A scheduler whose one request has `context` tokens computed and decodes."""
    memory = make_memory(
        page_size=PAGE,
        pages_per_segment=PAGES_PER_SEGMENT,
        segments=LONG_CONTEXT // (PAGE * PAGES_PER_SEGMENT) + 4,
        chunk_tokens=CHUNK,
        backing=FakeBacking(),
    )
    harness = Harness(
        memory,
        page_size=PAGE,
        chunk_tokens=CHUNK,
        context_length=LONG_CONTEXT + 4096,
        context_length_requested=LONG_CONTEXT + 4096,
    )
    harness.scheduler._worker = IdleWorker()
    # The same place in a page for both, so that both cross into a new one as often.
    prompt = np.arange(context // PAGE * PAGE, dtype=np.int32) % 90
    harness.send("r", prompt, 10_000)
    for _ in range(10_000):
        harness.turn()
        if len(harness.output("r")) > 2 * PAGE:
            return harness
    raise AssertionError("the prompt was never computed")


def calls_of(harness: Harness) -> int:
    """Python and C functions called in `STEPS` steps."""
    count = 0

    def note(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        harness.turn(STEPS)
    finally:
        sys.setprofile(None)
    return count


def peak_bytes_of(harness: Harness) -> int:
    """Most bytes allocated at a time in `STEPS` steps beyond those at their start."""
    tracemalloc.start()
    try:
        harness.turn(STEPS)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_decode_step_costs_the_same_at_any_context() -> None:
    short, long = decoding(SHORT_CONTEXT), decoding(LONG_CONTEXT)
    before = [len(harness.output("r")) for harness in (short, long)]
    few, many = calls_of(short), calls_of(long)
    for harness, told in zip((short, long), before, strict=True):
        assert len(harness.output("r")) == told + STEPS
    assert few > 10 * STEPS
    assert many <= 1.1 * few, f"{many} calls at 10M tokens, {few} at 1k"
    small, large = peak_bytes_of(short), peak_bytes_of(long)
    # One int32 a page of 10M tokens would be 625 kB.
    assert large <= small + 64_000, f"{large} bytes at 10M tokens, {small} at 1k"

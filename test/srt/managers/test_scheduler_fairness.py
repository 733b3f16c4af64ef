"""One huge prefill and everyone else: how long they wait, by a clock that forwards move."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from sglang.srt.managers.generation_result import GenerationBatchResult
from sglang.srt.managers.scheduler import ALONE_STEP_TARGET_S, STEP_TARGET_S
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from srt.managers.scheduler_harness import Harness, expected_output, make_memory

CHUNK = 2048
HUGE = [i % 90 for i in range(200_000)]
SHORT = [7, 8, 9] * 20
TOKEN_S = 1e-4
ATTENTION_S = 5e-9  # a token's, for each token of its context: at the end a chunk takes 2.2 s


class TimedHarness(Harness):
    """A step lasts what its tokens and their contexts cost, and nothing else takes time."""

    def __init__(self, *, adaptive: bool = True) -> None:
        memory = make_memory(page_size=16, segments=256, chunk_tokens=CHUNK)
        super().__init__(memory, page_size=16, chunk_tokens=CHUNK, adaptive_chunk=adaptive)
        self.step_s: list[float] = []
        self._compute = self.worker._forward
        self.worker._forward = self._timed  # type: ignore[method-assign]

    def _timed(self, batch: ForwardBatch, info: SamplingBatchInfo) -> GenerationBatchResult:
        counts = batch.geometry.extend_seq_lens.tolist()
        lens = batch.geometry.seq_lens.tolist()
        pairs = zip(counts, lens, strict=True)
        seconds = sum(count * (TOKEN_S + ATTENTION_S * seq_len) for count, seq_len in pairs)
        self.now += seconds
        self.step_s.append(seconds)
        return dataclasses.replace(self._compute(batch, info), forward_s=seconds)

    def turn(self, count: int = 1) -> None:
        for _ in range(count):
            self.scheduler.turn()

    def prefill_until(self, num_tokens: int) -> None:
        """Turn until this much of the huge prompt is scheduled."""
        self.turn()
        while self.scheduler.requests()[0].num_scheduled < num_tokens:
            self.turn()

    def token_times(self, rid: str, count: int) -> list[float]:
        """When the first `count` tokens of a request came."""
        times: list[float] = []
        while len(times) < count:
            self.turn()
            times.extend([self.now] * (len(self.output(rid)) - len(times)))
        return times


@pytest.mark.parametrize("done", [20_000, 100_000, 190_000])
def test_a_short_request_waits_for_the_steps_under_way_only(done: int) -> None:
    harness = TimedHarness()
    harness.send("huge", HUGE, 2)
    harness.prefill_until(done)
    began = harness.now
    harness.send("short", SHORT, 8)
    times = harness.token_times("short", 8)
    # Two steps of the huge prompt may be under way (overlap), then its own.
    assert times[0] - began < 1.1 * (2 * ALONE_STEP_TARGET_S + STEP_TARGET_S)
    gaps = [late - early for early, late in itertools.pairwise(times)]
    assert max(gaps) < 1.1 * STEP_TARGET_S + ALONE_STEP_TARGET_S
    assert max(gaps[2:]) < 1.1 * STEP_TARGET_S
    huge = harness.scheduler.requests()[0]
    assert huge.rid == "huge"
    assert huge.num_scheduled > done
    assert harness.output("short") == expected_output(SHORT, 8)


def test_a_huge_prefill_alone_is_cut_by_time_and_goes_on_beside_others() -> None:
    harness = TimedHarness()
    harness.send("huge", HUGE, 2)
    harness.prefill_until(150_000)
    alone = harness.step_s[1:]
    assert max(alone) < 1.1 * ALONE_STEP_TARGET_S
    assert alone[-1] > 0.8 * ALONE_STEP_TARGET_S  # and no shorter than they need to be
    for number in range(5):
        harness.send(f"short{number}", SHORT, 4)
    harness.run()
    for number in range(5):
        assert harness.output(f"short{number}") == expected_output(SHORT, 4)
    assert harness.output("huge") == expected_output(HUGE, 2)


def test_an_explicit_chunk_size_is_kept() -> None:
    harness = TimedHarness(adaptive=False)
    harness.send("huge", HUGE, 1)
    harness.run()
    assert harness.worker.steps[:-1] == [(CHUNK,)] * (len(HUGE) // CHUNK)
    assert max(harness.step_s) > 2 * ALONE_STEP_TARGET_S

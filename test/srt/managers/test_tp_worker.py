"""When the worker hands over what it computed, and what happens to results when a step fails."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from typing import Any

import numpy as np
import pytest
import torch

from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.layers.sampler import Sampler
from sglang.srt.managers.tp_worker import TpModelWorker
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.sampling.sampling_batch_info import RowAdmission, SamplingBatchInfo
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils.progress import Progress

GRACE_S = 30.0


class SlowRunner:
    """Answers token 3 for the first step, 4 for the second; computes when `go` lets it."""

    def __init__(self) -> None:
        self.begun = [threading.Event() for _ in range(3)]
        self.go = [threading.Event() for _ in range(3)]
        self.inputs: list[list[int]] = []
        self.fails = False

    def forward(
        self, batch: ForwardBatch, specs: Any, rows: Any, before: Callable[[], None]
    ) -> LogitsProcessorOutput:
        del specs, rows
        number = len(self.inputs)
        self.inputs.append(batch.input_ids.tolist())
        if self.fails and number:
            raise RuntimeError("broken")
        before()
        self.begun[number].set()
        assert self.go[number].wait(GRACE_S)
        logits = torch.zeros(1, 8)
        logits[0, 3 + number] = 1.0
        return LogitsProcessorOutput(logits, [None])


def step(*, first: bool) -> tuple[ForwardBatch, SamplingBatchInfo]:
    """A decode of KV row 2, whose token comes from the step before unless it is the first."""
    empty = np.empty(0, np.int32)
    batch = ForwardBatch(
        forward_mode=ForwardMode.DECODE,
        input_ids=torch.zeros(1, dtype=torch.int64),
        positions=torch.zeros(1, dtype=torch.int64),
        geometry=None,  # type: ignore[arg-type]  # nobody reads it here
        out_cache_loc=(),
        logits_rows=torch.zeros(1, dtype=torch.int64),
        token_to_kv_pool=None,
        attn_backend=None,
        attn_plan=None,
        progress=Progress(),
        relay_at=np.array([] if first else [0], np.int64),
        relay_rows=np.array([] if first else [2], np.int64),
    )
    admission = RowAdmission(2, SamplingParams(temperature=0.0), 0, empty, empty)
    info = SamplingBatchInfo(
        admissions=(admission,) if first else (),
        drops=(),
        sample_index=(0,),
        logit_index=(0,),
        sample_counts=(1,),
        expected=(-1,),
        rows=(2,),
        positions=(1,),
        suppress_stop=(False,),
        logprob_specs=(None,),
    )
    return batch, info


@pytest.fixture
def runner() -> SlowRunner:
    return SlowRunner()


@pytest.fixture
def worker(runner: SlowRunner) -> Iterator[TpModelWorker]:
    made = TpModelWorker(runner, Sampler(), 4)  # type: ignore[arg-type]
    yield made
    for event in runner.go:
        event.set()
    made.close()


def test_a_lone_result_is_told_at_once(worker: TpModelWorker, runner: SlowRunner) -> None:
    runner.go[0].set()
    assert worker.submit(*step(first=True)).result(GRACE_S).token_ids.tolist() == [3]


def test_a_result_is_told_when_the_next_step_computes(
    worker: TpModelWorker, runner: SlowRunner
) -> None:
    first = worker.submit(*step(first=True))
    second = worker.submit(*step(first=False))
    assert runner.begun[0].wait(GRACE_S)
    runner.go[0].set()
    assert runner.begun[1].wait(GRACE_S)  # and it computes as long as nobody lets it end
    assert first.done()
    assert not second.done()
    assert first.result().token_ids.tolist() == [3]
    assert runner.inputs == [[0], [3]]  # the token went from step to step by the relay
    runner.go[1].set()
    assert second.result(GRACE_S).token_ids.tolist() == [4]


def test_a_step_that_fails_takes_no_other_with_it(
    worker: TpModelWorker, runner: SlowRunner
) -> None:
    runner.fails = True
    first = worker.submit(*step(first=True))
    second = worker.submit(*step(first=False))
    runner.go[0].set()
    assert first.result(GRACE_S).token_ids.tolist() == [3]
    with pytest.raises(RuntimeError, match="broken"):
        second.result(GRACE_S)


def test_closing_tells_what_was_computed(worker: TpModelWorker, runner: SlowRunner) -> None:
    """The second step is cancelled before it begins; the first one's result is not lost."""
    first = worker.submit(*step(first=True))
    second = worker.submit(*step(first=False))
    assert runner.begun[0].wait(GRACE_S)
    closing = threading.Thread(target=worker.close)
    closing.start()
    with pytest.raises(CancelledError):
        second.result(GRACE_S)
    runner.go[0].set()
    closing.join(GRACE_S)
    assert first.result(GRACE_S).token_ids.tolist() == [3]

"""One rank's worker: a thread that computes batches in order and never touches a request.

The scheduler submits a batch and collects its result one step later (overlap) or at once. The
thread is the only one that runs the model and the sampler, so batches see each other's effects
exactly in order: a token sampled by one is read by the next from the relay, before the host has
seen it.

On a host a result is told when the next step is about to compute, if one is queued: the scheduler
then goes on while native code runs, and the two do not wait for each other's interpreter lock
where nothing is computed.

On a device that runs behind the host the thread only launches: inputs go there in one transfer,
the relay and the sampled tokens stay there, and a second thread waits for each step's tokens on
their way back, so that the next step is launched meanwhile. See docs/gpu.md, Device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from sglang.srt.constrained.grammar import TokenMatcher
from sglang.srt.layers.draft_sampling import Places, PlaceSampler, sample_places
from sglang.srt.layers.late_results import LatePrompts, LateResults, StepTold
from sglang.srt.managers.generation_result import GenerationBatchResult
from sglang.srt.managers.io_struct import LogprobArrays
from sglang.srt.managers.token_relay import DeviceRelay, HostRelay, TokenRelay
from sglang.srt.model_executor.draft_model import Drafter
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.model_runner import CausalLM, ModelRunner
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils.device import CpuRuntime, DeviceRuntime, HostCopy
from sglang.srt.utils.progress import Progress


class TokenSampler(PlaceSampler, Protocol):
    """`Sampler` and `DeviceSampler`; see there."""

    def admit(
        self,
        row: int,
        params: SamplingParams,
        seed: int,
        prompt_ids: npt.NDArray[np.integer],
        output_ids: npt.NDArray[np.integer],
        matcher: TokenMatcher | None = None,
    ) -> None: ...

    def drop(self, row: int) -> None: ...


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step under way. `told` are the tokens [B], or what `late` reads them and more from.

    `prompts` are log probabilities of prompts and the copy that they are read from; None: all of
    them are in `input_logprobs`.
    """

    began: float
    told: HostCopy
    late: LateResults | None
    prompts: tuple[LatePrompts, HostCopy] | None
    output_logprobs: Sequence[LogprobArrays | None]
    input_logprobs: Sequence[LogprobArrays | None]
    invalid_rows: tuple[int, ...]
    failures: Mapping[int, str]
    progress: Progress
    drafted: _Drafted | None


class _Drafted(NamedTuple):
    """The tokens that a draft model said, on their way, and when the last one was known or, on a
    device, launched."""

    tokens: HostCopy
    ended: float


class TpModelWorker:
    """Computes batches in the order of submission on one thread.

    `sampler` must be the kind that `runtime` needs: `Sampler` for the host, else `DeviceSampler`.
    `runtime` None: the host. `drafter` None: no model drafts.
    """

    def __init__(
        self,
        runner: ModelRunner,
        sampler: TokenSampler,
        num_rows: int,
        runtime: DeviceRuntime | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        self._runner = runner
        self._drafter = drafter
        self._sampler = sampler
        self._runtime: DeviceRuntime = runtime or CpuRuntime()
        self._relay: TokenRelay = HostRelay(num_rows)
        if self._runtime.is_async:
            self._relay = DeviceRelay(self._runtime, num_rows)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="forward")
        self._waiter: ThreadPoolExecutor | None = None
        if self._runtime.is_async:
            self._waiter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="results")
        self._last_end = 0.0
        # Steps on the host: submitted (by the scheduler), begun, and the result that is not told.
        self._num_submitted = 0
        self._num_begun = 0
        self._untold: tuple[Future[GenerationBatchResult], GenerationBatchResult] | None = None

    @property
    def model(self) -> CausalLM:
        """The loaded model; only this worker's thread may call it while batches are queued."""
        return self._runner.model

    @property
    def runner(self) -> ModelRunner:
        """What computes; the same holds for it as for the model."""
        return self._runner

    def submit(
        self, forward_batch: ForwardBatch, info: SamplingBatchInfo
    ) -> Future[GenerationBatchResult]:
        """Queue a batch; the future raises what computing it raised."""
        if self._waiter is None:
            future: Future[GenerationBatchResult] = Future()
            self._num_submitted += 1
            step = self._thread.submit(self._forward, forward_batch, info, future)
            step.add_done_callback(lambda done: self._pass_on_failure(done, future))
            return future
        launched = self._thread.submit(self._launch, forward_batch, info)
        return self._waiter.submit(self._await, launched)

    def close(self) -> None:
        """Finish what is under way and end the threads."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._tell()
        if self._waiter is not None:
            self._waiter.shutdown(wait=True, cancel_futures=True)

    def _forward(
        self,
        forward_batch: ForwardBatch,
        info: SamplingBatchInfo,
        future: Future[GenerationBatchResult],
    ) -> None:
        """A whole step on the host."""
        self._num_begun += 1
        result = self._finish(self._launch(forward_batch, info))
        self._untold = (future, result)
        if self._num_begun == self._num_submitted:
            self._tell()

    def _pass_on_failure(self, step: Future[None], future: Future[GenerationBatchResult]) -> None:
        """A step that gave no result: those who wait for it hear why."""
        if step.cancelled():
            future.cancel()
        elif (error := step.exception()) is not None:
            self._tell()
            future.set_exception(error)

    def _tell(self) -> None:
        """Hand over the last result on the host, if that was not done."""
        if self._untold is not None:
            (future, result), self._untold = self._untold, None
            future.set_result(result)

    def _await(self, launched: Future[_Launched]) -> GenerationBatchResult:
        return self._finish(launched.result())

    def _launch(self, forward_batch: ForwardBatch, info: SamplingBatchInfo) -> _Launched:
        """Everything of a step but waiting for it."""
        began = perf_counter()
        for row in info.drops:
            self._sampler.drop(row)
        for entry in info.admissions:
            self._sampler.admit(
                entry.row,
                entry.params,
                entry.seed,
                entry.prompt_ids,
                entry.output_ids,
                entry.matcher,
            )
        with self._runtime.computing(), torch.inference_mode():
            batch = self._relay.fill(forward_batch, info.rows)
            drafted = self._draft(batch)
            logits = self._runner.forward(
                batch, info.logprob_specs, _sampled_rows(batch, info), before=self._tell
            )
            expected: Sequence[int] = info.expected
            if drafted is not None and not self._runtime.is_async:
                # On a device nobody looks: what would be sampled by it is not drafted there.
                expected = info.expected_of(drafted.tokens.wait())
            places = Places(
                info.rows, info.positions, info.suppress_stop, info.place_specs(), expected
            )
            out = sample_places(self._sampler, logits.next_token_logits, places, logits.highest)
            self._relay.note(out.token_ids)
            if self._drafter is not None and batch.drafting is not None:
                self._drafter.follow(batch.drafting, logits.hidden)
            prompts = None
            if logits.late is not None:
                prompts = (logits.late, self._runtime.fetch(logits.late.values))
            return _Launched(
                began,
                self._runtime.fetch(out.token_ids if out.late is None else out.late.values),
                out.late,
                prompts,
                out.logprobs,
                logits.input_logprobs,
                out.invalid_rows,
                out.failures,
                batch.progress,
                drafted,
            )

    def _draft(self, batch: ForwardBatch) -> _Drafted | None:
        """Let the draft model have its part of a step; None: it has none, or nothing to say."""
        work = batch.drafting
        if self._drafter is None or work is None:
            return None
        tokens = self._drafter.propose(work, batch.input_ids, self._tell)
        return None if tokens is None else _Drafted(self._runtime.fetch(tokens), perf_counter())

    def _finish(self, step: _Launched) -> GenerationBatchResult:
        """The result of a launched step; returns when it has come."""
        began = max(step.began, self._last_end)
        drafted, drafting_s = None, 0.0
        if step.drafted is not None:
            drafted, ended = step.drafted.tokens.wait(), step.drafted.ended
            if self._runtime.is_async:
                ended = perf_counter()
            drafting_s = max(0.0, ended - began)
        values = step.told.wait()
        told = StepTold(values, list(step.output_logprobs), step.invalid_rows)
        if step.late is not None:
            told = step.late.read(values)
        input_logprobs = step.input_logprobs
        if step.prompts is not None:
            late, copy = step.prompts
            input_logprobs = late.read(copy.wait())
        step.progress.tick()
        # Steps are computed one after another: a step's time begins when the one before ended.
        self._last_end = perf_counter()
        return GenerationBatchResult(
            token_ids=told.token_ids,
            output_logprobs=told.logprobs,
            input_logprobs=input_logprobs,
            forward_s=self._last_end - began,
            invalid_rows=told.invalid_rows,
            failures=step.failures,
            drafted=drafted,
            drafting_s=drafting_s,
        )


def _sampled_rows(batch: ForwardBatch, info: SamplingBatchInfo) -> Sequence[int]:
    """Which of the batch's wanted rows are sampled from."""
    hidden = None if batch.drafting is None else batch.drafting.hidden
    if hidden is None:
        return info.logit_index
    rows: list[int] = hidden.wanted[list(info.logit_index)].tolist()
    return rows

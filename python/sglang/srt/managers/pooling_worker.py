"""The worker of a server that pools: prompts in batches, one vector part for each, no sampler.

It computes batches in the order of submission on a thread of its own, as `TpModelWorker` does, and
a second thread waits for each step's vectors.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from sglang.srt.errors import InvariantError
from sglang.srt.managers.generation_result import GenerationBatchResult
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.models.pooled import PooledModel
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.utils.device import DeviceRuntime, HostCopy


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step under way. `owners` are the requests whose vectors [P, d] come."""

    batch: ForwardBatch
    began: float
    owners: tuple[int, ...]
    vectors: HostCopy


class PoolingWorker:
    """Computes and pools batches that sample nothing."""

    def __init__(self, model: PooledModel, runtime: DeviceRuntime) -> None:
        self._model = model
        self._runtime = runtime
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="forward")
        self._waiter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="results")
        self._last_end = 0.0

    def submit(
        self, forward_batch: ForwardBatch, info: SamplingBatchInfo
    ) -> Future[GenerationBatchResult]:
        """Queue a batch; the future raises what computing it raised."""
        del info  # nothing is sampled
        launched = self._thread.submit(self._launch, forward_batch)
        return self._waiter.submit(self._finish, launched)

    def close(self) -> None:
        """Finish what is under way and end the threads."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._waiter.shutdown(wait=True, cancel_futures=True)

    def _launch(self, batch: ForwardBatch) -> _Launched:
        """Everything of a step but waiting for it."""
        began = time.perf_counter()
        if batch.pooled is None:
            raise InvariantError("a request that generates came to a model that is pooled")
        counts = batch.pooled.num_rows.tolist()
        owners = tuple(request for request, count in enumerate(counts) if count)
        with self._runtime.computing(), torch.inference_mode():
            if self._runtime.is_async:
                batch, _ = batch.moved(self._runtime)
            hidden = self._model(batch)
            vectors = self._model.pooler(hidden, [counts[owner] for owner in owners])
            return _Launched(batch, began, owners, self._runtime.fetch(vectors))

    def _finish(self, launched: Future[_Launched]) -> GenerationBatchResult:
        """The result of a step; returns when it has come."""
        step = launched.result()
        vectors = step.vectors.wait()
        step.batch.progress.tick()
        # Steps are computed one after another: a step's time begins when the one before ended.
        began, self._last_end = max(step.began, self._last_end), time.perf_counter()
        return GenerationBatchResult(
            token_ids=np.empty(0, np.int64),
            output_logprobs=(),
            input_logprobs=[None] * step.batch.batch_size,
            forward_s=self._last_end - began,
            pooled=dict(zip(step.owners, vectors, strict=True)),
        )

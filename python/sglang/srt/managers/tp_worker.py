"""One rank's worker: a thread that computes batches in order and never touches a request.

The scheduler submits a batch and collects its result one step later (overlap) or at once. The
thread is the only one that runs the model and the sampler, so batches see each other's effects
exactly in order: a token sampled by one is read by the next from the relay, before the host has
seen it.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from sglang.srt.layers.sampler import Sampler
from sglang.srt.managers.generation_result import GenerationBatchResult
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.model_runner import CausalLM, ModelRunner
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo


class TpModelWorker:
    """Computes batches in the order of submission on one thread."""

    def __init__(self, runner: ModelRunner, sampler: Sampler, num_rows: int) -> None:
        self._runner = runner
        self._sampler = sampler
        # Last sampled token of every KV row, written and read on the worker thread only.
        self._relay = np.zeros(num_rows, np.int64)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="forward")

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
        return self._thread.submit(self._forward, forward_batch, info)

    def close(self) -> None:
        """Finish what is queued and end the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _forward(
        self, forward_batch: ForwardBatch, info: SamplingBatchInfo
    ) -> GenerationBatchResult:
        began = time.perf_counter()
        for row in info.drops:
            self._sampler.drop(row)
        for entry in info.admissions:
            self._sampler.admit(
                entry.row, entry.params, entry.seed, entry.prompt_ids, entry.output_ids
            )
        if len(forward_batch.relay_at):
            tokens = torch.from_numpy(self._relay[forward_batch.relay_rows])
            forward_batch.input_ids[torch.from_numpy(forward_batch.relay_at)] = tokens
        with torch.inference_mode():
            logits = self._runner.forward(forward_batch, info.logprob_specs, info.logit_index)
            sampled_specs = [
                spec
                for spec, index in zip(info.logprob_specs, info.sample_index, strict=True)
                if index >= 0
            ]
            out = self._sampler.sample(
                logits.next_token_logits,
                info.rows,
                info.positions,
                info.suppress_stop,
                sampled_specs,
            )
        token_ids = out.token_ids.numpy()
        self._relay[np.asarray(info.rows, np.int64)] = token_ids
        forward_batch.progress.tick()
        return GenerationBatchResult(
            token_ids=token_ids,
            output_logprobs=out.logprobs,
            input_logprobs=logits.input_logprobs,
            forward_s=time.perf_counter() - began,
            invalid_rows=out.invalid_rows,
        )

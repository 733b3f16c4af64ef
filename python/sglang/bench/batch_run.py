"""One batch of equal requests through the real scheduler, turn by turn, in this process.

Nothing is served: no sockets, no tokenizer. The scheduler, memory and model are the server's own,
set up by the same flags.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from sglang.srt.environ import Environ
from sglang.srt.errors import InvariantError
from sglang.srt.managers.generation_result import GenerationBatchResult
from sglang.srt.managers.io_struct import (
    BatchProgressOut,
    BatchTokenIDOut,
    ControlReply,
    TokenizedGenerateReqInput,
    ToScheduler,
    int32_buffer,
)
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_limits import Worker
from sglang.srt.managers.scheduler_setup import SchedulerParts, build_scheduler_parts
from sglang.srt.managers.tp_worker import TpModelWorker
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.progress import Progress

_TAPE_TURNS = 15


@dataclass(frozen=True, slots=True)
class BatchSize:
    """`batch_size` requests of `input_len` tokens, each answered with `output_len` tokens."""

    batch_size: int
    input_len: int
    output_len: int


@dataclass(frozen=True, slots=True)
class BatchTimes:
    """What one batch took, in seconds.

    `prefill_s` ends when every request has its first token; `decode_s` are the times of the turns
    after that, one for each further token; `forward_s` is what the worker computed in every step,
    sampling included, `num_prefills` of them before the decode steps. `cached_tokens` of the
    prompts were found in the prefix cache.
    """

    size: BatchSize
    prefill_s: float
    decode_s: tuple[float, ...]
    forward_s: tuple[float, ...]
    num_prefills: int
    total_s: float
    cached_tokens: int

    @property
    def median_forward_s(self) -> float:
        """Of the decode steps; 0 when nothing was decoded."""
        forward = self.forward_s[self.num_prefills :]
        return statistics.median(forward) if forward else 0.0

    @property
    def median_decode_s(self) -> float:
        """0 when nothing was decoded."""
        return statistics.median(self.decode_s) if self.decode_s else 0.0

    def as_dict(self) -> dict[str, float | int]:
        """Figures under the names of SGLang's benchmark; throughputs in tokens per second."""
        size, decode = self.size, self.median_decode_s
        tokens = size.batch_size * (size.input_len + size.output_len)
        return {
            "batch_size": size.batch_size,
            "input_len": size.input_len,
            "output_len": size.output_len,
            "prefill_latency": self.prefill_s,
            "prefill_throughput": size.batch_size * size.input_len / self.prefill_s,
            "median_decode_latency": decode,
            "median_decode_throughput": size.batch_size / decode if decode else 0.0,
            "median_decode_forward": self.median_forward_s,
            "total_latency": self.total_s,
            "overall_throughput": tokens / self.total_s,
            "cached_tokens": self.cached_tokens,
        }


class BatchRunner:
    """The engine of `args`. Close it to give its memory back.

    Raises what `build_scheduler_parts` raises.
    """

    def __init__(self, args: ServerArgs, environ: Environ, seed: int = 0) -> None:
        progress = Progress()
        self._parts: SchedulerParts = build_scheduler_parts(args, environ, progress)
        self._channel = _Inbox()
        worker = self._parts.worker
        if not isinstance(worker, TpModelWorker):
            raise ValueError("the model is pooled: it has no decode steps to measure")
        self._model_worker = worker
        self._worker = _TimedWorker(worker)
        self._random = np.random.default_rng(seed)
        self._num_requests = 0
        # Every step is as large as the flags allow, and tells at once what it sampled.
        limits = replace(self._parts.limits, adaptive_chunk=False, stream_interval=1)
        self._scheduler = Scheduler(
            memory=self._parts.memory,
            worker=self._worker,
            make_batch=self._parts.make_batch,
            channel=self._channel,
            limits=limits,
            progress=progress,
            clock=time.monotonic,
        )

    @property
    def model(self) -> nn.Module:
        """The loaded model, for profiling."""
        model = self._model_worker.model
        if not isinstance(model, nn.Module):
            raise InvariantError(f"{type(model).__name__} is no module of torch")
        return model

    @contextmanager
    def without_tapes(self) -> Iterator[None]:
        """Decode steps go through the model's modules, one call after another."""
        runner = self._model_worker.runner
        tapes, runner.tapes = runner.tapes, None
        try:
            yield
        finally:
            runner.tapes = tapes

    def tape_times(self, size: BatchSize) -> list[tuple[str, float]]:
        """The native calls of the recorded decode step of this batch size, with their seconds.

        Medians of several turns. Empty when such steps are not recorded.
        """
        tapes = self._model_worker.runner.tapes
        if tapes is None:
            return []
        turns = [tapes.times(size.batch_size) for _ in range(_TAPE_TURNS)]
        names = [name for name, _ in turns[0]]
        seconds = [[seconds for _, seconds in turn] for turn in turns]
        return list(zip(names, map(statistics.median, zip(*seconds, strict=True)), strict=True))

    def check(self, size: BatchSize) -> None:
        """Raises ValueError, one line, when the engine can't run a batch of this size at once."""
        limits = self._parts.limits
        if min(size.batch_size, size.input_len, size.output_len) < 1:
            raise ValueError("batch size and lengths must be at least 1")
        if size.input_len + size.output_len > limits.context_length:
            raise ValueError(
                f"{size.input_len} + {size.output_len} tokens exceed the context length of "
                f"{limits.context_length}"
            )
        if size.batch_size > limits.max_running_requests:
            raise ValueError(
                f"{size.batch_size} requests exceed --max-running-requests "
                f"{limits.max_running_requests}"
            )

    def run(self, size: BatchSize) -> BatchTimes:
        """Time one batch of random prompts, its cache flushed before.

        Raises ValueError for sizes that don't fit, RuntimeError when a request ends otherwise than
        by its length.
        """
        self.check(size)
        self._parts.memory.flush()
        self._channel.begin([self._request(size) for _ in range(size.batch_size)])
        self._worker.forward_s.clear()
        began = time.perf_counter()
        while len(self._channel.started) < size.batch_size:
            self._scheduler.turn()
        first = last = time.perf_counter()
        num_prefills = len(self._worker.forward_s)
        decode: list[float] = []
        while self._scheduler.busy:
            self._scheduler.turn()
            now = time.perf_counter()
            decode.append(now - last)
            last = now
        bad = self._channel.bad_ends
        if bad:
            raise RuntimeError(f"{len(bad)} requests did not end by their length: {bad[0]}")
        return BatchTimes(
            size=size,
            prefill_s=first - began,
            decode_s=tuple(decode[: size.output_len - 1]),
            forward_s=tuple(self._worker.forward_s),
            num_prefills=num_prefills,
            total_s=last - began,
            cached_tokens=self._channel.cached_tokens,
        )

    def close(self) -> None:
        """End the worker and give all memory back."""
        self._parts.worker.close()
        self._parts.memory.close_pool()

    def _request(self, size: BatchSize) -> TokenizedGenerateReqInput:
        self._num_requests += 1
        vocabulary = self._model_worker.model.lm_head.num_embeddings
        ids = self._random.integers(0, vocabulary, size.input_len, np.int32)
        return TokenizedGenerateReqInput(
            rid=f"batch-{self._num_requests}",
            input_ids=memoryview(int32_buffer(ids)),
            sampling_params=SamplingParams(
                max_new_tokens=size.output_len, temperature=0.0, ignore_eos=True
            ),
        )


class _Inbox:
    """The scheduler's channel: hands in a batch and watches its requests begin and end."""

    def __init__(self) -> None:
        self._waiting: list[ToScheduler] = []
        self.started: set[str] = set()
        self.bad_ends: list[str] = []
        self.cached_tokens = 0

    def begin(self, requests: Sequence[TokenizedGenerateReqInput]) -> None:
        self._waiting = list(requests)
        self.started.clear()
        self.bad_ends.clear()
        self.cached_tokens = 0

    def receive(self, timeout_ms: int) -> Sequence[ToScheduler]:
        del timeout_ms  # there is always work, or nobody asks
        found, self._waiting = self._waiting, []
        return found

    def send_outputs(self, outputs: BatchTokenIDOut) -> None:
        for out in outputs.outs:
            if out.rid not in self.started:
                self.started.add(out.rid)
                self.cached_tokens += out.cached_tokens
            if out.finish_reason is not None and out.finish_reason.type != "length":
                self.bad_ends.append(f"{out.rid}: {out.finish_reason}")

    def send_reply(self, reply: ControlReply) -> None: ...

    def send_progress(self, progress: BatchProgressOut) -> None: ...


class _TimedWorker:
    """A worker that notes how long each forward took, in the order of completion."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.forward_s: list[float] = []

    def submit(
        self, forward_batch: ForwardBatch, info: SamplingBatchInfo
    ) -> Future[GenerationBatchResult]:
        future = self._worker.submit(forward_batch, info)
        future.add_done_callback(self._note)
        return future

    def _note(self, future: Future[GenerationBatchResult]) -> None:
        if not future.cancelled() and future.exception() is None:
            self.forward_s.append(future.result().forward_s)

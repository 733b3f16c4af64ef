"""The numbers a scheduler works under, and the protocols of its neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from sglang.srt.managers.draft_policy import DraftRules
from sglang.srt.managers.generation_result import GenerationBatchResult
from sglang.srt.managers.io_struct import (
    BatchProgressOut,
    BatchTokenIDOut,
    ControlReply,
    FinishReason,
    ToScheduler,
)
from sglang.srt.managers.priority_policy import PriorityRules
from sglang.srt.managers.step_time import StepTime as StepTime
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """What one scheduler may do; fixed at start but for `context_length`, which moves with the
    budget: the scheduler then replaces the whole.

    Tokens unless named otherwise. `chunk_tokens` is the prefill budget of a step,
    `adaptive_chunk` lets it shrink to keep steps short. `window_pages[g]` bounds the pages one
    request needs of group g (None: keeps all). `max_queued_requests` None: no bound. `priorities`
    None: the priorities of requests order nothing. `drafts` None: no tokens are drafted.
    """

    page_size: int
    context_length: int
    context_length_requested: int
    max_running_requests: int
    chunk_tokens: int
    adaptive_chunk: bool
    policy: str
    stream_interval: int
    overlap: bool
    window_pages: tuple[int | None, ...]
    random_seed: int
    max_queued_requests: int | None = None
    log_interval_steps: int = 40
    priorities: PriorityRules | None = None
    drafts: DraftRules | None = None

    def refusal(self, num_tokens: int, max_new_tokens: int | None) -> FinishReason | None:
        """Why a prompt of `num_tokens` can't be served, whoever waits; None when it can."""
        if num_tokens == 0:
            return FinishReason("abort", message="The prompt is empty.", status_code=400)
        longest = self.context_length - (max_new_tokens != 0)
        if num_tokens > longest:
            text = (
                f"Input length ({num_tokens} tokens) exceeds the maximum allowed length "
                f"({longest} tokens)."
            )
            return FinishReason("abort", message=text, status_code=400, err_type="BadRequestError")
        return None

    def queue_refusal(self, num_waiting: int) -> FinishReason | None:
        """Why a queue of `num_waiting` takes no more; None when it does."""
        bound = self.max_queued_requests
        if bound is None or num_waiting < bound:
            return None
        text = f"The request queue is full ({bound} requests)."
        return FinishReason("abort", message=text, status_code=503)


class SchedulerChannel(Protocol):
    """The sockets of a scheduler, so that tests can stand in for the other processes."""

    def receive(self, timeout_ms: int) -> Sequence[ToScheduler]:
        """All messages waiting; blocks up to `timeout_ms` for the first (0: not at all)."""

    def send_outputs(self, outputs: BatchTokenIDOut) -> None: ...

    def send_reply(self, reply: ControlReply) -> None: ...

    def send_progress(self, progress: BatchProgressOut) -> None: ...


class GrammarVerdict(msgspec.Struct, frozen=True, array_like=True):
    """A waiting request's grammar is there, or why it never will be: `error` and `status`."""

    rid: str
    error: str = ""
    status: int = 0


class TurnInputs(msgspec.Struct, array_like=True):
    """All that a turn is decided from beside the state that ranks share: the same on every rank.

    `now` in seconds of rank 0's monotonic clock; `messages` in the order in which they came;
    `step_times` those of steps that rank 0 collected since the last turn, for the size of chunks
    and drafts. `digest` stands for what rank 0 has decided so far. `meet`: all ranks
    show that they are there. `grammars` tells of requests that wait for theirs.
    """

    now: float
    messages: list[ToScheduler]
    step_times: list[StepTime] = []
    digest: int = 0
    meet: bool = False
    grammars: list[GrammarVerdict] = []


class TurnSource(Protocol):
    """Where a scheduler's turns come from: its own channel, or rank 0. See Note [Ranks]."""

    def next(self, poll_ms: int) -> TurnInputs:
        """What the next turn is decided from; rank 0 waits up to `poll_ms` for a message."""

    def note_step(self, time: StepTime) -> None:
        """A step was collected; its time comes back with the inputs of the next turn."""

    def note_grammars(self, verdicts: Sequence[GrammarVerdict]) -> None:
        """What this rank knows of its grammars; what rank 0 knows comes with the next inputs."""

    def note_decided(self, values: npt.NDArray[np.int64]) -> None:
        """Something that all ranks have to decide alike was decided."""


class Worker(Protocol):
    """What the scheduler needs of a worker."""

    def submit(
        self, forward_batch: ForwardBatch, info: SamplingBatchInfo
    ) -> Future[GenerationBatchResult]: ...

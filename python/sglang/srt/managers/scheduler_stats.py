"""Counters of a scheduler and the state it shows to /server_info and /metrics."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Protocol

from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.managers.scheduler_limits import SchedulerLimits
from sglang.srt.managers.scheduler_progress import PrefillProgressLog
from sglang.srt.mem_cache.allocation import KVMemory
from sglang.srt.mem_cache.memory_report import memory_details

logger = logging.getLogger(__name__)

# /server_info lists no more requests than this; the counts are always whole.
MAX_LISTED = 256


def accept_length(num_verified: int, num_correct: int) -> float | None:
    """Mean tokens that came of a step with a draft; None: nothing was drafted."""
    return round(1 + num_correct / num_verified, 4) if num_verified else None


class SchedulerCounters:
    """Totals since start; read by `internal_state`, changed by the scheduler only."""

    def __init__(self) -> None:
        self.num_requests = 0
        self.num_refused = 0
        self.num_aborted = 0
        self.num_retractions = 0
        self.num_preemptions = 0  # of them, for a more urgent request
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generated_tokens = 0
        self.num_steps = 0
        self.gen_throughput = 0.0  # tokens/s, smoothed over steps
        self._last_sampled = 0
        self.num_proposed = 0  # tokens drafted
        self.num_correct = 0  # of them, taken
        self.num_verified = 0  # drafts

    def note_admission(self, req: Req) -> None:
        """A request took its place; only the first time counts for the hit rate."""
        if req.num_retractions == 0:
            self.cached_tokens += req.num_cached_tokens or 0

    def note_result(
        self,
        num_sampled: int,
        num_verified: int = 0,
        num_proposed: int = 0,
        num_correct: int = 0,
    ) -> None:
        """A step was computed: drafts of `num_verified` requests, their tokens, and those taken."""
        self.num_steps += 1
        self.num_proposed += num_proposed
        self.num_correct += num_correct
        self.num_verified += num_verified
        self.generated_tokens += num_sampled
        self._last_sampled = num_sampled

    def note_step(self, seconds: float) -> None:
        """How long the loop took over the last step, waiting for its result included."""
        if seconds > 0:
            rate = self._last_sampled / seconds
            self.gen_throughput += 0.1 * (rate - self.gen_throughput)

    def as_dict(self) -> dict[str, Any]:
        return {
            "num_requests_total": self.num_requests,
            "num_refused_requests_total": self.num_refused,
            "num_aborted_requests_total": self.num_aborted,
            "num_retracted_requests_total": self.num_retractions,
            "num_preempted_requests_total": self.num_preemptions,
            "prompt_tokens_total": self.prompt_tokens,
            "cached_tokens_total": self.cached_tokens,
            "generation_tokens_total": self.generated_tokens,
            "num_steps_total": self.num_steps,
            "num_verified_drafts_total": self.num_verified,
            "num_drafted_tokens_total": self.num_proposed,
            "num_correct_drafted_tokens_total": self.num_correct,
            "avg_spec_accept_length": accept_length(self.num_verified, self.num_correct),
            "last_gen_throughput": round(self.gen_throughput, 3),
        }


class SchedulerView(Protocol):
    """The part of a scheduler that its state is read from."""

    counters: SchedulerCounters
    prefills: PrefillProgressLog

    @property
    def num_running(self) -> int: ...

    @property
    def num_waiting(self) -> int: ...

    def requests(self) -> Sequence[Req]: ...


def describe_request(req: Req, prefills: PrefillProgressLog) -> dict[str, Any]:
    """One request as /server_info lists it; `prefill` is null when its prompt is not under way."""
    prefill = prefills.of(req)
    return {
        "rid": req.rid,
        "state": req.state.value,
        "prompt_tokens": req.prompt_len,
        "computed_tokens": min(req.num_scheduled, req.known),
        "completion_tokens": req.num_output,
        "num_retractions": req.num_retractions,
        "prefill": None if prefill is None else prefill.as_dict(),
    }


def internal_state(
    scheduler: SchedulerView,
    limits: SchedulerLimits,
    memory: KVMemory,
    *,
    details: bool = False,
) -> dict[str, Any]:
    """What a scheduler shows of itself; plain values only.

    With `details` (/server_info) the memory also tells its segment map and what is resident, which
    takes milliseconds; without them (/metrics) microseconds.
    """
    requests = scheduler.requests()
    return {
        "memory": {
            "context_length_requested": limits.context_length_requested,
            "context_length": limits.context_length,
            **memory.memory_object(),
            **(memory_details(memory.manager) if details else {}),
        },
        "num_running_reqs": scheduler.num_running,
        "num_queue_reqs": scheduler.num_waiting,
        "max_running_requests": limits.max_running_requests,
        "requests": [describe_request(req, scheduler.prefills) for req in requests[:MAX_LISTED]],
        **scheduler.counters.as_dict(),
    }


def log_step(batch: ScheduleBatch, num_running: int, num_waiting: int, memory: KVMemory) -> None:
    """One line of a step and what is behind it."""
    logger.info(
        "Step %d: %s; running %d, waiting %d; %r",
        batch.step,
        batch.forward_mode.value,
        num_running,
        num_waiting,
        memory,
    )

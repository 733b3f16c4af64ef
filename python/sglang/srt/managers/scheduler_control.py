"""The scheduler's desk for questions and operations: `ControlReq` in, `ControlReply` out.

Most are answered at once; an operation on the pool takes turns, one operation at a time. The
scheduler calls `answer` for every message and `step` once a turn; nobody else does.
"""

from __future__ import annotations

from typing import Protocol

from sglang.srt.managers.io_struct import ControlReply, ControlReq
from sglang.srt.managers.scheduler_budget import (
    BudgetChange,
    Compaction,
    PoolHost,
    PoolOperation,
    check_args,
)
from sglang.srt.managers.scheduler_canary import SchedulerCanary
from sglang.srt.managers.scheduler_lora import LORA_OPS, SchedulerAdapters
from sglang.srt.managers.scheduler_stats import SchedulerView, internal_state
from sglang.srt.mem_cache.allocation import KVMemory


class ControlHost(SchedulerView, PoolHost, Protocol):
    """What the desk needs of the scheduler."""


class SchedulerControl:
    """Answers one scheduler's control messages; holds the operation under way, if any."""

    def __init__(
        self,
        host: ControlHost,
        memory: KVMemory,
        canary: SchedulerCanary | None,
        adapters: SchedulerAdapters,
    ) -> None:
        self._host = host
        self._adapters = adapters
        self._memory = memory
        self._canary = canary
        self._operation: PoolOperation | None = None

    @property
    def active(self) -> bool:
        """True while an operation waits for further turns."""
        return self._operation is not None

    def answer(self, message: ControlReq, now: float) -> list[ControlReply]:
        """What can be told at once: the answer, or nothing yet, or the end of what was running."""
        if message.op in ("internal_state", "server_info"):
            details = message.op == "server_info"
            state = internal_state(self._host, self._host.limits, self._memory, details=details)
            return [ControlReply(message.seq, True, data=state)]
        if message.op == "flush_cache":
            return [self._flush(message)]
        if message.op == "audit":
            return [self._audit(message)]
        if message.op in LORA_OPS:
            return [self._adapters.answer(message, self._host)]
        if message.op in ("set_kv_budget", "compact_kv"):
            return self._start(message, now)
        return [ControlReply(message.seq, False, f"Unknown operation {message.op}.")]

    def step(self, now: float) -> list[ControlReply]:
        """Let the operation under way do a piece of work; its reply when it has ended."""
        if self._operation is None:
            return []
        reply = self._operation.step(now)
        if reply is None:
            return []
        self._operation = None
        return [reply]

    def _start(self, message: ControlReq, now: float) -> list[ControlReply]:
        wrong = check_args(message)
        if wrong is not None:
            return [ControlReply(message.seq, False, wrong, {"status_code": 400})]
        if message.op == "compact_kv":
            if self._operation is not None:
                text = "A budget change or a compaction is under way."
                return [ControlReply(message.seq, False, text, {"status_code": 409})]
            self._operation = Compaction(self._host, self._memory, message, now)
            return []
        change = BudgetChange(self._host, self._memory, message, now)
        refusal = change.refusal()
        if refusal is not None:
            return [refusal]
        # The newest budget counts; who asked before hears how far it came.
        ended = [] if self._operation is None else [self._operation.supersede()]
        change.begin()
        self._operation = change
        return ended

    def _flush(self, message: ControlReq) -> ControlReply:
        present = len(self._host.requests())
        if present:
            text = f"{present} requests are running or queued; nothing was flushed."
            return ControlReply(message.seq, False, text)
        self._host.drain()
        done = self._memory.flush()
        return ControlReply(message.seq, done, "Cache flushed." if done else "Not flushed.")

    def _audit(self, message: ControlReq) -> ControlReply:
        self._host.drain()
        self._memory.audit()
        if self._canary is not None:
            self._canary.audit(self._host.requests())
        return ControlReply(message.seq, True, "Every page has exactly one owner.")

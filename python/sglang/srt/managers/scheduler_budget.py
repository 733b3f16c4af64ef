"""Operations on the pool that take several turns: a budget change, a compaction.

Each is a small state machine that `SchedulerControl` steps once a turn with the queue drained,
while requests go on in between; its reply is made when it ends. The deadline goes by the time of
the turn, which all ranks share. See docs/kv_segments.md, Note [A budget that moves].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

from sglang.srt.managers.io_struct import ControlReply, ControlReq
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.scheduler_limits import SchedulerLimits
from sglang.srt.mem_cache.allocation import KVMemory
from sglang.srt.mem_cache.compaction import compact
from sglang.srt.mem_cache.reclaim import (
    MOVE_BYTES_PER_STEP,
    SHORTEST_CONTEXT,
    Reclaim,
    context_under,
    minimum_budget,
    reclaim_step,
)

DEFAULT_TIME_LIMIT_S = 30.0


class PoolHost(Protocol):
    """What an operation asks of the scheduler."""

    @property
    def limits(self) -> SchedulerLimits: ...

    def requests(self) -> Sequence[Req]: ...

    def drain(self) -> None: ...

    def set_context_length(self, context_length: int) -> None: ...

    def end_by_abort(self, req: Req, text: str, status: int) -> None: ...

    def retract_one(self) -> bool: ...


class PoolOperation(Protocol):
    """One operation under way. `step` returns its reply when it has ended, else None."""

    seq: int

    def step(self, now: float) -> ControlReply | None: ...

    def supersede(self) -> ControlReply: ...


class BudgetChange:
    """`set_kv_budget`: raising ends in the first step, lowering when mapped memory holds it.

    The budget and the effective context are the new ones from `begin` on. When the time is over
    the budget stays as requested: growth has stopped, and memory goes as it becomes empty.
    """

    def __init__(self, host: PoolHost, memory: KVMemory, message: ControlReq, now: float) -> None:
        self.seq = message.seq
        self._host = host
        self._memory = memory
        self._budget_bytes = int(message.args["budget_bytes"])
        self._deadline = now + float(message.args.get("time_limit_s", DEFAULT_TIME_LIMIT_S))
        self._evicted_pages = 0
        self._moved_pages = 0
        self._retracted = 0
        self._aborted = 0

    def refusal(self) -> ControlReply | None:
        """Why the change can't be made, both numbers included; None: it can. Changes nothing."""
        manager, chunk = self._memory.manager, self._host.limits.chunk_tokens
        if not manager.backing.elastic:
            text = (
                f"The {manager.backing.name} backing keeps {manager.mapped_bytes} bytes mapped "
                f"from start to end; its KV budget can't become {self._budget_bytes} bytes."
            )
            return _refused(self.seq, text, manager.mapped_bytes)
        least = minimum_budget(self._memory, chunk)
        if self._clamp(SHORTEST_CONTEXT) < SHORTEST_CONTEXT:
            text = (
                f"A KV budget of {self._budget_bytes} bytes is too small: one request's first "
                f"segments and the reserve take {least} bytes."
            )
            return _refused(self.seq, text, least)
        return None

    def begin(self) -> None:
        """Set the budget and the context; end the requests that can't fit any more."""
        limits = self._host.limits
        context = self._clamp(limits.context_length_requested)
        if context < limits.context_length:
            self._host.drain()  # then every request's tokens are known
        self._memory.manager.set_budget(self._budget_bytes)
        self._host.set_context_length(context)
        for req in self._host.requests():
            if req.known >= context and not req.is_ending:
                text = (
                    f"The KV budget was lowered: the request has {req.known} tokens, the "
                    f"effective context is {context} tokens now."
                )
                self._host.end_by_abort(req, text, 503)
                self._aborted += 1

    def step(self, now: float) -> ControlReply | None:
        """One bounded piece of work; the reply when mapped memory holds the budget, or late."""
        if self._holds:
            return self._reply()
        self._host.drain()
        done = reclaim_step(self._memory)
        self._evicted_pages += done.evicted_pages
        self._moved_pages += done.moved_pages
        if done.state is Reclaim.STUCK:
            self._retracted += self._host.retract_one()
        return self._reply() if done.state is Reclaim.HOLDS or now >= self._deadline else None

    @property
    def _holds(self) -> bool:
        return self._memory.manager.committed_bytes <= self._budget_bytes

    def supersede(self) -> ControlReply:
        """Another change takes over: the reply as things stand."""
        return self._reply()

    def _clamp(self, requested: int) -> int:
        chunk = self._host.limits.chunk_tokens
        return context_under(self._memory, self._budget_bytes, requested, chunk).effective

    def _reply(self) -> ControlReply:
        manager, size = self._memory.manager, self._memory.page_size
        text = (
            "The KV budget holds."
            if self._holds
            else "The time is over before the KV budget holds."
        )
        data = {
            "requested_bytes": self._budget_bytes,
            "reached_bytes": max(manager.committed_bytes, self._budget_bytes),
            "mapped_bytes": manager.mapped_bytes,
            "evicted_tokens": self._evicted_pages * size,
            "moved_tokens": self._moved_pages * size,
            "retracted": self._retracted,
            "aborted": self._aborted,
            "context_length": self._host.limits.context_length,
        }
        return ControlReply(self.seq, self._holds, text, data)


class Compaction:
    """`compact_kv`: pack every group, give the emptied segments above the reserve back."""

    def __init__(self, host: PoolHost, memory: KVMemory, message: ControlReq, now: float) -> None:
        self.seq = message.seq
        self._host = host
        self._memory = memory
        self._deadline = now + float(message.args.get("time_limit_s", DEFAULT_TIME_LIMIT_S))
        self._moved_pages = 0
        self._emptied = 0
        self._released_before = _unmapped_bytes(memory)
        self._is_packed = False
        self._asked = False

    def step(self, now: float) -> ControlReply | None:
        """Move a bounded number of bytes; when all is packed, wait for the unmaps."""
        late = now >= self._deadline
        if not self._is_packed:
            self._host.drain()
            done = compact(self._memory, MOVE_BYTES_PER_STEP)
            if done is None:
                self._is_packed = True
            else:
                self._moved_pages += done.moved_pages
                self._emptied += done.emptied_segments
        if self._is_packed and not self._asked:
            self._memory.ladder.release_empty()
            self._asked = True
        waits = not self._is_packed or self._memory.num_pending_growths > 0
        return None if waits and not late else self._reply()

    def supersede(self) -> ControlReply:
        """A budget change takes over: the reply as things stand."""
        return self._reply()

    def _reply(self) -> ControlReply:
        data = {
            "moved_pages": self._moved_pages,
            "moved_tokens": self._moved_pages * self._memory.page_size,
            "emptied_segments": self._emptied,
            "released_bytes": _unmapped_bytes(self._memory) - self._released_before,
        }
        text = "Compacted." if self._is_packed else "Not all was moved in the time given."
        return ControlReply(self.seq, self._is_packed, text, data)


def _unmapped_bytes(memory: KVMemory) -> int:
    """Bytes given back since start."""
    pairs = zip(memory.manager.stats(), memory.manager.layouts, strict=True)
    return sum(stats.unmap_count * layout.segment_bytes for stats, layout in pairs)


def check_args(message: ControlReq) -> str | None:
    """What is wrong with the arguments of `set_kv_budget` or `compact_kv`; None: nothing."""
    args: dict[str, Any] = message.args
    limit = args.get("time_limit_s", DEFAULT_TIME_LIMIT_S)
    if not isinstance(limit, int | float) or not 0 <= limit < math.inf:
        return f"time_limit_s must be a number of seconds, not {limit!r}."
    budget = args.get("budget_bytes")
    if message.op == "set_kv_budget" and (type(budget) is not int or budget < 0):
        return f"budget_bytes must be a number of bytes, not {budget!r}."
    return None


def _refused(seq: int, text: str, minimum_bytes: int) -> ControlReply:
    return ControlReply(seq, False, text, {"status_code": 400, "minimum_bytes": minimum_bytes})

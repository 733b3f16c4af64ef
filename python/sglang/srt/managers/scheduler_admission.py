"""The waiting queue and the door to memory: who gets a lease, in numbers, before any page.

Admission reserves promises, not pages: what every admitted request may still ask for has to fit
in the budget less what is locked (DESIGN: two prompts of 60 % of capacity never block each
other). The order comes from the policy; under fcfs nobody overtakes.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence

from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.schedule_policy import fits, order_waiting, pages_promised
from sglang.srt.managers.scheduler_limits import SchedulerLimits
from sglang.srt.mem_cache.allocation import KVLease, KVMemory


class WaitingQueue:
    """Requests without memory, in arrival order; retracted ones return to their old place."""

    def __init__(self) -> None:
        self._reqs: list[Req] = []

    def add(self, req: Req) -> None:
        """Insert by arrival; a new request goes to the end in O(1)."""
        bisect.insort(self._reqs, req, key=lambda other: other.arrival)

    def remove(self, req: Req) -> None:
        """Take a request out; it must be there."""
        index = bisect.bisect_left(self._reqs, req.arrival, key=lambda other: other.arrival)
        removed = self._reqs.pop(index)
        assert removed is req

    def view(self) -> Sequence[Req]:
        """The queue itself, not to be changed by the caller."""
        return self._reqs

    def __len__(self) -> int:
        return len(self._reqs)

    def __iter__(self) -> Iterator[Req]:
        return iter(self._reqs)


class Admission:
    """Opens leases for waiting requests as far as rows and promises allow."""

    def __init__(self, memory: KVMemory, limits: SchedulerLimits) -> None:
        self._memory = memory
        self._limits = limits

    def admit(self, waiting: WaitingQueue, running: Sequence[Req]) -> list[Req]:
        """Admit in the policy's order until the first that does not fit; returns the admitted.

        Admitted requests leave `waiting` and hold a lease with their prefix hit locked.
        """
        admitted: list[Req] = []
        if not len(waiting) or len(running) >= self._limits.max_running_requests:
            return admitted
        present = [req for req in running if not req.is_ending]
        for req in order_waiting(waiting.view(), self._limits.policy, self._match_len):
            if len(running) + len(admitted) >= self._limits.max_running_requests:
                break
            if not self._try_open(req, [*present, *admitted]):
                req.num_passed_over += 1
                break
            admitted.append(req)
        for req in admitted:
            waiting.remove(req)
        if admitted and self._limits.policy != "fcfs":
            last = max(req.arrival for req in admitted)
            for req in waiting:
                if req.arrival > last:
                    break
                req.num_passed_over += 1
        return admitted

    def _try_open(self, req: Req, present: Sequence[Req]) -> bool:
        # The lease comes first because only a locked hit is certain: what it saves the request
        # is what it takes from the headroom, so the numbers below are exact.
        tokens = req.tokens.view()
        lease = self._memory.open(tokens, extra_key=req.extra_key, max_prefix=req.max_prefix())
        if lease is None:
            return False
        full = req.needs_reservation or any(other.needs_reservation for other in present)
        promised = [self._promise(other, full) for other in present]
        candidate = self._promise(req, full, lease)
        if not fits(promised, candidate, self._memory.headroom_pages()):
            self._memory.close(lease, None, 0)
            return False
        req.admit(lease)
        return True

    def _promise(self, req: Req, full: bool, lease: KVLease | None = None) -> tuple[int, ...]:
        limits = self._limits
        held = lease or req.kv
        return pages_promised(req, held, limits.page_size, limits.window_pages, full=full)

    def _match_len(self, req: Req) -> int:
        return self._memory.match_len(req.tokens.view(0, req.known), req.extra_key)

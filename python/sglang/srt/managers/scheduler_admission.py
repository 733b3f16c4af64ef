"""The waiting queue and the door to memory: who gets a lease, in numbers, before any page.

Admission reserves promises, not pages: what every admitted request may still ask for has to fit
in the budget less what is locked (DESIGN: two prompts of 60 % of capacity never block each
other). The order comes from the policy; under fcfs nobody overtakes.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.schedule_policy import order_waiting, pages_promised, total_pages
from sglang.srt.managers.scheduler_limits import SchedulerLimits
from sglang.srt.mem_cache.allocation import KVLease, KVMemory

# Steps between two looks at a waiting prompt while no number has changed for the better.
LOOK_AGAIN = 16


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


@dataclass(slots=True)
class _Refusal:
    """The last refusal: how long the queue was, what room there was, and looks skipped since."""

    num_waiting: int
    room: tuple[int, ...]
    num_skipped: int = 0


class Admission:
    """Opens leases for waiting requests as far as rows and promises allow."""

    def __init__(self, memory: KVMemory, limits: SchedulerLimits) -> None:
        self._memory = memory
        self._limits = limits
        self._refusal: _Refusal | None = None

    def set_limits(self, limits: SchedulerLimits) -> None:
        """Admit under other numbers from now on; who was refused is looked at again."""
        self._limits = limits
        self._refusal = None

    def admit(self, waiting: WaitingQueue, running: Sequence[Req]) -> list[Req]:
        """Admit in the policy's order until the first that does not fit; returns the admitted.

        Admitted requests leave `waiting` and hold a lease with their prefix hit locked.
        """
        admitted: list[Req] = []
        if not len(waiting) or len(running) >= self._limits.max_running_requests:
            return admitted
        present = [req for req in running if not req.is_ending]
        if self._is_hopeless(len(waiting), present):
            return admitted
        for req in order_waiting(waiting.view(), self._limits.policy, self._match_len):
            if len(running) + len(admitted) >= self._limits.max_running_requests:
                break
            if not self._try_open(req, [*present, *admitted]):
                req.num_passed_over += 1
                room = self._room([*present, *admitted])
                self._refusal = _Refusal(len(waiting) - len(admitted), room)
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

    def _is_hopeless(self, num_waiting: int, present: Sequence[Req]) -> bool:
        """True when nothing got better since the last refusal.

        A look costs a match of a whole prompt, too much for every step of a long wait. Room can
        also grow in ways that the numbers do not show (a running request shares more of the
        waiting one's prefix), so every `LOOK_AGAIN`th step looks all the same.
        """
        refusal = self._refusal
        if refusal is None:
            return False
        same_queue = refusal.num_waiting == num_waiting
        better = any(a > b for a, b in zip(self._room(present), refusal.room, strict=True))
        if same_queue and not better and refusal.num_skipped < LOOK_AGAIN:
            refusal.num_skipped += 1
            return True
        self._refusal = None
        return False

    def _room(self, present: Sequence[Req]) -> tuple[int, ...]:
        """Pages per group that are neither taken nor promised (clipped); may be negative."""
        promised = [self._promise(req, req.needs_reservation) for req in present]
        headroom = self._memory.headroom_pages()
        return tuple(pages - sum(one[g] for one in promised) for g, pages in enumerate(headroom))

    def _try_open(self, req: Req, present: Sequence[Req]) -> bool:
        # The lease comes first because only a locked hit is certain: what it saves the request
        # is what it takes from the headroom, so the numbers below are exact.
        tokens = req.tokens.view()
        lease = self._memory.open(
            tokens,
            extra_key=req.extra_key,
            max_prefix=req.max_prefix(),
            priority=req.priority,
        )
        if lease is None:
            return False
        full = req.needs_reservation or any(other.needs_reservation for other in present)
        promised = [self._promise(other, full) for other in present]
        candidate = self._promise(req, full, lease)
        if not self._memory.can_hold(total_pages(promised, candidate)):
            self._memory.close(lease, None, 0)
            return False
        self._memory.copy_rest(lease, tokens, req.max_prefix())
        req.admit(lease)
        return True

    def _promise(self, req: Req, full: bool, lease: KVLease | None = None) -> tuple[int, ...]:
        limits = self._limits
        lease = lease or req.kv
        held = (0,) * len(limits.window_pages) if lease is None else self._memory.pages_held(lease)
        return pages_promised(
            req,
            lease,
            held,
            limits.page_size,
            limits.window_pages,
            full=full,
            context_length=limits.context_length,
        )

    def _match_len(self, req: Req) -> int:
        return self._memory.match_len(req.tokens.view(0, req.known), req.extra_key)

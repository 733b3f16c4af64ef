"""The waiting queue and the door to memory: who gets a lease, in numbers, before any page.

Admission reserves promises, not pages: what every admitted request may still ask for has to fit
in the budget less what is locked (DESIGN: two prompts of 60 % of capacity never block each
other). The order comes from the policy; under fcfs nobody overtakes among the equally urgent.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sglang.srt.managers.lora_policy import MAX_LOOKED_AT
from sglang.srt.managers.priority_policy import plan_preemption
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.schedule_policy import (
    order_waiting,
    pages_promised,
    service_key,
    total_pages,
)
from sglang.srt.managers.scheduler_limits import SchedulerLimits
from sglang.srt.managers.scheduler_lora import SchedulerAdapters
from sglang.srt.mem_cache.allocation import KVLease, KVMemory
from sglang.srt.mem_cache.room_without import RoomWithout

# Steps between two looks at a waiting prompt while no number has changed for the better.
LOOK_AGAIN = 16


class WaitingQueue:
    """Requests without memory, sorted by `service_key`; retracted ones return to their place."""

    def __init__(self) -> None:
        self._reqs: list[Req] = []

    def add(self, req: Req) -> None:
        """Insert in order; a new request goes behind its equals."""
        bisect.insort(self._reqs, req, key=service_key)

    def remove(self, req: Req) -> None:
        """Take a request out; it must be there."""
        index = bisect.bisect_left(self._reqs, service_key(req), key=service_key)
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

    def stands(self, num_waiting: int, room: tuple[int, ...]) -> bool:
        """True when nothing got better since, so that a look may be skipped.

        A look costs a match of a whole prompt, too much for every step of a long wait. Room can
        also grow in ways that the numbers do not show (a running request shares more of the
        waiting one's prefix), so every `LOOK_AGAIN`th step looks all the same.
        """
        better = any(a > b for a, b in zip(room, self.room, strict=True))
        if num_waiting != self.num_waiting or better or self.num_skipped >= LOOK_AGAIN:
            return False
        self.num_skipped += 1
        return True


@dataclass(frozen=True, slots=True)
class _Promised:
    """Pages per group that `reqs` may still take, counted in full or clipped."""

    reqs: list[Req]
    full: bool
    pages: tuple[int, ...]


class Admission:
    """Opens leases for waiting requests as far as rows and promises allow."""

    def __init__(
        self, memory: KVMemory, limits: SchedulerLimits, adapters: SchedulerAdapters
    ) -> None:
        self._memory = memory
        self._limits = limits
        self._promised: _Promised | None = None  # of this turn's admissions so far
        self._adapters = adapters
        self._refusal: _Refusal | None = None
        self._no_plan: _Refusal | None = None  # the last time that preemption did not help

    def set_limits(self, limits: SchedulerLimits) -> None:
        """Admit under other numbers from now on; who was refused is looked at again."""
        self._limits = limits
        self._refusal = self._no_plan = None

    def admit(self, waiting: WaitingQueue, running: Sequence[Req]) -> list[Req]:
        """Admit in the policy's order until the first that does not fit; returns the admitted.

        One whose adapter has no place does not keep all others back, see lora_policy. Admitted
        requests leave `waiting` and hold a lease with their prefix hit locked.
        """
        admitted: list[Req] = []
        self._promised = None
        if not len(waiting) or len(running) >= self._limits.max_running_requests:
            return admitted
        present = [req for req in running if not req.is_ending]
        if self._refusal is not None:
            if self._refusal.stands(len(waiting), self._room(present)):
                return admitted
            self._refusal = None
        self._adapters.begin_admission(running)
        num_kept_back = 0
        for req in order_waiting(waiting.view(), self._limits.policy, self._match_len):
            if len(running) + len(admitted) >= self._limits.max_running_requests:
                break
            if not self._adapters.may_admit(req):
                req.num_passed_over += 1
                num_kept_back += 1
                if num_kept_back == MAX_LOOKED_AT:
                    break
                continue
            if not self._try_open(req, [*present, *admitted]):
                req.num_passed_over += 1
                room = self._room([*present, *admitted])
                self._refusal = _Refusal(len(waiting) - len(admitted), room)
                break
            self._adapters.take_place(req)
            admitted.append(req)
        for req in admitted:
            waiting.remove(req)
        if admitted and self._limits.policy != "fcfs":
            last = max(map(service_key, admitted))
            for req in waiting:
                if service_key(req) > last:
                    break
                req.num_passed_over += 1
        return admitted

    def plan_preemption(self, waiting: WaitingQueue, running: Sequence[Req]) -> list[Req]:
        """Which running requests to retract so that the next in the queue can be admitted.

        For right after `admit`. Empty when it may take nobody's place, or when even all that it
        may take would not make room. Retracts nobody.
        """
        rules = self._limits.priorities
        if rules is None or not len(waiting):
            return []
        present = [req for req in running if not req.is_ending]
        preemptible = rules.preemptible(present, waiting.view()[0].urgency)
        if not preemptible:
            return []
        if self._no_plan is not None and self._no_plan.stands(len(waiting), self._room(present)):
            return []
        first = order_waiting(waiting.view(), self._limits.policy, self._match_len)[0]
        plan = self._plan_for(first, present, preemptible, len(running))
        self._no_plan = None if plan else _Refusal(len(waiting), self._room(present))
        return plan

    def _plan_for(
        self, req: Req, present: Sequence[Req], preemptible: Sequence[Req], num_running: int
    ) -> list[Req]:
        with RoomWithout(
            self._memory,
            req.tokens.view(),
            extra_key=req.extra_key,
            max_prefix=req.max_prefix(),
            priority=req.priority,
        ) as room:

            def fits(gone: Sequence[Req]) -> bool:
                if num_running - len(gone) >= self._limits.max_running_requests:
                    return False
                rest = [other for other in present if other not in gone]
                if not self._adapters.fits_beside(req, rest):
                    return False
                full = req.needs_reservation or any(other.needs_reservation for other in rest)
                promised = [self._promise(other, full) for other in rest]
                own = self._promise_behind(req, room.num_hit_pages, full)
                leases = [other.kv for other in gone if other.kv is not None]
                return room.can_hold(total_pages(promised, own), leases)

            return plan_preemption(preemptible, fits)

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
        promised = self._promises(present, full)
        candidate = self._promise(req, full, lease)
        if not self._memory.can_hold(total_pages([promised], candidate)):
            self._memory.close(lease, None, 0)
            return False
        self._memory.copy_rest(lease, tokens, req.max_prefix())
        req.admit(lease)
        return True

    def _promises(self, present: Sequence[Req], full: bool) -> tuple[int, ...]:
        """Pages per group that the present requests may still take.

        Within a turn it goes on from what was added up for the candidate before: else a burst of
        requests would cost its size squared. What is held of a window group depends on who else
        reads the pages, so there all are asked again.
        """
        bounds = self._limits.window_pages
        known, first = (0,) * len(bounds), 0
        last = self._promised if all(bound is None for bound in bounds) else None
        if last is not None and last.full == full and last.reqs == present[: len(last.reqs)]:
            known, first = last.pages, len(last.reqs)
        pages = total_pages([self._promise(req, full) for req in present[first:]], known)
        self._promised = _Promised(list(present), full, pages)
        return pages

    def _promise(self, req: Req, full: bool, lease: KVLease | None = None) -> tuple[int, ...]:
        limits = self._limits
        lease = lease or req.kv
        ends = held = (0,) * len(limits.window_pages)
        if lease is not None:
            ends = tuple(table.end_page for table in lease.tables)
            held = self._memory.pages_held(lease)
        return pages_promised(
            req,
            ends,
            held,
            limits.page_size,
            limits.window_pages,
            full=full,
            context_length=limits.context_length,
        )

    def _promise_behind(self, req: Req, num_hit_pages: int, full: bool) -> tuple[int, ...]:
        """What `req` would take behind a hit, as `_promise` would tell of its lease.

        In a window group the pages of the hit that nobody else reads would be its own and locked;
        as nobody has locked them yet they count as still to come.
        """
        limits = self._limits
        bounds = limits.window_pages
        return pages_promised(
            req,
            (num_hit_pages,) * len(bounds),
            tuple(num_hit_pages if bound is None else 0 for bound in bounds),
            limits.page_size,
            bounds,
            full=full,
            context_length=limits.context_length,
        )

    def _match_len(self, req: Req) -> int:
        return self._memory.match_len(req.tokens.view(0, req.known), req.extra_key)

"""The segments' state machine: plans what to map or unmap, and is the only caller of a backing.

Owns every segment's state and page counts and the one byte budget that all groups draw from. The
allocator asks it and moves page counts; allocation.py plans and applies; nothing is notified.
Plans are pure. `apply` hands the slow part to one background thread, and its outcome is taken
over (states flip) only in `poll` or `wait`, on the caller's thread. Never reads a clock: time
comes in through `note_time`, forward epochs through `note_launched` and `note_completed`. See
docs/kv_segments.md, Note [Mapping runs ahead] and Note [What the budget counts].
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from sglang.srt.errors import BackingError, InvariantError
from sglang.srt.mem_cache.kv_layout import GroupId, SegmentId, SegmentLayout
from sglang.srt.mem_cache.rank_agreement import RankAgreement, SingleRank
from sglang.srt.mem_cache.segment_backing.base import SegmentBacking
from sglang.srt.mem_cache.segment_jobs import GrowthPause, Job, JobResult, JobRunner
from sglang.srt.mem_cache.segment_state import (
    GrowthPlan,
    PlanReason,
    Segment,
    SegmentIdsByGroup,
    SegmentState,
    SegmentStats,
    SegmentTable,
    Ticket,
    TicketOutcome,
)

_MAPPED: Final = SegmentState.MAPPED
_RESERVED: Final = SegmentState.RESERVED


class SegmentManager:
    """Segments of all groups over one backing and one byte budget.

    `backing.reserve` must have been called with the same `layouts`. The constructor brings the
    pool into its idle state and returns when it stands: exactly `reserve_segments` empty segments
    per group mapped, or every segment when the backing is not elastic. `budget_bytes` bounds
    mapped segments over all groups (fixed bytes are not counted); `idle_release_s` is the time
    after which an empty segment above the reserve may be given back. `timer` only measures.
    `ranks` (None: one rank) agree on every outcome before a state flips.
    Raises ValueError when the budget can't hold the idle state, BackingError when the machine
    refuses it. Not thread safe: one thread calls it.
    """

    def __init__(
        self,
        layouts: Sequence[SegmentLayout],
        backing: SegmentBacking,
        *,
        budget_bytes: int,
        reserve_segments: int,
        idle_release_s: float,
        now: float = 0.0,
        timer: Callable[[], float] = time.perf_counter,
        ranks: RankAgreement | None = None,
    ) -> None:
        self.layouts = tuple(layouts)
        self.backing = backing
        self.reserve_segments = reserve_segments
        self.idle_release_s = idle_release_s
        self._budget_bytes = budget_bytes
        self._tables = tuple(SegmentTable(layout) for layout in self.layouts)
        self._now = now
        self._launched_epoch = 0
        self._completed_epoch = 0
        self._next_number = 0
        self._pause = GrowthPause(now)
        self._jobs: dict[int, Job] = {}
        self._runner = JobRunner(backing, self.layouts, timer, ranks or SingleRank())
        self._closed = False
        try:
            self._map_idle_state()
        except BaseException:
            self.close()
            raise

    # ---- what is there -------------------------------------------------------------------------

    @property
    def num_groups(self) -> int:
        return len(self.layouts)

    @property
    def budget_bytes(self) -> int:
        """Bound of mapped segments over all groups."""
        return self._budget_bytes

    @property
    def mapped_bytes(self) -> int:
        """Bytes of all segments that have memory (MAPPED and DRAINING)."""
        return sum(table.attached_bytes for table in self._tables)

    @property
    def leftover_bytes(self) -> int:
        """Bytes of RESERVED segments that this rank could not give back; 0 with one rank."""
        return self._runner.leftover_bytes

    @property
    def reserved_bytes(self) -> int:
        """Address space of all groups."""
        return sum(layout.reserved_bytes for layout in self.layouts)

    @property
    def fixed_bytes(self) -> int:
        """What backs the dump pages for good; not part of the budget."""
        return sum(layout.fixed_bytes for layout in self.layouts)

    @property
    def growth_paused(self) -> bool:
        """True while growth waits after a refusal; ends when a later time is noted."""
        return self._pause.is_on(self._now)

    def segments(self, group: GroupId) -> Mapping[SegmentId, Segment]:
        """Live view of the group's records; a segment that is not in it was never mapped."""
        return MappingProxyType(self._tables[group].segments)

    def generation(self, group: GroupId) -> int:
        """A number that changes whenever the group's set of MAPPED segments changes."""
        return self._tables[group].generation

    def free_pages(self, group: GroupId) -> int:
        """Free pages of MAPPED segments."""
        return self._tables[group].pages_free

    def pending_pages(self, group: GroupId) -> int:
        """Pages that maps under way will add."""
        table = self._tables[group]
        return table.count(SegmentState.MAPPING) * table.layout.pages_per_segment

    def capacity_pages(self, group: GroupId) -> int:
        """Most pages the group can hold while other groups keep the segments that have pages."""
        others = 0
        for table in self._tables:
            if table.layout.group != group:
                taken = table.count(SegmentState.MAPPED) - len(table.empty)
                others += taken * table.layout.segment_bytes
        layout = self.layouts[group]
        fitting = max(0, self._budget_bytes - others) // layout.segment_bytes
        return min(fitting, layout.max_segments - 1) * layout.pages_per_segment

    def growable_pages(self, group: GroupId) -> int:
        """Pages that `plan_growth` could add to this group alone now; 0 while growth is paused."""
        if self.growth_paused:
            return 0
        table = self._tables[group]
        new = max(0, self._room_bytes()) // table.layout.segment_bytes
        new = min(new, table.count(SegmentState.RESERVED))
        return (new + len(self._revivable(group))) * table.layout.pages_per_segment

    def stats(self) -> tuple[SegmentStats, ...]:
        """Figures per group."""
        return tuple(table.stats(self._budget_bytes) for table in self._tables)

    def pending(self) -> tuple[Ticket, ...]:
        """Tickets whose outcome was not taken yet, oldest first."""
        return tuple(job.ticket for job in self._jobs.values())

    # ---- what the callers note -----------------------------------------------------------------

    def note_time(self, now: float) -> None:
        """Set the time (monotonic seconds) that idle clocks and the growth pause go by."""
        self._now = max(self._now, now)

    def note_launched(self, epoch: int) -> None:
        """Forward `epoch` was launched: pages freed from now on may be read until it is done."""
        self._launched_epoch = max(self._launched_epoch, epoch)

    def note_completed(self, epoch: int) -> None:
        """Forward `epoch` and all before are done: unmaps that waited for them begin."""
        self._completed_epoch = max(self._completed_epoch, epoch)
        for job in self._jobs.values():
            self._start_if_ready(job)

    def add_pages(
        self, group: GroupId, segment: SegmentId, *, used: int = 0, cached: int = 0
    ) -> None:
        """Add (may be negative) to a MAPPED segment's used and cached pages; free follows.

        The only way counts change. Raises InvariantError when they would not add up.
        """
        self._tables[group].add_pages(
            segment, used=used, cached=cached, now=self._now, epoch=self._launched_epoch
        )

    def set_budget(self, budget_bytes: int) -> None:
        """Change the budget at once. Below what is mapped, nothing is taken away here: growth
        stops, and `stats` show mapped bytes above the budget until segments are released."""
        if budget_bytes < 0:
            raise ValueError("the KV budget can't be negative")
        self._budget_bytes = budget_bytes

    # ---- plans (pure) --------------------------------------------------------------------------

    def plan_growth(
        self, pages_wanted: Sequence[int], *, take_empty: bool = False
    ) -> GrowthPlan | None:
        """Segments that add at least `pages_wanted[g]` pages to each group (0: none needed).

        Wanted pages are beyond free and pending ones. DRAINING segments that can be revived come
        first, then the lowest RESERVED ids. `take_empty` lets empty segments of groups that want
        nothing be unmapped to make room. None: all or nothing does not fit the budget or the
        logical space, growth is paused after a refusal, or nothing is wanted.
        """
        if self.growth_paused:
            return None
        revive: list[tuple[SegmentId, ...]] = []
        fresh: list[tuple[SegmentId, ...]] = []
        for table, wanted in zip(self._tables, pages_wanted, strict=True):
            count = -(-max(0, wanted) // table.layout.pages_per_segment)
            again = self._revivable(table.layout.group)[:count]
            ids = table.lowest_reserved(count - len(again))
            if ids is None:
                return None
            revive.append(again)
            fresh.append(ids)
        missing = self._bytes_of(fresh) - self._room_bytes()
        unmap: SegmentIdsByGroup | None = self._nothing()
        if any(fresh) and missing > 0:
            unmap = self._empty_of_others(pages_wanted, missing) if take_empty else None
        if unmap is None or not (any(fresh) or any(revive)):
            return None
        return self._plan(PlanReason.GROWTH, map=fresh, unmap=unmap, revive=revive)

    def plan_reserve(self) -> GrowthPlan | None:
        """Segments that bring every group to `reserve_segments` empty or coming ones.

        None: nothing is missing, it does not fit the budget, or growth is paused.
        """
        if self.growth_paused or not self.backing.elastic:
            return None
        fresh: list[tuple[SegmentId, ...]] = []
        for table in self._tables:
            there = len(table.empty) + table.count(SegmentState.MAPPING)
            ids = table.lowest_reserved(max(0, self.reserve_segments - there))
            fresh.append(ids or ())
        if not any(fresh) or self._bytes_of(fresh) > self._room_bytes():
            return None
        return self._plan(PlanReason.RESERVE, map=fresh)

    def plan_shrink(self, now: float, *, keep: int | None = None) -> GrowthPlan | None:
        """Segments empty for `idle_release_s`, highest ids first, but `keep` (None: reserve)."""
        if not self.backing.elastic:
            return None
        unmap = []
        for table in self._tables:
            excess = max(0, len(table.empty) - (self.reserve_segments if keep is None else keep))
            above = heapq.nlargest(excess, table.empty)  # the reserve is the lowest ids
            since = table.empty
            unmap.append(tuple(s for s in above if now - since[s] >= self.idle_release_s))
        return self._plan(PlanReason.IDLE, unmap=unmap) if any(unmap) else None

    # ---- acting --------------------------------------------------------------------------------

    def apply(self, plan: GrowthPlan) -> Ticket:
        """Begin a plan and return at once; states say MAPPING and DRAINING from here on.

        Unmaps (and maps of the same plan) wait until the last forward that may read the segments
        was noted as completed. Raises InvariantError for a plan that is not the newest, or whose
        segments are in use.
        """
        if plan.number != self._next_number or self._closed:
            raise InvariantError(f"plan {plan.number} is stale: {self._next_number} is next")
        self._next_number += 1
        ticket = Ticket(plan.number)
        self._revive(plan.revive)
        for table, to_map, to_unmap in zip(self._tables, plan.map, plan.unmap, strict=True):
            for segment in to_unmap:
                table.move(segment, SegmentState.DRAINING, self._now)
            for segment in to_map:
                table.move(segment, SegmentState.MAPPING, self._now)
        job = Job(ticket, plan.map, list(plan.unmap))
        self._jobs[ticket.number] = job
        self._start_if_ready(job)
        return ticket

    def poll_all(self, tickets: Sequence[Ticket]) -> list[tuple[Ticket, TicketOutcome]]:
        """Those of the plans that have ended. Never blocks; ranks exchange one small message.

        The first call that sees an end flips the states: mapped pages are free from here on.
        """
        self._take([self._jobs[t.number] for t in tickets if t.number in self._jobs])
        return [(ticket, ticket.outcome) for ticket in tickets if ticket.outcome is not None]

    def poll(self, ticket: Ticket) -> TicketOutcome | None:
        """`poll_all` for one plan: its outcome, or None while it is under way."""
        self.poll_all((ticket,))
        return ticket.outcome

    def wait(self, ticket: Ticket) -> TicketOutcome:
        """As `poll`, but blocks until the background thread (of every rank) is done.

        Raises InvariantError when the plan still waits for a forward to complete: no thread
        would end this wait.
        """
        if job := self._jobs.get(ticket.number):
            if job.future is None:
                raise InvariantError(f"plan {ticket.number} waits for a forward to complete")
            self._take([job], block=True)
        if ticket.outcome is None:
            raise InvariantError(f"ticket {ticket.number} is not of this pool, or it was closed")
        return ticket.outcome

    def close(self) -> None:
        """End the thread after the work it has begun, then close the backing; idempotent."""
        if self._closed:
            return
        self._closed = True
        self._runner.close()
        self._jobs.clear()
        self.backing.close()

    def check(self) -> None:
        """Recount all totals and compare; raises InvariantError (for `audit`)."""
        for table in self._tables:
            table.check()
            group = table.layout.group
            mapping = sum(len(job.map[group]) for job in self._jobs.values())
            draining = sum(len(job.unmap[group]) for job in self._jobs.values())
            counted = (table.count(SegmentState.MAPPING), table.count(SegmentState.DRAINING))
            if counted != (mapping, draining):
                raise InvariantError(f"group {group}: {counted} under way, jobs say otherwise")

    def __repr__(self) -> str:
        groups = ", ".join(repr(stats) for stats in self.stats())
        return f"SegmentManager(mapped={self.mapped_bytes} of {self._budget_bytes}: {groups})"

    # ---- inside --------------------------------------------------------------------------------

    def _nothing(self) -> SegmentIdsByGroup:
        return ((),) * self.num_groups

    def _plan(self, reason: PlanReason, **ids: Sequence[tuple[SegmentId, ...]]) -> GrowthPlan:
        """The next plan; which of map, unmap and revive is left out names no segment."""
        some = {kind: tuple(ids.get(kind, self._nothing())) for kind in ("map", "unmap", "revive")}
        return GrowthPlan(number=self._next_number, reason=reason, **some)

    def _bytes_of(self, ids: Sequence[tuple[SegmentId, ...]]) -> int:
        pairs = zip(ids, self.layouts, strict=True)
        return sum(len(some) * layout.segment_bytes for some, layout in pairs)

    def _room_bytes(self) -> int:
        """Budget left for new segments; negative above the budget."""
        return self._budget_bytes - sum(table.committed_bytes for table in self._tables)

    def _revivable(self, group: GroupId) -> tuple[SegmentId, ...]:
        """DRAINING segments whose unmap has not begun, ascending.

        No map waits for one of them: a plan takes only segments that nothing reads any more.
        """
        waiting = (job for job in self._jobs.values() if job.future is None)
        return tuple(sorted(segment for job in waiting for segment in job.unmap[group]))

    def _empty_of_others(self, wanted: Sequence[int], missing: int) -> SegmentIdsByGroup | None:
        """Empty segments, highest ids first, of groups that want nothing, worth `missing` bytes.

        Only those that no forward still reads, so that the plan can be waited for. None: too few.
        """
        unmap = list(self._nothing())
        for table in self._tables:
            group = table.layout.group
            if wanted[group] > 0 or missing <= 0 or not self.backing.elastic:
                continue
            records = table.segments
            ready = (s for s in table.empty if records[s].last_use_epoch <= self._completed_epoch)
            count = -(-missing // table.layout.segment_bytes)
            unmap[group] = tuple(heapq.nlargest(count, ready))
            missing -= len(unmap[group]) * table.layout.segment_bytes
        return tuple(unmap) if missing <= 0 else None

    def _revive(self, revive: SegmentIdsByGroup) -> None:
        """Take DRAINING segments out of the jobs that wait to unmap them."""
        for table, segments in zip(self._tables, revive, strict=True):
            group = table.layout.group
            if not set(segments) <= set(self._revivable(group)):
                raise InvariantError(f"group {group}: {segments} can't be revived")
            for job in self._jobs.values():
                if job.future is None:
                    job.unmap[group] = tuple(s for s in job.unmap[group] if s not in segments)
            for segment in segments:
                table.move(segment, SegmentState.MAPPED, self._now)
        for job in self._jobs.values():
            self._start_if_ready(job)  # a job left with nothing to do ends

    def _start_if_ready(self, job: Job) -> None:
        if job.future is not None:
            return
        for table, segments in zip(self._tables, job.unmap, strict=True):
            for segment in segments:
                if table.segments[segment].last_use_epoch > self._completed_epoch:
                    return
        self._runner.start(job)
        job.ticket.begun = True

    def _take(self, jobs: list[Job], *, block: bool = False) -> None:
        for job, result in zip(jobs, self._runner.results(jobs, block=block), strict=True):
            if result is not None:
                self._settle(job, result)

    def _settle(self, job: Job, result: JobResult) -> None:
        """Flip the states to what happened and free the job."""
        del self._jobs[job.ticket.number]
        for g, table in enumerate(self._tables):
            for segment in job.unmap[g]:
                kept = segment not in result.unmapped[g]
                table.move(segment, _MAPPED if kept else _RESERVED, self._now)
            for segment in job.map[g]:
                there = segment in result.mapped[g]
                table.move(segment, _MAPPED if there else _RESERVED, self._now)
                table.refused_count += not there
            table.map_count += len(result.mapped[g])
            table.unmap_count += len(result.unmapped[g])
            table.map_ms += result.map_ms[g]
            table.unmap_ms += result.unmap_ms[g]
        if result.refused is not None and any(job.map):
            self._pause.lengthen(self._now)
        elif any(result.mapped) or any(result.unmapped):
            self._pause.end(self._now)
        job.ticket.outcome = TicketOutcome(
            number=job.ticket.number,
            refused=result.refused,
            mapped=tuple(result.mapped),
            unmapped=tuple(result.unmapped),
        )

    def _map_idle_state(self) -> None:
        """Map the reserve (or everything, when memory is not elastic) before anyone allocates."""
        wanted = []
        for table in self._tables:
            usable = table.layout.max_segments - 1
            count = min(self.reserve_segments, usable) if self.backing.elastic else usable
            wanted.append(table.lowest_reserved(count) or ())
        if self._bytes_of(wanted) > self._budget_bytes:
            raise ValueError(
                f"a KV budget of {self._budget_bytes:,} bytes can't hold the "
                f"{self._bytes_of(wanted):,} bytes of segments that are mapped from the start"
            )
        if any(wanted):
            outcome = self.wait(self.apply(self._plan(PlanReason.START, map=wanted)))
            if outcome.refused is not None:
                raise BackingError(outcome.refused)

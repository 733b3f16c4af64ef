"""The segments' state machine: plans what to map or unmap, and is the only caller of a backing.

Owns every segment's state and page counts and the one byte budget that all groups draw from. The
allocator asks it and moves page counts; allocation.py plans and applies; nothing is notified.
Plans are pure. `apply` hands the slow part to one background thread, and its outcome is taken
over (states flip) only in `poll` or `wait`, on the caller's thread. Never reads a clock: time
comes in through `note_time`, forward epochs through `note_launched` and `note_completed`. See
docs/kv_segments.md, Note [Mapping runs ahead] and Note [What the budget counts].
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from sglang.srt.errors import BackingError, InvariantError
from sglang.srt.mem_cache import segment_plans
from sglang.srt.mem_cache.kv_layout import (
    GroupId,
    SegmentId,
    SegmentLayout,
)
from sglang.srt.mem_cache.rank_agreement import RankAgreement, SingleRank
from sglang.srt.mem_cache.segment_backing.base import SegmentBacking, TieredBacking
from sglang.srt.mem_cache.segment_budget import TierBudgets
from sglang.srt.mem_cache.segment_cuts import (
    tiers_bytes,
)
from sglang.srt.mem_cache.segment_jobs import Job, JobResult, JobRunner
from sglang.srt.mem_cache.segment_plans import Moment
from sglang.srt.mem_cache.segment_state import (
    GrowthPlan,
    Segment,
    SegmentIdsByGroup,
    SegmentState,
    SegmentStats,
    SegmentTable,
    Ticket,
    TicketOutcome,
    Tier,
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
    `ranks` (None: one rank) agree on every outcome before a state flips. `lower_budget_bytes`
    bounds segments on the tier below (0: there is none).
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
        lower_budget_bytes: int = 0,
    ) -> None:
        if lower_budget_bytes and not isinstance(backing, TieredBacking):
            raise ValueError(f"the {backing.name} backing has no tier below memory")
        self.layouts = tuple(layouts)
        self.backing = backing
        self.reserve_segments = reserve_segments
        self.idle_release_s = idle_release_s
        self._tables = tuple(SegmentTable(layout) for layout in self.layouts)
        self._budgets = TierBudgets(self._tables, budget_bytes, lower_budget_bytes, now)
        self._now = now
        self._launched_epoch = 0
        self._completed_epoch = 0
        self._next_number = 0
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
        return self._budgets.bound_bytes[Tier.DEVICE]

    @property
    def lower_budget_bytes(self) -> int:
        """Bound of segments on the lower tier over all groups; 0: there is none."""
        return self._budgets.bound_bytes[Tier.LOWER]

    @property
    def lower_tier(self) -> str | None:
        """What lies below memory, "disk" or "host"; None: nothing does."""
        if self.lower_budget_bytes and isinstance(self.backing, TieredBacking):
            return self.backing.lower_tier
        return None

    @property
    def bound_bytes(self) -> int:
        """Bound of all segments, in memory and below."""
        return tiers_bytes(self.layouts, self.budget_bytes, self.lower_budget_bytes)

    @property
    def reach_bytes(self) -> int:
        """`bound_bytes`, but where there are two tiers and one refuses, no more than it has."""
        return self._budgets.reach_bytes(self._now)

    @property
    def can_grow(self) -> bool:
        """Whether a tier takes more segments: memory is elastic and does not wait after a refusal,
        or the lower tier does not."""
        return self.backing.elastic and self._budgets.can_grow(self._now)

    @property
    def mapped_bytes(self) -> int:
        """Bytes of memory under segments (MAPPED and DRAINING)."""
        return sum(table.attached_bytes for table in self._tables)

    @property
    def staying_bytes(self) -> int:
        """Bytes of memory under segments that are not about to be unmapped, or coming."""
        return sum(table.staying_bytes for table in self._tables)

    @property
    def committed_bytes(self) -> int:
        """Bytes of memory of all segments that have some or are being given some."""
        return self._budgets.used_bytes(Tier.DEVICE)

    @property
    def lower_bytes(self) -> int:
        """Bytes of all segments that are on the lower tier or about to be."""
        return self._budgets.used_bytes(Tier.LOWER)

    @property
    def leftover_bytes(self) -> int:
        """Bytes of memory that this rank has beyond what the ranks agreed on; 0 with one rank."""
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
        return self._is_paused(Tier.DEVICE)

    @property
    def launched_epoch(self) -> int:
        """The newest forward that was launched."""
        return self._launched_epoch

    def segments(self, group: GroupId) -> Mapping[SegmentId, Segment]:
        """Live view of the group's records; a segment that is not in it was never mapped."""
        return MappingProxyType(self._tables[group].segments)

    def generation(self, group: GroupId) -> int:
        """A number that changes whenever the group's set of MAPPED segments changes."""
        return self._tables[group].generation

    def free_pages(self, group: GroupId) -> int:
        """Free pages of MAPPED segments."""
        return self._tables[group].pages_free

    def has_empty(self, group: GroupId) -> bool:
        """Whether a MAPPED segment in memory has no used or cached page."""
        table = self._tables[group]
        return any(table.segments[segment].tier is Tier.DEVICE for segment in table.empty)

    def pending_pages(self, group: GroupId) -> int:
        """Pages that maps under way will add."""
        table = self._tables[group]
        return table.count(SegmentState.MAPPING) * table.layout.pages_per_segment

    def growable_pages(self, group: GroupId, tier: Tier = Tier.DEVICE) -> int:
        """Pages that `plan_growth` could add to this group alone now; 0 while growth is paused."""
        if self._is_paused(tier):
            return 0
        table = self._tables[group]
        new = max(0, self._budgets.room_bytes(tier)) // table.layout.segment_bytes
        new = min(new, table.count(SegmentState.RESERVED))
        return (new + len(self._revivable(group))) * table.layout.pages_per_segment

    def room_bytes(self, tier: Tier) -> int:
        """What a tier's budget leaves for new segments; negative above it."""
        return self._budgets.room_bytes(tier)

    def bytes_short(self, pages_wanted: Sequence[int]) -> int:
        """Bytes of memory that segments for so many more pages need beyond the budget's room."""
        pairs = zip(pages_wanted, self.layouts, strict=True)
        wanted = sum(-(-n // one.pages_per_segment) * one.segment_bytes for n, one in pairs)
        return wanted - self._budgets.room_bytes(Tier.DEVICE)

    def stats(self) -> tuple[SegmentStats, ...]:
        """Figures per group."""
        return tuple(table.stats(self.budget_bytes) for table in self._tables)

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
        self._budgets.bound_bytes[Tier.DEVICE] = budget_bytes

    # ---- plans (pure) --------------------------------------------------------------------------

    def plan_growth(
        self,
        pages_wanted: Sequence[int],
        *,
        take_empty: bool = False,
        tier: Tier = Tier.DEVICE,
    ) -> GrowthPlan | None:
        """Segments that add at least `pages_wanted[g]` pages to each group (0: none needed).

        Wanted pages are beyond free and pending ones. DRAINING segments that can be revived come
        first, then the lowest RESERVED ids, which get their bytes on `tier`. `take_empty` lets
        empty segments there of groups that want nothing be unmapped to make room. None: all or
        nothing does not fit the budget (the lower tier's, for LOWER) or the logical space, growth
        there is paused after a refusal, or nothing is wanted.
        """
        if self._is_paused(tier):
            return None
        return segment_plans.plan_growth(
            self._tables, self._moment(), pages_wanted, take_empty=take_empty, tier=tier
        )

    def plan_demotion(
        self, missing_bytes: int, coldest: Sequence[tuple[GroupId, SegmentId]]
    ) -> GrowthPlan | None:
        """Segments of `coldest`, in this order, that go to the lower tier: memory gets room.

        Worth at least `missing_bytes` in all, or as many as there is room for below. Nobody may
        write to them until the plan has ended. None: there is nothing to move, or no room.
        """
        if self._is_paused(Tier.LOWER):
            return None
        return segment_plans.plan_demotion(self._tables, self._moment(), missing_bytes, coldest)

    def plan_promotion(
        self, most_bytes: int, wanted: Sequence[tuple[GroupId, SegmentId]]
    ) -> GrowthPlan | None:
        """Segments of `wanted`, in this order, that come back from the lower tier.

        Worth at most `most_bytes`, and no more than the budget has room for. Nobody may write to
        them until the plan has ended. None: there is nothing to move, no room, or memory pauses.
        """
        if self.growth_paused:
            return None
        return segment_plans.plan_promotion(self._tables, self._moment(), most_bytes, wanted)

    def plan_reserve(self) -> GrowthPlan | None:
        """Segments that bring every group to `reserve_segments` empty or coming ones.

        None: nothing is missing, it does not fit the budget, or growth is paused.
        """
        if self.growth_paused or not self.backing.elastic:
            return None
        return segment_plans.plan_reserve(self._tables, self._moment(), self.reserve_segments)

    def plan_shrink(self, now: float, *, keep: int | None = None) -> GrowthPlan | None:
        """Segments empty for `idle_release_s`, highest ids first, but `keep` (None: reserve).

        Empty ones on the lower tier go at once.
        """
        if not self.backing.elastic:
            return None
        keep = self.reserve_segments if keep is None else keep
        return segment_plans.plan_shrink(
            self._tables, self._moment(), now, idle_release_s=self.idle_release_s, keep=keep
        )

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
                table.move(segment, SegmentState.MAPPING, self._now, plan.tier)
        job = Job(ticket, plan.map, list(plan.unmap), plan.demote, plan.promote, plan.tier)
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
        return f"SegmentManager(mapped={self.mapped_bytes} of {self.budget_bytes}: {groups})"

    # ---- inside --------------------------------------------------------------------------------

    def _moment(self) -> Moment:
        """What plans go by now."""
        return Moment(
            number=self._next_number,
            room_bytes=self._budgets.room_bytes(Tier.DEVICE),
            lower_room_bytes=self._budgets.room_bytes(Tier.LOWER),
            revivable=tuple(self._revivable(layout.group) for layout in self.layouts),
            completed_epoch=self._completed_epoch,
            elastic=self.backing.elastic,
        )

    def _is_paused(self, tier: Tier) -> bool:
        return self._budgets.pauses[tier].is_on(self._now)

    def _revivable(self, group: GroupId) -> tuple[SegmentId, ...]:
        """DRAINING segments whose unmap has not begun, ascending.

        No map waits for one of them: a plan takes only segments that nothing reads any more.
        """
        waiting = (job for job in self._jobs.values() if job.future is None)
        return tuple(sorted(segment for job in waiting for segment in job.unmap[group]))

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
        below = tuple(
            tuple(s for s in segments if table.segments[s].tier is Tier.LOWER)
            for table, segments in zip(self._tables, job.unmap, strict=True)
        )
        self._runner.start(job, below)
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
            for segment in result.demoted[g]:
                table.change_tier(segment, Tier.LOWER)
            for segment in result.promoted[g]:
                table.change_tier(segment, Tier.DEVICE)
            table.note_moves(
                (len(result.demoted[g]), result.demote_ms[g]),
                (len(result.promoted[g]), result.promote_ms[g]),
            )
            table.map_count += len(result.mapped[g])
            table.unmap_count += len(result.unmapped[g])
            table.map_ms += result.map_ms[g]
            table.unmap_ms += result.unmap_ms[g]
        wanted_memory = any(job.map) or any(job.promote)
        if result.refused is not None and (result.lower_refused or wanted_memory):
            tier = Tier.LOWER if result.lower_refused else Tier.DEVICE
            self._budgets.pauses[tier].lengthen(self._now)
        elif any(result.mapped) or any(result.unmapped):
            self._budgets.note_given(self._now)
        job.ticket.outcome = TicketOutcome(
            number=job.ticket.number,
            refused=result.refused,
            mapped=tuple(result.mapped),
            unmapped=tuple(result.unmapped),
            demoted=tuple(result.demoted),
            promoted=tuple(result.promoted),
        )

    def _map_idle_state(self) -> None:
        """Map the reserve (or everything, when memory is not elastic) before anyone allocates."""
        usable = [layout.max_segments - 1 for layout in self.layouts]
        if self.backing.elastic:
            usable = [min(self.reserve_segments, count) for count in usable]
        plan = segment_plans.plan_start(self._tables, self._moment(), usable)
        wanted_bytes = segment_plans.bytes_of(self._tables, plan.map)
        if wanted_bytes > self.budget_bytes:
            raise ValueError(
                f"a KV budget of {self.budget_bytes:,} bytes can't hold the "
                f"{wanted_bytes:,} bytes of segments that are mapped from the start"
            )
        if any(plan.map):
            outcome = self.wait(self.apply(plan))
            if outcome.refused is not None:
                raise BackingError(outcome.refused)

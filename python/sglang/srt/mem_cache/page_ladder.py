"""The scarcity ladder: from "not enough free pages" to enough, or to a clean no.

`KVMemory` in `allocation.py` asks it for pages in numbers, never for pages themselves. It is the
only caller of the segment manager's plans and keeps the allocators in step with the segments that
come and go. See docs/kv_segments.md, Note [The ladder].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from sglang.srt.mem_cache.allocator import PageAllocator
from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache
from sglang.srt.mem_cache.kv_layout import GroupId, SegmentId, SegmentLayout
from sglang.srt.mem_cache.segment_manager import SegmentManager
from sglang.srt.mem_cache.segment_state import (
    GrowthPlan,
    SegmentIdsByGroup,
    SegmentState,
    Ticket,
    TicketOutcome,
    Tier,
)

Coldest = Callable[[], Sequence[tuple[GroupId, SegmentId]]]


class PageLadder:
    """Free pages, then growth below the budget, then the lower tier, then eviction, then another
    group's segments.

    `coldest` names the segments that may go to the lower tier, the one to move first at the front.

    Invariant: an allocator knows exactly the MAPPED segments of its group; a segment that drains
    was taken from it before, one that was mapped or revived is given to it at once.
    """

    def __init__(
        self,
        manager: SegmentManager,
        allocators: tuple[PageAllocator, ...],
        cache: BasePrefixCache,
        coldest: Coldest,
    ) -> None:
        self._manager = manager
        self._allocators = allocators
        self._cache = cache
        self._coldest = coldest
        self._maps: dict[int, Ticket] = {}  # tickets that bring memory, oldest first
        self._unmaps: dict[int, Ticket] = {}  # tickets that only give memory back
        self._leaving: dict[int, list[set[int]]] = {}  # ticket -> segments under unmap, by group
        for allocator in allocators:
            records = manager.segments(allocator.layout.group).values()
            mapped = [record.id for record in records if record.state is SegmentState.MAPPED]
            allocator.add_segments(mapped)

    # ---- numbers ----------------------------------------------------------------------------

    def free_pages(self) -> tuple[int, ...]:
        """Pages that can be taken at once, by group."""
        return tuple(allocator.num_free for allocator in self._allocators)

    def owned_pages(self) -> tuple[int, ...]:
        """Pages that neither growth nor eviction can give: used, or cached under a lock."""
        locked = self._cache.num_locked_pages
        return tuple(allocator.index.num_used + locked for allocator in self._allocators)

    def headroom_pages(self) -> tuple[int, ...]:
        """Pages, by group, that could still be had for every group at once.

        The pages of both tiers' bounds less those in `owned_pages`; while growth is paused
        after a refusal, no more than what is mapped.
        """
        return self._headroom([0] * len(self._allocators))

    def _headroom(self, gone: Sequence[int]) -> tuple[int, ...]:
        owned = [pages - less for pages, less in zip(self.owned_pages(), gone, strict=True)]
        joint = joint_pages(self._manager.layouts, self._manager.reach_bytes, owned)
        return tuple(min(joint, self._without_growth(g) + less) for g, less in enumerate(gone))

    def can_hold(self, need: Sequence[int], gone: Sequence[int] | None = None) -> bool:
        """Whether the numbers allow `need[g]` more pages in every group at once.

        `gone[g]` of those in `owned_pages` are counted as if their owners had left (None: none).
        """
        headroom = self._headroom(gone or [0] * len(self._allocators))
        return all(wanted <= room for wanted, room in zip(need, headroom, strict=True))

    def capacity_pages(self) -> int:
        """Pages of the longest sequence that an empty pool can hold."""
        none = [0] * len(self._allocators)
        return joint_pages(self._manager.layouts, self._manager.bound_bytes, none)

    def _without_growth(self, group: int) -> int:
        allocator = self._allocators[group]
        if self._manager.can_grow:
            return allocator.layout.max_segments * allocator.layout.pages_per_segment
        pending = self._manager.pending_pages(allocator.layout.group)
        return allocator.num_free + pending + self._cache.num_evictable_pages

    # ---- the ladder -------------------------------------------------------------------------

    def ensure(self, need: Sequence[int]) -> bool:
        """Make `need[g]` pages free in every group, or return False.

        A request that the numbers rule out evicts and maps nothing. Blocks while memory is mapped.
        """
        if self._enough(need):
            return True
        if not self.can_hold(need):
            return False
        self._await_maps(need)
        return (
            self._enough(need)
            or self._grow(need)
            or (self._await_unmaps() and self._grow(need))
            or self._use_lower(need)
            or self._evict(need)
            or self._grow_over_empty(need)
        )

    def _enough(self, need: Sequence[int]) -> bool:
        for pages, allocator in zip(need, self._allocators, strict=True):
            if pages > allocator.num_free:
                return False
        return True

    def _missing(self, need: Sequence[int]) -> list[int]:
        return [max(0, n - free) for n, free in zip(need, self.free_pages(), strict=True)]

    def _await_maps(self, need: Sequence[int]) -> None:
        for ticket in list(self._maps.values()):
            if self._enough(need):
                return
            self._settle(ticket, self._manager.wait(ticket))

    def _await_unmaps(self) -> bool:
        """Wait for memory that is being given back; False when none is.

        Until then it counts against the budget, although nothing holds it.
        """
        leaving = [ticket for ticket in self._unmaps.values() if ticket.begun]
        for ticket in leaving:
            self._settle(ticket, self._manager.wait(ticket))
        return bool(leaving)

    def _use_lower(self, need: Sequence[int], *, take_empty: bool = False) -> bool:
        """Move what is cold below and grow in its place; what is still missing begins there."""
        if not self._manager.lower_budget_bytes:
            return False
        short = self._manager.bytes_short(self._missing(need))
        if short > 0 and self.demote(short, self._coldest()) and self._grow(need):
            return True
        return self._grow(need, take_empty=take_empty, tier=Tier.LOWER)

    def _grow_over_empty(self, need: Sequence[int]) -> bool:
        """Grow where other groups have empty segments, in memory or else below."""
        return self._grow(need, take_empty=True) or self._use_lower(need, take_empty=True)

    def demote(self, num_bytes: int, coldest: Sequence[tuple[GroupId, SegmentId]]) -> int:
        """Move segments of `coldest`, in this order, to the lower tier; returns how many went.

        Worth at least `num_bytes`, as far as there are any and there is room below. Blocks; nobody
        may write to them meanwhile.
        """
        plan = self._manager.plan_demotion(num_bytes, coldest)
        return 0 if plan is None else _count(self._carry_out(plan).demoted)

    def promote(self, most_bytes: int, wanted: Sequence[tuple[GroupId, SegmentId]]) -> int:
        """Bring segments of `wanted`, in this order, back from the lower tier; how many came.

        Worth at most `most_bytes`, as far as memory has room. Blocks; nobody may write to them
        meanwhile.
        """
        plan = self._manager.plan_promotion(most_bytes, wanted)
        return 0 if plan is None else _count(self._carry_out(plan).promoted)

    def _carry_out(self, plan: GrowthPlan) -> TicketOutcome:
        ticket = self._begin(plan)
        outcome = self._manager.wait(ticket)
        self._settle(ticket, outcome)
        return outcome

    def _grow(
        self, need: Sequence[int], *, take_empty: bool = False, tier: Tier = Tier.DEVICE
    ) -> bool:
        plan = self._plan_growth(self._missing(need), take_empty=take_empty, tier=tier)
        if plan is not None:
            self._carry_out(plan)
        return self._enough(need)

    def _plan_growth(
        self, missing: list[int], *, take_empty: bool = False, tier: Tier = Tier.DEVICE
    ) -> GrowthPlan | None:
        """All that is missing when it fits the tier's budget, else as much of it as does."""
        plan = self._manager.plan_growth(missing, take_empty=take_empty, tier=tier)
        if plan is not None or not any(missing):
            return plan
        growable = [self._manager.growable_pages(a.layout.group, tier) for a in self._allocators]
        clipped = [min(pair) for pair in zip(missing, growable, strict=True)]
        plan = self._manager.plan_growth(clipped, tier=tier) if clipped != missing else None
        if plan is None and self._manager.lower_budget_bytes:
            # what one tier can't hold of several groups is divided between both
            plan = self._manager.plan_growth(self._joint_clip(missing, tier), tier=tier)
        return plan

    def _joint_clip(self, missing: Sequence[int], tier: Tier) -> list[int]:
        """As much of what is missing as a tier has room for, segment by segment, groups in turn."""
        room = self._manager.room_bytes(tier)
        pages = [0] * len(missing)
        grown = True
        while grown:
            grown = False
            for g, layout in enumerate(self._manager.layouts):
                if pages[g] < missing[g] and layout.segment_bytes <= room:
                    pages[g] = min(missing[g], pages[g] + layout.pages_per_segment)
                    room -= layout.segment_bytes
                    grown = True
        return pages

    def _evict(self, need: Sequence[int]) -> bool:
        self._cache.evict(max(self._missing(need)))
        return self._enough(need)

    # ---- segments come and go ---------------------------------------------------------------

    def settle_finished(self) -> None:
        """Take over what the background thread finished; never blocks."""
        under_way = (*self._maps.values(), *self._unmaps.values())
        for ticket, outcome in self._manager.poll_all(under_way):
            self._settle(ticket, outcome)

    def look_ahead(self, expected: Sequence[int]) -> Ticket | None:
        """Begin to map what the next step will want beyond free pages; evicts nothing.

        At most one such growth is under way. Also refills the reserve of empty segments.
        """
        if self._maps:
            return None
        plan = self._plan_growth(self._missing(expected)) if any(expected) else None
        plan = plan or self._manager.plan_reserve()
        return self._begin(plan) if plan is not None else None

    def shrink(
        self, now: float, expected: Sequence[int], *, most_bytes: int | None = None, keep: int = 0
    ) -> Ticket | None:
        """Begin to unmap segments that are empty and idle, but none that `expected` pages need.

        Of each group the reserve stays, and at least `keep`. No more than cover `most_bytes` go
        (None: no bound).
        """
        plan = self._manager.plan_shrink(now, keep=max(keep, self._manager.reserve_segments))
        if plan is None:
            return None
        unmap = []
        for g, (allocator, segments) in enumerate(zip(self._allocators, plan.unmap, strict=True)):
            per_segment = allocator.layout.pages_per_segment
            count = max(0, allocator.num_free - (expected[g] if expected else 0)) // per_segment
            if most_bytes is not None:
                size = allocator.layout.segment_bytes
                count = min(count, max(0, -(-most_bytes // size)))
                most_bytes -= len(segments[:count]) * size
            unmap.append(segments[:count])
        return self._begin(replace(plan, unmap=tuple(unmap))) if any(unmap) else None

    def release_empty(self, num_bytes: int | None = None) -> Ticket | None:
        """Begin to unmap empty segments now, whatever their age.

        Worth at least `num_bytes` of memory, the reserve included, as far as there are any; None:
        all above the reserve. Those on the lower tier all go.
        """
        self.settle_finished()
        plan = self._manager.plan_shrink(math.inf, keep=None if num_bytes is None else 0)
        if plan is None:
            return None
        unmap = []
        for layout, segments in zip(self._manager.layouts, plan.unmap, strict=True):
            if num_bytes is not None:
                records = self._manager.segments(layout.group)
                held = [s for s in segments if records[s].tier is Tier.DEVICE]
                held = held[: max(0, -(-num_bytes // layout.segment_bytes))]
                num_bytes -= len(held) * layout.segment_bytes
                segments = (*held, *(s for s in segments if records[s].tier is Tier.LOWER))
            unmap.append(segments)
        return self._begin(replace(plan, unmap=tuple(unmap)))

    def _begin(self, plan: GrowthPlan) -> Ticket:
        for allocator, segments in zip(self._allocators, plan.unmap, strict=True):
            allocator.remove_segments(segments)
        ticket = self._manager.apply(plan)
        for g, (allocator, segments) in enumerate(zip(self._allocators, plan.revive, strict=True)):
            allocator.add_segments(segments)
            for leaving in self._leaving.values():
                leaving[g].difference_update(segments)
        tickets = self._maps if any(plan.map) or any(plan.revive) else self._unmaps
        tickets[ticket.number] = ticket
        self._leaving[ticket.number] = [set(segments) for segments in plan.unmap]
        return ticket

    def _settle(self, ticket: Ticket, outcome: TicketOutcome) -> None:
        self._maps.pop(ticket.number, None)
        self._unmaps.pop(ticket.number, None)
        leaving = self._leaving.pop(ticket.number)
        for g, allocator in enumerate(self._allocators):
            allocator.add_segments(outcome.mapped[g])
            stayed = leaving[g].difference(outcome.unmapped[g])
            allocator.add_segments(sorted(stayed))

    def __repr__(self) -> str:
        return f"PageLadder(free={self.free_pages()}, maps={len(self._maps)})"


def _count(moved: SegmentIdsByGroup) -> int:
    return sum(len(segments) for segments in moved)


def joint_pages(layouts: Sequence[SegmentLayout], budget_bytes: int, owned: Sequence[int]) -> int:
    """Most pages that every group can have at once beside its `owned` ones, within one budget.

    Whole segments are counted; 0 when the budget holds not even `owned`.
    """
    low, high = 0, max(layout.max_segments * layout.pages_per_segment for layout in layouts)
    while low < high:
        middle = (low + high + 1) // 2
        total = 0
        for layout, pages in zip(layouts, owned, strict=True):
            segments = -(-(pages + middle) // layout.pages_per_segment)
            fits = segments < layout.max_segments
            total += segments * layout.segment_bytes if fits else budget_bytes + 1
        low, high = (middle, high) if total <= budget_bytes else (low, middle - 1)
    return low

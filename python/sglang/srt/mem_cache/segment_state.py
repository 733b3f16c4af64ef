"""The states of segments: one table of legal moves, one record per segment, totals per group.

Owns `Segment` records, plans and tickets as values, and `SegmentTable`, which keeps a group's
records and running totals in step. Written only by segment_manager (and through it by the
allocator, who moves page counts); decides nothing and calls no backing. See docs/kv_segments.md,
Note [Slots, pages, segments].
"""

from __future__ import annotations

import enum
import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from sglang.srt.errors import InvariantError
from sglang.srt.mem_cache.kv_layout import GroupId, SegmentId, SegmentLayout


class SegmentState(enum.Enum):
    """RESERVED has no memory; MAPPING is being given some; MAPPED may be allocated from;
    DRAINING has memory, no pages, and waits until nothing can read it any more."""

    RESERVED = "reserved"
    MAPPING = "mapping"
    MAPPED = "mapped"
    DRAINING = "draining"


LEGAL_MOVES: Final = MappingProxyType(
    {
        SegmentState.RESERVED: frozenset({SegmentState.MAPPING}),
        # back to RESERVED: the machine refused
        SegmentState.MAPPING: frozenset({SegmentState.MAPPED, SegmentState.RESERVED}),
        SegmentState.MAPPED: frozenset({SegmentState.DRAINING}),
        # back to MAPPED: needed again before the unmap began, or the machine refused the unmap
        SegmentState.DRAINING: frozenset({SegmentState.RESERVED, SegmentState.MAPPED}),
    }
)

_HOLDING: Final = (SegmentState.MAPPED, SegmentState.MAPPING, SegmentState.DRAINING)

SegmentIdsByGroup = tuple[tuple[SegmentId, ...], ...]


class Tier(enum.Enum):
    """Where a segment's bytes are: in the device's memory, or in the tier below it, which is the
    host's memory or the disk as the backing has it. Its state is the same whichever it is: both can
    be read and written, so pages on either may be taken, shared and given back."""

    DEVICE = "device"
    LOWER = "lower"


class PlanReason(enum.Enum):
    """Why a plan was made; for logs and stats."""

    START = "start"
    GROWTH = "growth"
    DEMOTION = "demotion"
    PROMOTION = "promotion"
    RESERVE = "reserve"
    IDLE = "idle"


@dataclass(frozen=True, slots=True)
class GrowthPlan:
    """What `apply` shall do: tuples of segment ids, indexed by group.

    `revive` are DRAINING segments whose unmap has not begun: they become MAPPED at once. `unmap`
    is done first, then `demote` (MAPPED segments that go to the lower tier), then `promote` (those
    that come back), then `map`, which gives memory on `tier`. `number` is the manager's count of
    applied plans: a plan is good only until the next one is applied.
    """

    number: int
    reason: PlanReason
    map: SegmentIdsByGroup
    unmap: SegmentIdsByGroup
    revive: SegmentIdsByGroup
    demote: SegmentIdsByGroup
    promote: SegmentIdsByGroup
    tier: Tier = Tier.DEVICE


@dataclass(frozen=True, slots=True)
class TicketOutcome:
    """What came of a plan. `refused` is the machine's reason, None when all was done.

    `mapped`, `unmapped`, `demoted` and `promoted` are what really happened, by group; after a
    refusal `mapped` is empty but for memory that could not even be given back.
    """

    number: int
    refused: str | None
    mapped: SegmentIdsByGroup
    unmapped: SegmentIdsByGroup
    demoted: SegmentIdsByGroup
    promoted: SegmentIdsByGroup

    @property
    def succeeded(self) -> bool:
        return self.refused is None


@dataclass(slots=True)
class Ticket:
    """A plan under way. `outcome` is set by the manager's poll or wait and then stays.

    `begun`: it waits for no forward any more, so it can be waited for.
    """

    number: int
    outcome: TicketOutcome | None = None
    begun: bool = False


class Segment:
    """One segment's state and page counts; made when it is first mapped.

    MAPPED or DRAINING: free + used + cached pages = pages_per_segment. RESERVED or MAPPING: all
    0. `last_use_epoch` is the newest forward that may still read it. `tier` is written by the
    table alone, and DEVICE while RESERVED.
    """

    __slots__ = (
        "_state",
        "id",
        "last_use_epoch",
        "pages_cached",
        "pages_free",
        "pages_used",
        "tier",
    )

    def __init__(self, segment_id: SegmentId) -> None:
        self.id = segment_id
        self._state = SegmentState.RESERVED
        self.tier = Tier.DEVICE
        self.pages_free = 0
        self.pages_used = 0
        self.pages_cached = 0
        self.last_use_epoch = 0

    @property
    def state(self) -> SegmentState:
        return self._state

    @property
    def is_empty(self) -> bool:
        """No page is used or cached (also true without memory)."""
        return self.pages_used == 0 and self.pages_cached == 0

    def move_to(self, state: SegmentState) -> None:
        """The only setter of a state. Raises InvariantError for a move that is not in the table."""
        if state not in LEGAL_MOVES[self._state]:
            raise InvariantError(f"segment {self.id}: {self._state.value} -> {state.value}")
        self._state = state

    def __repr__(self) -> str:
        where = " below" if self.tier is Tier.LOWER else ""
        return (
            f"Segment({self.id} {self._state.value}{where} free={self.pages_free} "
            f"used={self.pages_used} cached={self.pages_cached} epoch={self.last_use_epoch})"
        )


@dataclass(frozen=True, slots=True)
class SegmentStats:
    """One group's figures. Bytes are of whole segments; `fixed_bytes` back the dump page.

    `segments` by state leave out the dump segment; pages are those of MAPPED segments.
    `mapped_bytes` counts MAPPED and DRAINING segments in memory, `lower_bytes` those in the tier
    below.
    `budget_bytes` is the one budget of all groups, the same number in each.
    """

    group: GroupId
    segments: Mapping[SegmentState, int]
    pages_free: int
    pages_used: int
    pages_cached: int
    mapped_bytes: int
    lower_bytes: int
    reserved_bytes: int
    fixed_bytes: int
    budget_bytes: int
    map_count: int
    unmap_count: int
    demote_count: int
    promote_count: int
    refused_count: int
    map_ms: float
    unmap_ms: float
    demote_ms: float
    promote_ms: float

    def __repr__(self) -> str:
        states = " ".join(f"{state.value}={self.segments[state]}" for state in SegmentState)
        lower = f"lower={self.lower_bytes} " if self.lower_bytes else ""
        return (
            f"SegmentStats(group={self.group} {states} | pages free={self.pages_free} "
            f"used={self.pages_used} cached={self.pages_cached} | bytes mapped={self.mapped_bytes} "
            f"{lower}"
            f"fixed={self.fixed_bytes} budget={self.budget_bytes} | maps={self.map_count} "
            f"unmaps={self.unmap_count} refused={self.refused_count})"
        )


class SegmentTable:
    """A group's segment records with running totals, so that no figure needs a scan.

    `empty` maps the MAPPED segments without a used or cached page to the time at which they
    became so. `generation` changes whenever the set of MAPPED segments does.
    """

    def __init__(self, layout: SegmentLayout) -> None:
        self.layout = layout
        self.segments: dict[SegmentId, Segment] = {}
        self.empty: dict[SegmentId, float] = {}
        self.generation = 0
        self.pages_free = 0
        self.pages_used = 0
        self.pages_cached = 0
        self.map_count = 0
        self.unmap_count = 0
        self.demote_count = 0
        self.promote_count = 0
        self.refused_count = 0
        self.map_ms = 0.0
        self.unmap_ms = 0.0
        self.demote_ms = 0.0
        self.promote_ms = 0.0
        self._counts = dict.fromkeys(SegmentState, 0)
        self._counts[SegmentState.RESERVED] = layout.max_segments - 1
        self._below = dict.fromkeys(SegmentState, 0)  # of those in `_counts`
        self._returned: set[SegmentId] = set()  # RESERVED ids that have a record
        self._fresh = 1  # ids from here on have no record yet

    def count(self, state: SegmentState) -> int:
        """Segments in `state`, the dump segment left out."""
        return self._counts[state]

    @property
    def attached_bytes(self) -> int:
        """Bytes of memory under MAPPED and DRAINING segments."""
        return self._bytes(Tier.DEVICE, SegmentState.MAPPED, SegmentState.DRAINING)

    @property
    def staying_bytes(self) -> int:
        """Bytes of memory under segments that are not about to be unmapped, or coming."""
        return self._bytes(Tier.DEVICE, SegmentState.MAPPED, SegmentState.MAPPING)

    @property
    def committed_bytes(self) -> int:
        """Bytes of memory of all segments that have some or are being given some."""
        return self._bytes(Tier.DEVICE, *_HOLDING)

    @property
    def lower_bytes(self) -> int:
        """Bytes of all segments that are in the lower tier or about to be."""
        return self._bytes(Tier.LOWER, *_HOLDING)

    def _bytes(self, tier: Tier, *states: SegmentState) -> int:
        count = sum(self._below[state] for state in states)
        if tier is Tier.DEVICE:
            count = sum(self._counts[state] for state in states) - count
        return count * self.layout.segment_bytes

    def lowest_reserved(self, count: int) -> tuple[SegmentId, ...] | None:
        """The `count` lowest RESERVED ids, ascending; None when the space has fewer."""
        if count > self._counts[SegmentState.RESERVED]:
            return None
        # every id that came back is below `_fresh`, so it goes first
        ids = heapq.nsmallest(count, self._returned)
        fresh = range(self._fresh, self._fresh + count - len(ids))
        return (*ids, *(SegmentId(segment) for segment in fresh))

    def move(
        self, segment_id: SegmentId, state: SegmentState, now: float, tier: Tier = Tier.DEVICE
    ) -> None:
        """Move one segment and every total with it. Raises InvariantError on an illegal move.

        `tier` is where a segment that goes to MAPPING will be.
        """
        segment = self.segments.get(segment_id) or self._create(segment_id)
        before = segment.state
        if before is SegmentState.MAPPED and not segment.is_empty:
            raise InvariantError(f"{segment!r} has pages and can't be moved to {state.value}")
        segment.move_to(state)
        self._count(segment, before, -1)
        if state is SegmentState.MAPPING:
            segment.tier = tier
        elif state is SegmentState.RESERVED:
            segment.tier = Tier.DEVICE
        self._count(segment, state, 1)
        if before is SegmentState.MAPPED or state is SegmentState.MAPPED:
            self.generation += 1
        if before is SegmentState.MAPPED:
            self.pages_free -= segment.pages_free
            del self.empty[segment_id]
        if state is SegmentState.MAPPED:
            segment.pages_free = self.layout.pages_per_segment
            self.pages_free += segment.pages_free
            self.empty[segment_id] = now
        elif state is SegmentState.RESERVED:
            segment.pages_free = 0
            self._returned.add(segment_id)
        elif state is SegmentState.MAPPING:
            self._returned.remove(segment_id)

    def change_tier(self, segment_id: SegmentId, tier: Tier) -> None:
        """Note that a MAPPED segment's bytes went to the other tier, and its pages with them."""
        segment = self.segments.get(segment_id)
        there = segment is not None and segment.state is SegmentState.MAPPED
        if segment is None or not there or segment.tier is tier:
            group = self.layout.group
            raise InvariantError(f"segment {segment_id} of group {group} can't go to {tier.value}")
        segment.tier = tier
        self._below[SegmentState.MAPPED] += 1 if tier is Tier.LOWER else -1

    def note_moves(self, demoted: tuple[int, float], promoted: tuple[int, float]) -> None:
        """Count moves between the tiers: (segments, milliseconds) each way."""
        self.demote_count += demoted[0]
        self.demote_ms += demoted[1]
        self.promote_count += promoted[0]
        self.promote_ms += promoted[1]

    def _count(self, segment: Segment, state: SegmentState, by: int) -> None:
        self._counts[state] += by
        if segment.tier is Tier.LOWER:
            self._below[state] += by

    def add_pages(
        self, segment_id: SegmentId, *, used: int, cached: int, now: float, epoch: int
    ) -> None:
        """Add to a MAPPED segment's used and cached counts; free takes the difference.

        Raises InvariantError when a count would leave 0..pages_per_segment; nothing is changed.
        """
        segment = self.segments.get(segment_id)
        if segment is None or segment.state is not SegmentState.MAPPED:
            raise InvariantError(f"segment {segment_id} of group {self.layout.group} is not mapped")
        new_used = segment.pages_used + used
        new_cached = segment.pages_cached + cached
        new_free = segment.pages_free - used - cached
        if new_used < 0 or new_cached < 0 or new_free < 0:
            raise InvariantError(f"{segment!r}: used{used:+} cached{cached:+} does not add up")
        segment.pages_used = new_used
        segment.pages_cached = new_cached
        segment.pages_free = new_free
        self.pages_used += used
        self.pages_cached += cached
        self.pages_free -= used + cached
        segment.last_use_epoch = epoch
        if new_used == 0 and new_cached == 0:
            self.empty.setdefault(segment_id, now)
        else:
            self.empty.pop(segment_id, None)

    def stats(self, budget_bytes: int) -> SegmentStats:
        """A snapshot of all figures."""
        return SegmentStats(
            group=self.layout.group,
            segments=MappingProxyType(dict(self._counts)),
            pages_free=self.pages_free,
            pages_used=self.pages_used,
            pages_cached=self.pages_cached,
            mapped_bytes=self.attached_bytes,
            lower_bytes=self.lower_bytes,
            reserved_bytes=self.layout.reserved_bytes,
            fixed_bytes=self.layout.fixed_bytes,
            budget_bytes=budget_bytes,
            map_count=self.map_count,
            unmap_count=self.unmap_count,
            demote_count=self.demote_count,
            promote_count=self.promote_count,
            refused_count=self.refused_count,
            map_ms=self.map_ms,
            unmap_ms=self.unmap_ms,
            demote_ms=self.demote_ms,
            promote_ms=self.promote_ms,
        )

    def check(self) -> None:
        """Recount everything from the records; raises InvariantError where a total differs."""
        counts = dict.fromkeys(SegmentState, 0)
        counts[SegmentState.RESERVED] = self.layout.max_segments - 1 - len(self.segments)
        below = dict.fromkeys(SegmentState, 0)
        free = used = cached = 0
        for segment in self.segments.values():
            counts[segment.state] += 1
            below[segment.state] += segment.tier is Tier.LOWER
            pages = segment.pages_free + segment.pages_used + segment.pages_cached
            attached = segment.state in (SegmentState.MAPPED, SegmentState.DRAINING)
            if pages != (self.layout.pages_per_segment if attached else 0):
                raise InvariantError(f"{segment!r}: {pages} pages do not add up")
            mapped = segment.state is SegmentState.MAPPED
            if (segment.id in self.empty) != (mapped and segment.is_empty):
                raise InvariantError(f"{segment!r}: wrong in the list of empty segments")
            if (segment.id in self._returned) != (segment.state is SegmentState.RESERVED):
                raise InvariantError(f"{segment!r}: wrong in the list of returned segments")
            if mapped:
                free += segment.pages_free
                used += segment.pages_used
                cached += segment.pages_cached
        if below != self._below or below[SegmentState.RESERVED]:
            raise InvariantError(f"segments below: {self._below} recorded, {below} counted")
        if counts != self._counts:
            raise InvariantError(f"segments per state: {self._counts} recorded, {counts} counted")
        if (free, used, cached) != (self.pages_free, self.pages_used, self.pages_cached):
            raise InvariantError(
                f"pages free/used/cached: {self.pages_free}/{self.pages_used}/{self.pages_cached} "
                f"recorded, {free}/{used}/{cached} counted"
            )

    def _create(self, segment_id: SegmentId) -> Segment:
        """A record for the next fresh id; ids before it are recorded too, so that none is lost."""
        if not self._fresh <= segment_id < self.layout.max_segments:
            last = self.layout.max_segments - 1
            raise InvariantError(f"segment {segment_id} is outside 1..{last}")
        for fresh in range(self._fresh, segment_id + 1):
            self.segments[SegmentId(fresh)] = Segment(SegmentId(fresh))
            self._returned.add(SegmentId(fresh))
        self._fresh = segment_id + 1
        return self.segments[segment_id]

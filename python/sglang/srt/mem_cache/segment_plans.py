"""Which segments to map, unmap, revive or move: pure choices over the segments' tables.

Called by the segment manager alone, which says what the moment is (`Moment`) and applies what comes
out. Changes nothing, asks no clock and no backing. See docs/kv_segments.md, Note [What the budget
counts] and Note [The tier below].
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from sglang.srt.mem_cache.kv_layout import GroupId, SegmentId
from sglang.srt.mem_cache.segment_state import (
    GrowthPlan,
    PlanReason,
    SegmentIdsByGroup,
    SegmentState,
    SegmentTable,
    Tier,
)

Tables = tuple[SegmentTable, ...]


@dataclass(frozen=True, slots=True)
class Moment:
    """What plans go by beside the tables: the next plan's number, what is left, what may go.

    `room_bytes` is the budget's, negative above it, `lower_room_bytes` the lower tier's.
    `revivable` are DRAINING segments whose unmap has not begun, ascending. Forwards up to
    `completed_epoch` are done. Not `elastic`: memory stays where it is.
    """

    number: int
    room_bytes: int
    lower_room_bytes: int
    revivable: SegmentIdsByGroup
    completed_epoch: int
    elastic: bool


def plan_growth(
    tables: Tables,
    moment: Moment,
    pages_wanted: Sequence[int],
    *,
    take_empty: bool,
    tier: Tier,
) -> GrowthPlan | None:
    """See `SegmentManager.plan_growth`."""
    revive: list[tuple[SegmentId, ...]] = []
    fresh: list[tuple[SegmentId, ...]] = []
    for table, wanted in zip(tables, pages_wanted, strict=True):
        count = -(-max(0, wanted) // table.layout.pages_per_segment)
        again = moment.revivable[table.layout.group][:count]
        ids = table.lowest_reserved(count - len(again))
        if ids is None:
            return None
        revive.append(again)
        fresh.append(ids)
    room = moment.room_bytes if tier is Tier.DEVICE else moment.lower_room_bytes
    missing = bytes_of(tables, fresh) - room
    unmap: SegmentIdsByGroup | None = _nothing(tables)
    if any(fresh) and missing > 0:
        unmap = (
            _empty_of_others(tables, moment, pages_wanted, missing, tier) if take_empty else None
        )
    if unmap is None or not (any(fresh) or any(revive)):
        return None
    return _plan(
        tables, moment, PlanReason.GROWTH, map=fresh, unmap=unmap, revive=revive, tier=tier
    )


def plan_demotion(
    tables: Tables,
    moment: Moment,
    missing_bytes: int,
    coldest: Sequence[tuple[GroupId, SegmentId]],
) -> GrowthPlan | None:
    """See `SegmentManager.plan_demotion`."""
    chosen: list[list[SegmentId]] = [[] for _ in tables]
    room = moment.lower_room_bytes
    for group, segment in coldest:
        table = tables[group]
        size = table.layout.segment_bytes
        record = table.segments[segment]
        movable = record.state is SegmentState.MAPPED and record.tier is Tier.DEVICE
        if missing_bytes > 0 and movable and size <= room:
            chosen[group].append(segment)
            missing_bytes -= size
            room -= size
    if not any(chosen):
        return None
    return _plan(tables, moment, PlanReason.DEMOTION, demote=[tuple(some) for some in chosen])


def plan_promotion(
    tables: Tables,
    moment: Moment,
    most_bytes: int,
    wanted: Sequence[tuple[GroupId, SegmentId]],
) -> GrowthPlan | None:
    """See `SegmentManager.plan_promotion`."""
    chosen: list[list[SegmentId]] = [[] for _ in tables]
    room = min(moment.room_bytes, most_bytes)
    for group, segment in wanted:
        table = tables[group]
        record = table.segments[segment]
        movable = record.state is SegmentState.MAPPED and record.tier is Tier.LOWER
        if movable and table.layout.segment_bytes <= room:
            chosen[group].append(segment)
            room -= table.layout.segment_bytes
    if not any(chosen):
        return None
    return _plan(tables, moment, PlanReason.PROMOTION, promote=[tuple(some) for some in chosen])


def plan_reserve(tables: Tables, moment: Moment, reserve_segments: int) -> GrowthPlan | None:
    """See `SegmentManager.plan_reserve`."""
    fresh: list[tuple[SegmentId, ...]] = []
    for table in tables:
        in_memory = len(table.empty) - len(_empty_below(table))
        there = in_memory + table.count(SegmentState.MAPPING)
        fresh.append(table.lowest_reserved(max(0, reserve_segments - there)) or ())
    if not any(fresh) or bytes_of(tables, fresh) > moment.room_bytes:
        return None
    return _plan(tables, moment, PlanReason.RESERVE, map=fresh)


def plan_shrink(
    tables: Tables, moment: Moment, now: float, *, idle_release_s: float, keep: int
) -> GrowthPlan | None:
    """See `SegmentManager.plan_shrink`."""
    unmap = []
    for table in tables:
        since, below = table.empty, _empty_below(table)
        excess = max(0, len(since) - len(below) - keep)
        # the reserve is the lowest ids; nobody waits for more tokens to come to the lower tier
        above = heapq.nlargest(excess, (s for s in since if s not in below))
        idle = [s for s in above if now - since[s] >= idle_release_s]
        unmap.append((*idle, *sorted(below, reverse=True)))
    return _plan(tables, moment, PlanReason.IDLE, unmap=unmap) if any(unmap) else None


def plan_start(tables: Tables, moment: Moment, wanted: Sequence[int]) -> GrowthPlan:
    """The `wanted[g]` lowest segments of every group, as many of them as there are."""
    fresh = [t.lowest_reserved(count) or () for t, count in zip(tables, wanted, strict=True)]
    return _plan(tables, moment, PlanReason.START, map=fresh)


def bytes_of(tables: Tables, ids: Sequence[tuple[SegmentId, ...]]) -> int:
    """Bytes of so many whole segments."""
    pairs = zip(ids, tables, strict=True)
    return sum(len(some) * table.layout.segment_bytes for some, table in pairs)


def _empty_below(table: SegmentTable) -> set[SegmentId]:
    if not table.lower_bytes:
        return set()
    return {s for s in table.empty if table.segments[s].tier is Tier.LOWER}


def _empty_of_others(
    tables: Tables, moment: Moment, wanted: Sequence[int], missing: int, tier: Tier
) -> SegmentIdsByGroup | None:
    """Empty segments on a tier, highest ids first, of groups that want nothing, worth `missing`.

    Only those that no forward still reads, so that the plan can be waited for. None: too few.
    """
    unmap = list(_nothing(tables))
    for table in tables:
        group = table.layout.group
        if wanted[group] > 0 or missing <= 0 or not moment.elastic:
            continue
        records = table.segments
        ready = (
            s
            for s in table.empty
            if records[s].last_use_epoch <= moment.completed_epoch and records[s].tier is tier
        )
        count = -(-missing // table.layout.segment_bytes)
        unmap[group] = tuple(heapq.nlargest(count, ready))
        missing -= len(unmap[group]) * table.layout.segment_bytes
    return tuple(unmap) if missing <= 0 else None


def _nothing(tables: Tables) -> SegmentIdsByGroup:
    return ((),) * len(tables)


def _plan(
    tables: Tables,
    moment: Moment,
    reason: PlanReason,
    tier: Tier = Tier.DEVICE,
    **kinds: Sequence[tuple[SegmentId, ...]],
) -> GrowthPlan:
    """A plan; of `map`, `unmap`, `revive`, `demote` and `promote`, what is not given is empty."""
    some = {
        kind: tuple(kinds.get(kind, _nothing(tables)))
        for kind in ("map", "unmap", "revive", "demote", "promote")
    }
    return GrowthPlan(number=moment.number, reason=reason, tier=tier, **some)

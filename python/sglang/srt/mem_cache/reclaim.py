"""Down to a lower budget, in bounded steps: give back, evict, compact, or say that one must go.

The memory half of a budget change; `managers/scheduler_budget.py` calls `reclaim_step` once a
turn, with no forward in flight, until what is mapped holds the budget. It knows no request and
waits for nothing. See docs/kv_segments.md, Note [A budget that moves].
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from sglang.srt.mem_cache.allocation import KVMemory
from sglang.srt.mem_cache.capacity import ContextClamp, effective_context_length, request_segments
from sglang.srt.mem_cache.compaction import compact
from sglang.srt.mem_cache.segment_backing.base import LOWER_PLACES
from sglang.srt.mem_cache.segment_state import SegmentState

# Work of one step, so that no turn of the scheduler is long.
EVICT_PAGES_PER_STEP = 1 << 14
MOVE_BYTES_PER_STEP = 64 << 20

# The shortest context that serves anybody: a token of prompt and one of answer.
SHORTEST_CONTEXT = 2


class Reclaim(enum.Enum):
    """HOLDS: what is mapped is within the budget. WAITING: it will be when the mapping thread is
    done. ADVANCED: call again. STUCK: everything left is in use by running requests."""

    HOLDS = "holds"
    WAITING = "waiting"
    ADVANCED = "advanced"
    STUCK = "stuck"


@dataclass(frozen=True, slots=True)
class ReclaimStep:
    """What one step did: pages evicted (per group) and pages moved (over all groups)."""

    state: Reclaim
    evicted_pages: int = 0
    moved_pages: int = 0


def minimum_budget(memory: KVMemory, prefill_chunk: int) -> int:
    """Bytes without which nobody can be served: a request's first segments and the reserve."""
    layouts, manager = memory.manager.layouts, memory.manager
    segments = request_segments(memory.spec, layouts, SHORTEST_CONTEXT, prefill_chunk)
    return sum(
        (count + min(manager.reserve_segments, layout.max_segments - 1)) * layout.segment_bytes
        for count, layout in zip(segments, layouts, strict=True)
    )


def context_under(
    memory: KVMemory, budget_bytes: int, requested: int, prefill_chunk: int
) -> ContextClamp:
    """The effective context that `budget_bytes` would give; changes nothing."""
    return effective_context_length(
        memory.spec,
        memory.manager.layouts,
        budget_bytes=budget_bytes,
        lower_bytes=memory.manager.lower_budget_bytes,
        lower_place=LOWER_PLACES.get(memory.manager.lower_tier or "", "below"),
        reserve_segments=memory.manager.reserve_segments,
        requested=requested,
        prefill_chunk=prefill_chunk,
    )


def reclaim_step(memory: KVMemory) -> ReclaimStep:
    """One bounded step towards the budget that is set; see `Reclaim` for what is left to do.

    First what is empty goes. Then cold segments, to the tier below. Then recurrent states of
    cached prefixes, and unlocked prefixes, by as many pages as are too many even when packed. Then
    what is left is packed, which empties segments.
    """
    manager = memory.manager
    excess = manager.staying_bytes - manager.budget_bytes
    if excess > 0:
        memory.ladder.release_empty(excess)
        excess = manager.staying_bytes - manager.budget_bytes
    if excess <= 0:
        holds = manager.committed_bytes <= manager.budget_bytes
        return ReclaimStep(Reclaim.HOLDS if holds else Reclaim.WAITING)
    if any(stats.segments[SegmentState.MAPPING] for stats in manager.stats()):
        return ReclaimStep(Reclaim.WAITING)  # growth from before: it will be empty, and go
    if memory.demote(min(excess, MOVE_BYTES_PER_STEP)):
        return ReclaimStep(Reclaim.ADVANCED)
    over = pages_over_budget(memory)
    if over == 0:
        moved = compact(memory, MOVE_BYTES_PER_STEP)
        if moved is not None:
            return ReclaimStep(Reclaim.ADVANCED, moved_pages=moved.moved_pages)
    elif any(memory.cache.evict_windows(_states_of_a_segment(memory))):
        return ReclaimStep(Reclaim.ADVANCED)
    evicted = memory.cache.evict(min(max(1, over), EVICT_PAGES_PER_STEP))
    if evicted:
        return ReclaimStep(Reclaim.ADVANCED, evicted)
    leaving = any(stats.segments[SegmentState.DRAINING] for stats in manager.stats())
    # what is being given back below is room there for the next step
    waits = leaving and manager.lower_budget_bytes > 0
    return ReclaimStep(Reclaim.WAITING if waits else Reclaim.STUCK)


def _states_of_a_segment(memory: KVMemory) -> list[int]:
    """States that fill a segment, 0 for groups that keep tokens."""
    layouts = memory.manager.layouts
    return [layout.pages_per_segment if layout.holds_states else 0 for layout in layouts]


def pages_over_budget(memory: KVMemory) -> int:
    """Fewest pages to drop in every group so that the others, packed, fit in the budget."""
    layouts, budget = memory.manager.layouts, memory.manager.reach_bytes
    owned = [index.num_used + index.num_cached for index in (a.index for a in memory.allocators)]

    def fits(dropped: int) -> bool:
        total = 0
        for layout, pages in zip(layouts, owned, strict=True):
            segments = -(-max(0, pages - dropped) // layout.pages_per_segment)
            total += segments * layout.segment_bytes
        return total <= budget

    low, high = 0, max(owned)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return low

"""Compaction: the pages of nearly empty segments move together, so that segments empty.

`plan_compaction` is pure: it reads a group's page index and names moves. `compact` carries one
bounded plan out over a `KVMemory`: content first, then the owners. Called with no forward in
flight, by the scheduler's memory operations only. See docs/kv_segments.md, Note [Compaction].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sglang.srt.errors import InvariantError
from sglang.srt.mem_cache.allocation import KVMemory
from sglang.srt.mem_cache.kv_layout import GroupId
from sglang.srt.mem_cache.page_copy import copy_pages
from sglang.srt.mem_cache.page_owner import NO_NODE, PageIndex, PageState

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PageMoves:
    """What moves in one group: page sources[i] to the free page targets[i], int32 each.

    `num_emptied` segments have no owned page afterwards.
    """

    sources: Int32Array
    targets: Int32Array
    num_emptied: int


@dataclass(frozen=True, slots=True)
class Compacted:
    """What `compact` did, over all groups."""

    moved_pages: int
    moved_bytes: int
    emptied_segments: int


def plan_compaction(index: PageIndex, max_pages: int) -> PageMoves | None:
    """Moves that bring a group closer to its fewest segments; changes nothing.

    The segments with the fewest owned pages are emptied, as many of them as fit into the free
    pages of the others, which are filled fullest first. At most `max_pages` move: a segment that
    is only partly moved has then the fewest, so the next plan goes on with it. A page stays with
    the rank that has its memory. None: no segment can be emptied.
    """
    free = _counts(index, free=True)
    owned = _counts(index, free=False)
    total_owned = owned.sum(axis=1)
    ids = np.flatnonzero(total_owned)
    # the fewest owned pages first; of equals the highest id, as low ids are mapped first
    order = ids[np.lexsort((-ids, total_owned[ids]))]
    needed = np.cumsum(owned[order], axis=0)
    room = free[order].sum(axis=0) - np.cumsum(free[order], axis=0)
    count = int((needed <= room).all(axis=1).sum())
    emptied = np.cumsum(total_owned[order[:count]])
    total = min(max_pages, int(emptied[-1]) if count else 0)
    if total <= 0:
        return None
    sources = _pages(index, order[:count].tolist(), total, free=False)
    targets = np.empty_like(sources)
    ranks = index.layout.kv_parallel
    for rank in range(ranks):
        moving = sources % ranks == rank
        wanted = int(np.count_nonzero(moving))
        if wanted:
            into = order[count:][::-1].tolist()
            targets[moving] = _pages(index, into, wanted, free=True, rank=rank)
    return PageMoves(sources, targets, int((emptied <= total).sum()))


def _counts(index: PageIndex, *, free: bool) -> Int64Array:
    """Free or owned pages of each segment that each rank has, [segments, ranks]."""
    ranks = index.layout.kv_parallel
    if ranks == 1:
        if free:
            return index.segment_counts(PageState.FREE).astype(np.int64)[:, None]
        used, cached = (index.segment_counts(s) for s in (PageState.USED, PageState.CACHED))
        return (used + cached).astype(np.int64)[:, None]
    states = index.state[: index.num_segments * index.layout.pages_per_segment]
    mask = states == PageState.FREE if free else states >= PageState.USED
    by_rank = mask.reshape(-1, index.layout.pages_per_segment // ranks, ranks)
    counts: Int64Array = by_rank.sum(axis=1, dtype=np.int64)
    return counts


def _pages(
    index: PageIndex, segments: list[int], count: int, *, free: bool, rank: int | None = None
) -> Int32Array:
    """The first `count` free or owned pages of `segments`, in this order; of one rank's only."""
    pieces: list[Int32Array] = []
    for segment in segments:
        if count <= 0:
            break
        states = index.segment_states(segment)
        mask = states == PageState.FREE if free else states >= PageState.USED
        first = segment * index.layout.pages_per_segment
        found = np.flatnonzero(mask) + first
        if rank is not None:
            found = found[found % index.layout.kv_parallel == rank]
        piece = found[:count].astype(np.int32)
        pieces.append(piece)
        count -= len(piece)
    return np.concatenate(pieces)


def compact(memory: KVMemory, max_bytes: int) -> Compacted | None:
    """Carry out one plan of every group, at most `max_bytes` of K and V (at least one page).

    Nothing may read or write the pool meanwhile. Tables get fresh arrays, so an older snapshot
    still says what it said. None: nothing to move in any group.
    """
    moved_pages = moved_bytes = emptied = 0
    for allocator in memory.allocators:
        layout = allocator.layout
        page_bytes = layout.segment_bytes // layout.pages_per_segment
        left = (max_bytes - moved_bytes) // page_bytes
        plan = plan_compaction(allocator.index, max(left, int(moved_pages == 0)))
        if plan is not None:
            move_pages(memory, layout.group, plan)
            moved_pages += len(plan.sources)
            moved_bytes += len(plan.sources) * page_bytes
            emptied += plan.num_emptied
    return Compacted(moved_pages, moved_bytes, emptied) if moved_pages else None


def move_pages(memory: KVMemory, group: GroupId, moves: PageMoves) -> None:
    """Copy the content, then tell the index, the tables and the tree where the pages are now."""
    if memory.recycler.leaving_pages(group):
        raise InvariantError("pages can't move while a forward may read those of dropped heads")
    index = memory.allocators[group].index
    sources, targets = moves.sources, moves.targets
    if len(sources) != len(targets):
        raise InvariantError(f"{len(sources)} pages can't move to {len(targets)}")
    copy_pages(memory.kv_pool, group, sources, targets)
    if memory.canary is not None:
        memory.canary.move(group, sources, targets)
    index.relocate(sources, targets)
    moved_to = np.arange(len(index.state), dtype=np.int32)
    moved_to[sources] = targets
    for lease in memory.leases.values():
        table = lease.tables[group]
        before = table.page_ids
        after = moved_to[before]
        if (after != before).any():
            table.replace_pages(after)
    nodes = index.node[targets]
    memory.cache.move_pages(group, set(nodes[nodes != NO_NODE].tolist()), moved_to)

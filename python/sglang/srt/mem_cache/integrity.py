"""`audit`: every page has exactly one owner, every count adds up, backed bytes are mapped segments.

Called by tests after every step, by the scheduler when asked and drained, never in a normal step:
it recounts everything from the owners' side and compares with what was kept. Changes nothing.
See docs/kv_segments.md, Note [Who owns a page].
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import numpy as np

from sglang.srt.errors import InvariantError
from sglang.srt.mem_cache.allocator import PageAllocator
from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache
from sglang.srt.mem_cache.block_table import BlockTable
from sglang.srt.mem_cache.kv_layout import GroupId, num_pages_for
from sglang.srt.mem_cache.lease import KVLease
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.page_owner import NO_NODE, PageIndex, PageState
from sglang.srt.mem_cache.segment_manager import SegmentManager
from sglang.srt.mem_cache.segment_state import SegmentState
from sglang.srt.mem_cache.state_group import held_of
from sglang.srt.mem_cache.window_recycler import WindowRecycler


def audit(
    manager: SegmentManager,
    allocators: Sequence[PageAllocator],
    cache: BasePrefixCache,
    rows: ReqToTokenPool,
    leases: Sequence[KVLease],
    recycler: WindowRecycler,
) -> None:
    """Recount everything. Raises InvariantError that names the first thing that differs.

    Costs O(all pages ever mapped) and, for a backing that knows it, a look at the system's own
    resident figure. Call it with no forward in flight.
    """
    manager.check()
    for allocator in allocators:
        _check_counts(allocator.index)
        _check_segments(allocator.index, manager)
        _check_owners(allocator.index, leases, recycler)
    _check_leases(rows, leases, allocators[0].layout.page_size, recycler)
    cache.check([lease.handle for lease in leases])
    _check_resident(manager)


def _check_counts(index: PageIndex) -> None:
    """Per-segment and total page counts are those of the states."""
    per_segment = index.layout.pages_per_segment
    states = index.state[: index.num_segments * per_segment].reshape(-1, per_segment)
    _require(not index.state[index.num_segments * per_segment :].any(), f"{index!r}: stray state")
    _require(not index.state[:per_segment].any(), f"{index!r}: a page of the dump segment is known")
    for state in (PageState.FREE, PageState.USED, PageState.CACHED):
        counted = (states == state).sum(axis=1)
        kept = index.segment_counts(state)
        _require(bool((counted == kept).all()), f"{index!r}: {state.name} per segment differs")
        _require(
            int(counted.sum()) == index.totals[state], f"{index!r}: {state.name} total differs"
        )


def _check_segments(index: PageIndex, manager: SegmentManager) -> None:
    """The allocator knows exactly the mapped segments, and both count their pages alike."""
    records = manager.segments(GroupId(index.layout.group))
    mapped = {int(s) for s, record in records.items() if record.state is SegmentState.MAPPED}
    known = {s for s in range(index.num_segments) if index.is_mapped(s)}
    _require(mapped == known, f"{index!r}: segments {sorted(mapped ^ known)} are known to one side")
    for segment, record in records.items():
        if record.state is SegmentState.MAPPED:
            kept = (record.pages_free, record.pages_used, record.pages_cached)
            found = tuple(index.counts[1:, segment].tolist())
            _require(kept == found, f"{record!r} but the index counts {found}")


def _check_owners(index: PageIndex, leases: Sequence[KVLease], recycler: WindowRecycler) -> None:
    """Rows per page are those of the tables and of what left them while a forward reads it; each
    state has the owners that it should."""
    group = int(index.layout.group)
    tables = [held_of(index.layout, lease.tables[group].page_ids) for lease in leases]
    tables += recycler.leaving_pages(group)
    pages = np.concatenate(tables) if tables else np.empty(0, np.int32)
    _require(bool((pages >= 0).all()) and bool((pages < len(index.state)).all()), "page ids")
    rows = np.bincount(pages, minlength=len(index.state))
    _require(bool((rows == index.rows).all()), f"{index!r}: rows per page differ from the tables")
    used = index.state == PageState.USED
    cached = index.state == PageState.CACHED
    _require(bool((index.rows[used] >= 1).all()), f"{index!r}: a used page has no row")
    if not recycler.has_window(group):  # see `WindowPageIndex.release` for where it has several
        _require(bool((index.rows[used] == 1).all()), f"{index!r}: a used page has several rows")
    _require(not index.rows[~used & ~cached].any(), f"{index!r}: a page without owner is in a row")
    owned = index.node != NO_NODE
    _require(bool((owned == cached).all()), f"{index!r}: cached pages and tree pages differ")


def _check_leases(
    rows: ReqToTokenPool, leases: Sequence[KVLease], page_size: int, recycler: WindowRecycler
) -> None:
    """Every taken row is one open lease, whose tables hold the pages of its tokens."""
    _require(sorted(rows.rows()) == sorted(lease.row for lease in leases), "rows and leases differ")
    for lease in leases:
        _require(not lease.closed, f"{lease!r} is kept as open")
        _require(lease.handle.num_tokens <= lease.num_tokens, f"{lease!r} locks too much")
        for group, table in enumerate(lease.tables):
            _require(table is rows.tables(lease.row)[group], f"{lease!r}: not its row's table")
            held = table.end_page
            wanted = num_pages_for(max(lease.num_tokens, lease.reached), page_size)
            _require(held == wanted, f"{lease!r} holds {held} pages, not {wanted}")
            _require(
                recycler.has_window(group) or table.first_page == 0, f"{table!r} lost its head"
            )
            rows.groups[group].check(lease.row)
            _check_runs(table)


def _check_runs(table: BlockTable) -> None:
    first = table.runs[0] if table.num_pages else (0, 0)
    _require(table.snapshot().first_run == first, f"{table!r}: runs differ, the first is {first}")


def _check_resident(manager: SegmentManager) -> None:
    """The system backs what is mapped and nothing else (asked only while nothing is under way)."""
    resident = None if manager.pending() else manager.backing.resident_bytes()
    if resident is None:
        return
    os_page = mmap.PAGESIZE
    planes = sum(count for x in manager.layouts for count, _ in x.plane_counts)
    # planes that are not whole system pages share one with a neighbour at both ends
    slack = 0 if manager.backing.granule_bytes >= os_page else 2 * planes * os_page
    least = most = manager.mapped_bytes + manager.leftover_bytes + manager.fixed_bytes
    if not manager.backing.elastic:
        # A system that gives huge pages unasked may back some of segment 0 together with page 0.
        most = manager.reserved_bytes
    within = least - slack <= resident <= most + slack
    _require(within, f"{resident:,} bytes are resident, {least:,} to {most:,} are accounted")


def _require(holds: bool, complaint: str) -> None:
    if not holds:
        raise InvariantError(complaint)

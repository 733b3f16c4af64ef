"""Which segments may go to the tier below, coldest first: none that a forward may write meanwhile.

`KVMemory` notes here what coming forwards write and asks when memory is short; the ladder and
reclaiming move what it names. Reads page indexes and tables, changes nothing. See
docs/kv_segments.md, Note [The tier below].
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sglang.srt.mem_cache.allocator import PageAllocator
from sglang.srt.mem_cache.kv_layout import GroupId, SegmentId
from sglang.srt.mem_cache.lease import KVLease
from sglang.srt.mem_cache.page_owner import PageState
from sglang.srt.mem_cache.segment_manager import SegmentManager

Int32Array = npt.NDArray[np.int32]

# Last tokens of a request that decode steps under way may still write: one of the step that ends,
# one of the step that runs, one of the step that is being prepared.
_TAIL_TOKENS = 3


class RecentWrites:
    """Where the forwards that are not completed write: from which token on, by lease."""

    def __init__(self) -> None:
        self._extends: deque[tuple[int, KVLease, int]] = deque()  # epoch, lease, first token

    def note_extend(self, lease: KVLease, first_token: int, epoch: int) -> None:
        """Forward `epoch`, or one before it, writes the lease's tokens from `first_token` on."""
        self._extends.append((epoch, lease, first_token))

    def note_completed(self, epoch: int) -> None:
        """Forward `epoch` and all before are done."""
        while self._extends and self._extends[0][0] <= epoch:
            self._extends.popleft()

    def first_written(self, leases: Iterable[KVLease]) -> list[tuple[KVLease, int]]:
        """Every lease with the first of its tokens that may still be written."""
        first = {id(lease): _first_of_tail(lease) for lease in leases}
        for _, lease, token in self._extends:
            if id(lease) in first:
                first[id(lease)] = min(first[id(lease)], token)
        return [(lease, first[id(lease)]) for lease in leases]


def _first_of_tail(lease: KVLease) -> int:
    first = max(0, lease.num_tokens - _TAIL_TOKENS)
    return first if lease.rewritten_from is None else min(first, lease.rewritten_from)


class SegmentHeat(NamedTuple):
    """How warm a segment is; the smaller, the sooner it may go below.

    `is_hot`: forwards under way write it. `is_read`: running requests read it. `has_room`: it has
    free pages. `age`: the last forward at which one of its pages changed hands.
    """

    is_hot: bool
    is_read: bool
    has_room: bool
    age: int
    segment: SegmentId
    group: GroupId


def segment_heats(
    manager: SegmentManager,
    allocators: Sequence[PageAllocator],
    written: Sequence[tuple[KVLease, int]],
    leaving: Callable[[int], list[Int32Array]],
) -> list[SegmentHeat]:
    """Every segment with an owned page, the coldest first.

    `written` is what `RecentWrites.first_written` says, `leaving(g)` pages of group g that tables
    have dropped while a forward under way still reads or writes them.
    """
    found: list[SegmentHeat] = []
    for allocator in allocators:
        group, index = GroupId(allocator.layout.group), allocator.index
        per_segment = allocator.layout.pages_per_segment
        hot = _hot(allocator, written)
        for pages in leaving(group):
            hot[pages // per_segment] = True
        shape = (index.num_segments, per_segment)
        read = (index.rows[: index.num_segments * per_segment].reshape(shape) > 0).max(axis=1)
        free = index.segment_counts(PageState.FREE)
        owned = index.segment_counts(PageState.USED) + index.segment_counts(PageState.CACHED) > 0
        records = manager.segments(group)
        for number in np.flatnonzero(owned).tolist():
            segment = SegmentId(number)
            age = records[segment].last_use_epoch
            warmth = (hot.item(number), read.item(number), free.item(number) > 0, age)
            found.append(SegmentHeat(*warmth, segment, group))
    return sorted(found)


def coldest_segments(
    heats: Sequence[SegmentHeat], *, drained: bool
) -> list[tuple[GroupId, SegmentId]]:
    """Segments that may go below, the one to move first at the front.

    None that is hot, unless `drained`: no forward is under way until all was moved.
    """
    return [(one.group, one.segment) for one in heats if drained or not one.is_hot]


def _hot(allocator: PageAllocator, written: Sequence[tuple[KVLease, int]]) -> npt.NDArray[np.bool_]:
    """Which segments have a page that may be written; bool [segments]."""
    layout = allocator.layout
    hot = np.zeros(allocator.index.num_segments, np.bool_)
    for lease, first_token in written:
        table = lease.tables[layout.group]
        first = max(0, first_token // layout.page_size - table.first_page)
        hot[table.page_ids[first:] // layout.pages_per_segment] = True
    return hot

"""Which segments may go to disk, coldest first: none that a forward may write meanwhile.

`KVMemory` notes here what coming forwards write and asks when memory is short; the ladder and
reclaiming move what it names. Reads page indexes and tables, changes nothing. See
docs/kv_segments.md, Note [The disk tier].
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

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
        first = {id(lease): max(0, lease.num_tokens - _TAIL_TOKENS) for lease in leases}
        for _, lease, token in self._extends:
            if id(lease) in first:
                first[id(lease)] = min(first[id(lease)], token)
        return [(lease, first[id(lease)]) for lease in leases]


def coldest_segments(
    manager: SegmentManager,
    allocators: Sequence[PageAllocator],
    written: Sequence[tuple[KVLease, int]],
    leaving: Callable[[int], list[Int32Array]],
    *,
    drained: bool,
) -> list[tuple[GroupId, SegmentId]]:
    """Segments with an owned page, the one to move first at the front.

    First those that no running request reads, then full ones, then those whose pages changed hands
    longest ago. `written` is what `RecentWrites.first_written` says, `leaving(g)` pages of group g
    that tables have dropped while a forward under way still reads or writes them. Segments with
    such pages are left out; `drained` (no forward is under way until all was moved) puts them to
    the end instead.
    """
    found: list[tuple[tuple[bool, bool, bool, int, int], GroupId, SegmentId]] = []
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
        movable = owned if drained else owned & ~hot
        records = manager.segments(group)
        for number in np.flatnonzero(movable).tolist():
            segment = SegmentId(number)
            age = records[segment].last_use_epoch
            order = (hot.item(number), read.item(number), free.item(number) > 0, age, number)
            found.append((order, group, segment))
    return [(group, segment) for _, group, segment in sorted(found)]


def _hot(allocator: PageAllocator, written: Sequence[tuple[KVLease, int]]) -> npt.NDArray[np.bool_]:
    """Which segments have a page that may be written; bool [segments]."""
    layout = allocator.layout
    hot = np.zeros(allocator.index.num_segments, np.bool_)
    for lease, first_token in written:
        table = lease.tables[layout.group]
        first = max(0, first_token // layout.page_size - table.first_page)
        hot[table.page_ids[first:] // layout.pages_per_segment] = True
    return hot

"""The page index of a window group: rows come and go under a cached page, edges have holes.

In a full group a lock on the path says that a cached page is read. Here a running row moves on and
leaves pages behind that its path still locks, so the rows themselves say it: a cached page that no
row reads is *idle*, and idle pages are what eviction can free. See docs/kv_segments.md,
Note [Window groups recycle].
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sglang.srt.mem_cache.kv_layout import SegmentLayout
from sglang.srt.mem_cache.page_owner import NO_NODE, CountsListener, PageIndex, PageState

Int32Array = npt.NDArray[np.int32]

NO_PAGE = -1  # stands in a tree edge where the window's page is not held


class WindowPageIndex(PageIndex):
    """A `PageIndex` that skips NO_PAGE entries and counts idle pages.

    Invariant: `num_idle` is the number of CACHED pages with no row.
    """

    def __init__(self, layout: SegmentLayout, listener: CountsListener | None = None) -> None:
        super().__init__(layout, listener)
        self.num_idle = 0

    def share(self, pages: Int32Array) -> None:
        """See `PageIndex.share`."""
        idle = int((self.rows[pages] == 0).sum())
        super().share(pages)
        self.num_idle -= idle

    def drop_row(self, pages: Int32Array) -> int:
        """See `PageIndex.drop_row`; cached pages that nobody else reads become idle."""
        freed = super().drop_row(pages)
        left = (self.state[pages] == PageState.CACHED) & (self.rows[pages] == 0)
        self.num_idle += int(left.sum())
        return freed

    def _unread(self, used: Int32Array) -> Int32Array:
        """A used page may have several rows here, see `release`: the last one frees it."""
        left: Int32Array = used[self.rows[used] == 0]
        return left

    def adopt(self, pages: Int32Array, node: int) -> None:
        """See `PageIndex.adopt`."""
        super().adopt(held_pages(pages), node)

    def rename_node(self, pages: Int32Array, node: int) -> None:
        """See `PageIndex.rename_node`."""
        super().rename_node(held_pages(pages), node)

    def release(self, pages: Int32Array) -> None:
        """The tree drops pages: idle ones become free, those that rows still have become used.

        The second happens when a row gave its window to a node that it does not lock (it had
        computed what was cached before), and when rows that had a page moved on or ended while a
        forward that reads it is under way: each of them is counted until the forward is done.
        """
        held = held_pages(pages)
        read = held[self.rows[held] > 0]
        idle = held[self.rows[held] == 0]
        self._move(read, PageState.CACHED, PageState.USED)
        self.node[read] = NO_NODE
        super().release(idle)
        self.num_idle -= len(idle)

    def segments_emptied_by(self, pages: Int32Array) -> int:
        """See `PageIndex.segments_emptied_by`."""
        held = held_pages(pages)
        return super().segments_emptied_by(held) if len(held) else 0

    def idle_in(self, pages: Int32Array) -> npt.NDArray[np.bool_]:
        """Which entries of an edge are held and idle, bool [len(pages)]."""
        idle: npt.NDArray[np.bool_] = pages != NO_PAGE
        idle[idle] = self.rows[pages[idle]] == 0
        return idle


def held_pages(pages: Int32Array) -> Int32Array:
    """The entries of an edge that are pages."""
    held: Int32Array = pages[pages != NO_PAGE]
    return held

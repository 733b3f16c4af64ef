"""Who owns each page of one layer group: an index, never a search.

A page of a mapped segment is free, used (it stands only in the tables of running requests) or
cached (the prefix tree owns it, and running requests may read it). Whoever takes a page notes it
here in the same call; see docs/kv_segments.md, Note [Who owns a page]. The allocator, the prefix
cache and the facade call this module; it never decides anything.
"""

from __future__ import annotations

import enum
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from sglang.srt.errors import InvariantError
from sglang.srt.mem_cache.id_array import is_run
from sglang.srt.mem_cache.kv_layout import SegmentId, SegmentLayout

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
UInt8Array = npt.NDArray[np.uint8]
_Places = slice | Int32Array | Int64Array

_Scalar = TypeVar("_Scalar", bound=np.generic)

NO_NODE = -1


class PageState(enum.IntEnum):
    """What a page is; UNMAPPED covers everything outside mapped segments."""

    UNMAPPED = 0
    FREE = 1
    USED = 2
    CACHED = 3


# The states as arrays without dimensions: numpy compares with these in half the time that it takes
# with its own scalars, and in a fraction of what it takes with an enum.
STATE_CODES = tuple(np.array(state, np.uint8) for state in PageState)
_USED_CODE = STATE_CODES[PageState.USED]
_FREE_NUMBER = int(PageState.FREE)
_ONE_ROW = np.array(1, np.int32)
_NO_IDS = np.empty(0, np.int64)
# How the used and the cached pages of a segment change with a page's state.
_AS_USED = tuple(int(state is PageState.USED) for state in PageState)
_AS_CACHED = tuple(int(state is PageState.CACHED) for state in PageState)
_FEW_PAGES = 8  # counted one by one
_FEW_SEGMENTS = 8  # updated one by one
_COUNTED_AT_ONCE = 1024  # segments for which one counter each costs less than to find the lowest


class CountsListener(Protocol):
    """Hears of every change of a segment's page counts, at once."""

    def __call__(self, segment: SegmentId, *, used: int, cached: int) -> None: ...


class PageIndex:
    """State, owning tree node and number of rows of every page that was ever mapped.

    Arrays reach up to the highest segment that was ever mapped (lowest ids are mapped first) and
    grow by doubling. Invariants, per mapped page: FREE has no node and no rows; USED has no node
    and at least one row; CACHED has a node and any number of rows.
    """

    def __init__(self, layout: SegmentLayout, listener: CountsListener | None = None) -> None:
        self.layout = layout
        self.state: UInt8Array = np.zeros(0, np.uint8)  # [pages]
        self.node: Int32Array = np.zeros(0, np.int32)  # [pages], NO_NODE when none
        self.rows: Int32Array = np.zeros(0, np.int32)  # [pages]
        self.counts: Int32Array = np.zeros((4, 0), np.int32)  # [PageState, segments]
        self.totals = [0, 0, 0, 0]  # per PageState; UNMAPPED is not counted
        self.num_releases = 0  # times that pages became free or segments came or went
        self._num_segments = 0
        self._listener = listener

    @property
    def num_segments(self) -> int:
        """One more than the highest segment that was ever mapped."""
        return self._num_segments

    @property
    def num_free(self) -> int:
        return self.totals[PageState.FREE]

    @property
    def num_used(self) -> int:
        return self.totals[PageState.USED]

    @property
    def num_cached(self) -> int:
        return self.totals[PageState.CACHED]

    def segment_counts(self, state: PageState) -> Int32Array:
        """Pages in `state` per segment, int32 [num_segments]; a view, do not keep it."""
        return self.counts[state, : self._num_segments]

    def segment_states(self, segment: int) -> UInt8Array:
        """States of one segment's pages; a view, do not keep it."""
        first = segment * self.layout.pages_per_segment
        return self.state[first : first + self.layout.pages_per_segment]

    def is_mapped(self, segment: int) -> bool:
        """Whether the segment's pages are known here (allocatable or owned)."""
        return segment < self._num_segments and bool(self.counts[1:, segment].any())

    def is_free(self, page: int) -> bool:
        """Whether `page` (any number) is a free page of a mapped segment."""
        return 0 <= page < len(self.state) and self.state.item(page) == _FREE_NUMBER

    # ---- segments come and go -------------------------------------------------------------

    def add_segment(self, segment: int) -> None:
        """Make every page of a freshly mapped segment free. Raises InvariantError when known."""
        self._grow_to(segment + 1)
        states = self.segment_states(segment)
        if states.any():
            raise InvariantError(f"segment {segment} was added twice")
        states[:] = PageState.FREE
        self.counts[PageState.FREE, segment] = len(states)
        self.totals[PageState.FREE] += len(states)
        self.num_releases += 1

    def remove_segment(self, segment: int) -> None:
        """Forget a segment before it is unmapped. Raises InvariantError unless all are free."""
        states = self.segment_states(segment)
        if len(states) == 0 or (states != PageState.FREE).any():
            raise InvariantError(f"segment {segment} still has owners")
        states[:] = PageState.UNMAPPED
        self.counts[PageState.FREE, segment] = 0
        self.totals[PageState.FREE] -= len(states)
        self.num_releases += 1

    # ---- pages change hands ---------------------------------------------------------------

    def take(self, pages: Int32Array) -> None:
        """Free pages go into one row's table: FREE -> USED with one row."""
        self._move(pages, PageState.FREE, PageState.USED)
        self.rows[self._at(pages)] = 1

    def take_free(self, pages: Int64Array) -> None:
        """`take` of distinct pages that the caller has just seen to be free."""
        self.state[pages] = _USED_CODE
        self.rows[pages] = _ONE_ROW
        self._count_move(pages, len(pages), PageState.FREE, PageState.USED)

    def share(self, pages: Int32Array) -> None:
        """Cached pages also go into another row's table."""
        at = self._at(pages)
        if (self.state[at] != PageState.CACHED).any():
            raise InvariantError("only cached pages can be shared")
        self.rows[at] += 1

    def drop_row(self, pages: Int32Array) -> int:
        """A row gives its table back; pages that only it had become free. Returns their number."""
        at = self._at(pages)
        if (self.rows[at] < 1).any():
            raise InvariantError("a row gave back pages that no row had")
        self.rows[at] -= 1
        private = self._unread(pages[self.state[at] == PageState.USED])
        self._move(private, PageState.USED, PageState.FREE)
        return len(private)

    def _unread(self, used: Int32Array) -> Int32Array:
        """Those of the used pages that no row has any more: all, where tables share by the tree."""
        if self.rows[self._at(used)].any():
            raise InvariantError("a used page stood in two tables")
        return used

    def adopt(self, pages: Int32Array, node: int) -> None:
        """The tree takes a running row's pages: USED -> CACHED, owned by `node`."""
        self._move(pages, PageState.USED, PageState.CACHED)
        self.node[self._at(pages)] = node

    def rename_node(self, pages: Int32Array, node: int) -> None:
        """The pages moved to another node of the tree (an edge was split)."""
        self.node[self._at(pages)] = node

    def release(self, pages: Int32Array) -> None:
        """The tree drops pages that no row reads: CACHED -> FREE."""
        if self.rows[self._at(pages)].any():
            raise InvariantError("the tree dropped pages that a row still reads")
        self._move(pages, PageState.CACHED, PageState.FREE)
        self.node[self._at(pages)] = NO_NODE

    def relocate(self, sources: Int32Array, targets: Int32Array) -> None:
        """Owned pages move into free ones, with state, node and rows; their old places are free.

        The i-th source goes to the i-th target; the caller has copied the content and tells the
        tables and the tree. Raises InvariantError unless all sources are owned, all targets free.
        """
        states = self.state[sources]
        if (states < PageState.USED).any():
            raise InvariantError("only pages that have an owner can be moved")
        for state in (PageState.USED, PageState.CACHED):
            chosen = states == state
            self._move(targets[chosen], PageState.FREE, state)
            self._move(sources[chosen], state, PageState.FREE)
        self.node[targets], self.rows[targets] = self.node[sources], self.rows[sources]
        self.node[sources], self.rows[sources] = NO_NODE, 0

    def segments_emptied_by(self, pages: Int32Array) -> int:
        """Segments that would be all free if `pages` (all owned) became free; changes nothing."""
        segments, owned = self._count_by_segment(self._at(pages))
        held = self.counts[PageState.USED, segments] + self.counts[PageState.CACHED, segments]
        return int((held == owned).sum())

    # ---- inside ---------------------------------------------------------------------------

    def _at(self, pages: Int32Array) -> _Places:
        """What to index page arrays with: a slice where the pages stand in a row, as most do.

        A slice is read and written several times faster than an array of indices. Pages that do
        not exist stay an array: indexing with it raises, where a slice would be cut.
        """
        if len(pages) == 0:
            return pages
        first, last = pages.item(0), pages.item(-1)
        if 0 <= first <= last < len(self.state) and is_run(pages):
            return slice(first, first + len(pages))
        # the kind that numpy would make of it at every use
        return pages.astype(np.int64, copy=False)

    def _count_by_segment(self, at: _Places) -> tuple[Int64Array, Int64Array]:
        """Segments that the pages at `at` lie in, ascending, and how many of them in each."""
        per_segment = self.layout.pages_per_segment
        if isinstance(at, slice):
            ids = np.arange(at.start // per_segment, (at.stop - 1) // per_segment + 1)
            ends = np.minimum((ids + 1) * per_segment, at.stop)
            return ids, ends - np.maximum(ids * per_segment, at.start)
        if len(at) == 0:
            return _NO_IDS, _NO_IDS
        low, high = at.item(at.argmin()), at.item(at.argmax())
        if low // per_segment == high // per_segment:  # most often: the fullest segment gives all
            return np.array([low // per_segment]), np.array([len(at)])
        segments = at // per_segment
        lowest = 0
        if self._num_segments > _COUNTED_AT_ONCE:
            lowest = low // per_segment
            segments -= lowest
        counts = np.bincount(segments)  # no sort, as np.unique would
        ids = counts.nonzero()[0]
        each = counts[ids]
        ids += lowest
        return ids, each

    def _move(self, pages: Int32Array, old: PageState, new: PageState) -> None:
        if len(pages) == 0:
            return
        at = self._at(pages)
        if np.count_nonzero(self.state[at] != STATE_CODES[old]):
            raise InvariantError(f"pages were not all {old.name} when they became {new.name}")
        self.state[at] = new
        self._count_move(at, len(pages), old, new)

    def _count_move(self, at: _Places, num_pages: int, old: PageState, new: PageState) -> None:
        """Let every count follow pages that have changed their state."""
        self.num_releases += new == PageState.FREE
        self.totals[old] -= num_pages
        self.totals[new] += num_pages
        before, after = self.counts[old], self.counts[new]
        per_segment = self.layout.pages_per_segment
        if num_pages <= _FEW_PAGES and not isinstance(at, slice):
            counted: dict[SegmentId, int] = {}
            for page in at.tolist():
                segment = page // per_segment
                counted[segment] = counted.get(segment, 0) + 1
            segments, moved = list(counted), list(counted.values())
        else:
            ids, each = self._count_by_segment(at)
            segments, moved = ids.tolist(), each.tolist()
        if len(segments) <= _FEW_SEGMENTS:
            for segment, count in zip(segments, moved, strict=True):
                before[segment] -= count
                after[segment] += count
        else:
            before[ids] -= each
            after[ids] += each
        if self._listener is not None:
            used = _AS_USED[new] - _AS_USED[old]
            cached = _AS_CACHED[new] - _AS_CACHED[old]
            for segment, count in zip(segments, moved, strict=True):
                self._listener(segment, used=used * count, cached=cached * count)

    def _grow_to(self, num_segments: int) -> None:
        if num_segments > self.counts.shape[1]:
            room = min(max(8, 2 * num_segments), self.layout.max_segments)
            room = max(room, num_segments)
            pages = room * self.layout.pages_per_segment
            self.state = _grown(self.state, pages, PageState.UNMAPPED)
            self.node = _grown(self.node, pages, NO_NODE)
            self.rows = _grown(self.rows, pages, 0)
            counts = np.zeros((4, room), np.int32)
            counts[:, : self.counts.shape[1]] = self.counts
            self.counts = counts
        self._num_segments = max(self._num_segments, num_segments)

    def __repr__(self) -> str:
        _, free, used, cached = self.totals
        return f"PageIndex(group={self.layout.group}, {free=}, {used=}, {cached=})"


def _grown(array: npt.NDArray[_Scalar], size: int, fill: int) -> npt.NDArray[_Scalar]:
    grown = np.full(size, fill, array.dtype)
    grown[: len(array)] = array
    return grown

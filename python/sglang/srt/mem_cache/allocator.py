"""Pages of mapped segments: which free page goes to whom.

`PageAllocator` is called by the facade only. It keeps requests contiguous (a run of neighbouring
pages is one piece of attention work) and segments fullest first (so that others become empty and
can be unmapped). It never maps memory, never evicts and never asks for more than is free: the
ladder in `allocation.py` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from sglang.srt.errors import InvariantError
from sglang.srt.mem_cache.kv_layout import SegmentLayout
from sglang.srt.mem_cache.page_owner import STATE_CODES, CountsListener, PageIndex, PageState

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

_Granted = TypeVar("_Granted")

NO_HINT = -1
_FREE, _USED = STATE_CODES[PageState.FREE], STATE_CODES[PageState.USED]

# Segments that are searched for one gap large enough before pieces are taken instead.
_GAP_SEARCH_SEGMENTS = 8
# So many pages are looked at one by one in less time than array operations take.
_FEW_ROWS = 8
# Places that are laid out for rows to come, at most.
_MOST_AHEAD = 32


class PageAllocator:
    """Free pages of one layer group.

    Order of preference: the page after the request's own last one (`hint`), then whole runs of
    empty segments for what is longer than a segment, then a gap in the fullest segment that has
    one, then the largest pieces of the fullest segments.
    """

    def __init__(
        self,
        layout: SegmentLayout,
        listener: CountsListener | None = None,
        index_class: type[PageIndex] = PageIndex,
    ) -> None:
        self.layout = layout
        self.index = index_class(layout, listener)
        # places for rows to come, last one first; good until pages are given back
        self._laid_out: list[int] = []
        self._laid_out_at = 0
        self._ahead = 0

    @property
    def num_free(self) -> int:
        """Free pages of mapped segments: what `alloc_pages` can grant now."""
        return self.index.totals[PageState.FREE]

    def add_segments(self, segments: Sequence[int]) -> None:
        """Make freshly mapped segments allocatable."""
        for segment in segments:
            self.index.add_segment(segment)

    def remove_segments(self, segments: Sequence[int]) -> None:
        """Forget empty segments before they are unmapped; InvariantError when one has owners."""
        for segment in segments:
            self.index.remove_segment(segment)

    def alloc_pages(self, count: int, hint: int = NO_HINT) -> Int32Array | None:
        """Take `count` pages for one row; int32 [count] in table order, None when too few are free.

        `hint` is the page that would continue the row's last run (NO_HINT: none).
        """
        if count > self.index.num_free:
            return None
        if count == 1:
            return np.array([self._one_page(hint)], np.int32)
        pieces: list[Int32Array] = [np.empty(0, np.int32)] if count == 0 else []
        left = count
        run = self._free_run_at(hint, left)
        if run:
            pieces.append(self._take_range(hint, run))
            left -= run
        while left >= self.layout.pages_per_segment:
            piece = self._take_empty_segments(left)
            if piece is None:
                break
            pieces.append(piece)
            left -= len(piece)
        while left:
            after = int(pieces[-1][-1]) + 1 if pieces else NO_HINT
            run = self._free_run_at(after, left)
            piece = self._take_range(after, run) if run else self._take_gap(left)
            pieces.append(piece)
            left -= len(piece)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def alloc_each(
        self, hints: Sequence[int] | Int64Array, *, distinct: bool = False
    ) -> Int64Array | None:
        """One page for each of several rows; int64 [len(hints)], None when too few are free.

        Every free hint is granted, to the first row that has it, before other rows get a gap. The
        others get theirs together: a few array operations, however many they are. `distinct`: the
        caller knows that no two hints are the same.
        """
        if len(hints) > self.index.num_free:
            return None
        pages = np.array(hints, np.int64)
        if len(pages) <= _FEW_ROWS:
            granted = self._grantable_few(pages.tolist())
        else:
            granted = self._free_hints(pages) if distinct else self._grantable(pages)
        num_granted = int(np.count_nonzero(granted))
        if num_granted == len(pages):
            self.index.take_free(pages)
        else:
            if num_granted:
                self.index.take_free(pages[granted])
            pages[~granted] = self._take_apart(len(pages) - num_granted)
        return pages

    # ---- inside: all that follows knows that enough pages are free --------------------------

    def _one_page(self, hint: int) -> int:
        if not self.index.is_free(hint):
            return int(self._take_gap(1)[0])
        self._take_range(hint, 1)
        return hint

    def _grantable_few(self, hints: list[int]) -> npt.NDArray[np.bool_]:
        """`_grantable`, cheaper for a few."""
        seen, granted = set[int](), []
        for page in hints:
            granted.append(page not in seen and self.index.is_free(page))
            seen.add(page)
        return np.array(granted)

    def _grantable(self, hints: Int64Array) -> npt.NDArray[np.bool_]:
        """Which rows can have their hint: it is free and no row before has the same; bool."""
        free = self._free_hints(hints)
        ordered = hints[free]
        ordered.sort()
        if np.count_nonzero(ordered[1:] == ordered[:-1]):
            first = np.zeros(len(hints), np.bool_)
            first[np.unique(hints, return_index=True)[1]] = True
            free &= first
        return free

    def _free_hints(self, hints: Int64Array) -> npt.NDArray[np.bool_]:
        """Which hints are free pages; bool."""
        state = self.index.state
        # what lies outside is cut to page 0, which is never free, or to the last one
        free: npt.NDArray[np.bool_] = state.take(hints, mode="clip") == _FREE
        if state.item(-1) == PageState.FREE:
            free &= hints < len(state)
        return free

    def _take_apart(self, count: int) -> Int64Array:
        """`count` pages for as many rows: all of the fullest segments, then apart in the next.

        Rows that come a few at a time, as those of a decode step do, are foreseen: the more of
        them came since a page was last given back, the more places are laid out at once.
        """
        if self._laid_out_at != self.index.num_releases:
            self._laid_out, self._ahead = [], 0
            self._laid_out_at = self.index.num_releases
        pages = self._from_laid_out(count)
        if pages is None:
            pages = self._lay_out(count)
        self.index.take_free(pages)
        return pages

    def _from_laid_out(self, count: int) -> Int64Array | None:
        """`count` of the places laid out that are still free; None when there are too few."""
        if count > len(self._laid_out):
            return None
        chosen: list[int] = []
        while self._laid_out and len(chosen) < count:
            page = self._laid_out.pop()
            if self.index.is_free(page):  # no row has grown into it
                chosen.append(page)
        return np.array(chosen) if len(chosen) == count else None

    def _lay_out(self, count: int) -> Int64Array:
        """Free places for `count` rows now, and for more of them in the same segment later."""
        per_segment = self.layout.pages_per_segment
        free = self.index.segment_counts(PageState.FREE)
        segment = int(np.where(free > 0, free, per_segment + 1).argmin())
        room = free.item(segment)
        self._laid_out = []
        if room >= count:
            ahead = min(self._ahead, room - count)
            pages = self._spread(segment, count + ahead)
            if ahead:
                self._laid_out = pages[count:][::-1].tolist()
                pages = pages[:count]
            self._ahead = min(2 * self._ahead + count, _MOST_AHEAD)
        else:
            segments = np.flatnonzero(free)
            segments = segments[np.argsort(free[segments], kind="stable")]
            held = np.cumsum(free[segments])
            whole = int(np.searchsorted(held, count, side="right"))
            states = self.index.state[: len(free) * per_segment].reshape(-1, per_segment)
            at, offset = np.nonzero(states[segments[:whole]] == _FREE)
            pages = segments[at] * per_segment + offset
            if len(pages) < count:
                rest = self._spread(int(segments[whole]), count - len(pages))
                pages = np.concatenate([pages, rest])
        return pages

    def _spread(self, segment: int, count: int) -> Int64Array:
        """`count` free pages of a segment, each with as much room behind it as there is.

        One for each of the largest gaps, if these are about as large. Else gaps get rows by their
        length, the remainders go to the largest. In a gap the rows stand at even distances; a
        running row that ends before the gap counts as one of them.
        """
        starts, lengths = runs_of(self.index.segment_states(segment) == _FREE)
        starts += segment * self.layout.pages_per_segment
        if count <= len(starts):
            chosen = np.argsort(-lengths, kind="stable")[:count]
            lengths_chosen = lengths[chosen]
            if lengths_chosen[0] <= 2 * lengths_chosen[-1]:  # no half of one is better than these
                begins = starts[chosen]
                grows = self.index.state[begins - 1] == _USED
                begins += (lengths_chosen - 1) // 2 * grows
                return begins
        if len(starts) == 1:
            shares = np.array([count])
        else:
            total = int(lengths.sum())
            shares, left = np.divmod(lengths * count, total)
            missing = count - int(shares.sum())
            shares[np.argsort(-left, kind="stable")[:missing]] += 1
        grows = self.index.state[starts - 1] == _USED
        ends = np.cumsum(shares)
        place = np.arange(count) - np.repeat(ends - shares, shares)
        spare, parts = np.repeat(lengths - shares, shares), np.repeat(shares + grows, shares)
        before = (place + np.repeat(grows, shares)) * spare // parts
        pages: Int64Array = np.repeat(starts, shares) + before + place
        return pages

    def _take_range(self, first: int, count: int) -> Int32Array:
        pages = np.arange(first, first + count, dtype=np.int32)
        self.index.take(pages)
        return pages

    def _free_run_at(self, first: int, limit: int) -> int:
        """Consecutive free pages from `first` on, at most `limit`; crosses segment borders."""
        if first < 0 or limit < 1:
            return 0
        taken = self.index.state[first : first + limit] != _FREE
        return int(taken.argmax()) if taken.any() else len(taken)

    def _take_empty_segments(self, wanted: int) -> Int32Array | None:
        """Up to `wanted` pages from the shortest run of empty segments that holds them.

        When no run does, the longest run whole. None when no segment is empty.
        """
        per_segment = self.layout.pages_per_segment
        empty = self.index.segment_counts(PageState.FREE) == per_segment
        starts, lengths = runs_of(empty)
        if len(starts) == 0:
            return None
        enough = lengths * per_segment >= wanted
        best = _first_min(lengths, enough) if enough.any() else int(lengths.argmax())
        count = min(wanted, int(lengths[best]) * per_segment)
        return self._take_range(int(starts[best]) * per_segment, count)

    def _take_gap(self, wanted: int) -> Int32Array:
        """Up to `wanted` neighbouring pages of one segment, fullest segments first."""
        free = self.index.segment_counts(PageState.FREE)
        best_first, best_length = NO_HINT, 0
        for segment in self._fullest(free, wanted):
            first, length = self._largest_gap(segment)
            if length > best_length:
                best_first, best_length = first, length
            if length >= wanted:
                break
        if best_length >= wanted:
            best_first += self._room_for_neighbour(best_first, best_length - wanted)
        return self._take_range(best_first, min(wanted, best_length))

    def _fullest(self, free: Int32Array, wanted: int) -> list[int]:
        """Segments to look into: those that could hold `wanted`, else any; fullest first."""
        fits = np.flatnonzero(free >= wanted)
        if len(fits) == 0:
            fits = np.flatnonzero(free > 0)
            order = np.argsort(-free[fits], kind="stable")  # pieces as large as possible
        else:
            order = np.argsort(free[fits], kind="stable")
        return [int(segment) for segment in fits[order[:_GAP_SEARCH_SEGMENTS]]]

    def _largest_gap(self, segment: int) -> tuple[int, int]:
        starts, lengths = runs_of(self.index.segment_states(segment) == _FREE)
        best = int(lengths.argmax())
        return segment * self.layout.pages_per_segment + int(starts[best]), int(lengths[best])

    def _room_for_neighbour(self, first: int, spare: int) -> int:
        """Pages to leave free behind a running row's end, so that both rows can grow in place."""
        before = first - 1
        grows = before >= 0 and self.index.state[before] == _USED
        return spare // 2 if grows else 0

    def __repr__(self) -> str:
        _, free, used, cached = self.index.totals
        return f"PageAllocator(group={self.layout.group}, {free=}, {used=}, {cached=})"


def granted(pages: _Granted | None) -> _Granted:
    """What was granted, where the ladder had made sure of it; InvariantError for None."""
    if pages is None:
        raise InvariantError("the ladder promised pages that the allocator does not have")
    return pages


def runs_of(flags: npt.NDArray[np.bool_]) -> tuple[Int64Array, Int64Array]:
    """Starts and lengths of the runs of True in `flags`, both int64 [runs], in order."""
    padded = np.zeros(len(flags) + 2, np.bool_)
    padded[1:-1] = flags
    steps = (padded[1:] != padded[:-1]).nonzero()[0]  # by turns where a run begins and ends
    starts = steps[::2].copy()
    return starts, steps[1::2] - starts


def _first_min(values: Int64Array, allowed: npt.NDArray[np.bool_]) -> int:
    """Index of the first smallest value among the allowed ones."""
    return int(np.where(allowed, values, np.iinfo(np.int64).max).argmin())

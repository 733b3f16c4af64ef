"""A request's pages of one layer group, in order, and the frozen view that compute gets.

Rows of the `ReqToTokenPool` own the tables, the facade grows them, attention reads snapshots.
Memory follows the pages in use. See docs/kv_segments.md, Note [Block tables].
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sglang.srt.errors import InvariantError
from sglang.srt.mem_cache.table_rows import TableRows
from sglang.srt.mem_cache.table_space import IdRange, TableSpace

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

Run = tuple[int, int]

# How far the end of the first run is looked for at a time; doubles.
_LOOK_IDS = 64


class BlockTableSnapshot(NamedTuple):
    """The table as it stood when the batch was built; valid while the table grows.

    `page_ids` int32 [P] in order. `first_position` is the position of the first slot.
    `first_run` is the first contiguous slot range, (first_slot, num_slots); (0, 0) without pages.
    """

    page_ids: Int32Array
    first_position: int
    first_run: Run
    page_size: int

    @property
    def runs(self) -> list[Run]:
        """All contiguous slot ranges, in order; costs a look at every page id."""
        return runs_of_pages(self.page_ids, self.page_size)


class BlockTable:
    """One row's pages in order: a view of a `TableRows`. Written by the scheduler's thread only.

    Invariants: `first_page` pages were dropped before the first one (a window group's recycled
    head; 0 for full groups); `last_page` is the newest page's id, also when it was dropped since,
    -1 before the first. What is kept here is only how far the first run was followed.
    """

    __slots__ = ("_looked_end", "_looked_in", "_row", "_rows", "_run_end", "page_size")

    def __init__(self, page_size: int, rows: TableRows | None = None, row: int = 0) -> None:
        """A view of `row`, which must be taken; `rows` None: a table of its own."""
        if rows is None:
            rows = TableRows(TableSpace())
            rows.take_row(row)
        self.page_size = page_size
        self._rows = rows
        self._row = row
        # ids up to `_run_end` of the space, which were looked at up to `_looked_end`, are one run
        self._looked_in: IdRange | None = None
        self._run_end = self._looked_end = 0

    @property
    def num_pages(self) -> int:
        """Pages held now (dropped ones not counted)."""
        return self._rows.end.item(self._row) - self._rows.begin.item(self._row)

    @property
    def first_page(self) -> int:
        """Pages of the sequence before the first one that is held."""
        return self._rows.first_page.item(self._row)

    @property
    def last_page(self) -> int:
        """The newest page, held or not; -1 before the first."""
        return self._rows.last_page.item(self._row)

    @property
    def end_page(self) -> int:
        """Pages of the sequence up to the table's end, the dropped ones counted."""
        return self.first_page + self.num_pages

    @property
    def page_ids(self) -> Int32Array:
        """int32 [num_pages], zero-copy; do not write."""
        return self._rows.ids(self._row)

    @property
    def runs(self) -> list[Run]:
        """Contiguous slot ranges (first_slot, num_slots), in order; looks at every page id."""
        return runs_of_pages(self.page_ids, self.page_size)

    @property
    def next_page_hint(self) -> int:
        """The page that would continue the last run; -1 when the table is empty."""
        last = self.last_page
        return last + 1 if last >= 0 else -1

    def extend(self, pages: Int32Array) -> None:
        """Append pages in order; amortised O(len(pages)), snapshots stay true."""
        self._rows.extend(self._row, pages)

    def append_page(self, page: int) -> None:
        """Append one page."""
        self._rows.extend(self._row, np.array([page], np.int32))

    def truncate(self, num_pages: int) -> Int32Array:
        """Keep the first `num_pages` pages and return the others (a copy); snapshots stay true.

        Raises InvariantError when there are fewer pages than that.
        """
        ids = self.page_ids
        if not 0 <= num_pages <= len(ids):
            raise InvariantError(f"cannot keep {num_pages} of {len(ids)} pages")
        # a fresh range: a snapshot may still read what comes to stand behind the kept ones
        self._rows.replace(self._row, ids[:num_pages])
        if num_pages == 0:
            self._rows.last_page[self._row] = -1
        return ids[num_pages:].copy()

    def replace_pages(self, pages: Int32Array) -> None:
        """The same positions stand in other pages now (they were moved); snapshots stay true.

        Raises InvariantError when the number of pages differs.
        """
        if len(pages) != self.num_pages:
            raise InvariantError(f"{self!r} can't have its pages replaced by {len(pages)}")
        self._rows.replace(self._row, pages)

    def begin_at(self, first_page: int) -> None:
        """Let an empty table begin at page `first_page` of the sequence."""
        if self.num_pages:
            raise InvariantError(f"{self!r} has begun already")
        self._rows.first_page[self._row] = first_page

    def drop_head(self, first_page: int) -> Int32Array:
        """Forget the pages before page `first_page` of the sequence; returns them (a copy).

        Snapshots stay true. Raises InvariantError when there are too few pages.
        """
        if first_page < self.first_page:
            raise InvariantError(f"{self!r} can't begin before page {self.first_page}")
        return self._rows.drop_heads(np.array([self._row]), np.array([first_page]))

    def slots(self, first_position: int, count: int) -> Int64Array:
        """Slots of positions [first_position, first_position + count), int64 [count].

        Raises InvariantError when the table does not reach them.
        """
        size, ids, first_page = self.page_size, self.page_ids, self.first_page
        first = first_position // size - first_page
        end = -(-(first_position + count) // size) - first_page
        if first < 0 or end > len(ids):
            raise InvariantError(f"positions [{first_position}, +{count}) are outside the table")
        bases = ids[first:end].astype(np.int64) * size
        slots = (bases[:, None] + np.arange(size)).reshape(-1)
        offset = first_position % size
        return slots[offset : offset + count]

    def slot_of(self, position: int) -> int:
        """Slot of one position. Raises IndexError when the table does not reach it."""
        page, offset = divmod(position, self.page_size)
        if page < self.first_page:
            raise IndexError(position)
        return int(self.page_ids[page - self.first_page]) * self.page_size + offset

    def snapshot(self) -> BlockTableSnapshot:
        """The table as it stands now, amortised O(1); see Note [Block tables]."""
        rows, row, size = self._rows, self._row, self.page_size
        found = rows.range_of(row)
        first, ids = found
        begin, end = rows.begin.item(row), rows.end.item(row)
        position = rows.first_page.item(row) * size
        if begin == end:
            return BlockTableSnapshot(ids[:0], position, (0, 0), size)
        if self._looked_in is not found or self._run_end <= begin:
            self._looked_in, self._run_end, self._looked_end = found, begin + 1, begin + 1
        looked = self._looked_end
        if self._run_end == looked < end:
            if looked + 1 == end:  # one page more than at the last look
                self._run_end += ids.item(looked - first) == ids.item(looked - first - 1) + 1
                self._looked_end = end
            else:
                self._follow_run(ids[looked - 1 - first : end - first])
        pages = ids[begin - first : end - first]
        run = (pages.item(0) * size, (self._run_end - begin) * size)
        return BlockTableSnapshot(pages, position, run, size)

    def _follow_run(self, ids: Int32Array) -> None:
        """Look how far the run that reaches ids[0] goes on; `ids` end with the table."""
        start, step = 0, _LOOK_IDS
        while start + 1 < len(ids):
            part = ids[start : start + step]
            breaks = part[1:] - part[:-1] != 1
            if breaks.any():
                self._run_end += int(breaks.argmax())
                self._looked_end = self._run_end + 1
                return
            self._run_end += len(breaks)
            start += len(breaks)
            step *= 2
        self._looked_end = self._run_end

    def __repr__(self) -> str:
        return f"BlockTable(pages={self.num_pages}, first={self.first_page})"


def runs_of_pages(pages: Int32Array, page_size: int) -> list[Run]:
    """The slot ranges of pages in order, neighbours merged."""
    if len(pages) == 0:
        return []
    starts = np.concatenate(([0], np.flatnonzero(np.diff(pages) != 1) + 1))
    counts = np.diff(starts, append=len(pages))
    slots = pages[starts].astype(np.int64) * page_size
    return list(zip(slots.tolist(), (counts * page_size).tolist(), strict=True))

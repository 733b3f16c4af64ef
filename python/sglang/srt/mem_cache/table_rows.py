"""The block tables of all rows of one layer group, as arrays indexed by row.

`ReqToTokenPool` owns one per group; a `BlockTable` is a view of one row. A decode step reads and
writes all its rows in a few array operations and touches no object of a row. See
docs/kv_segments.md, Note [Block tables].
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from sglang.srt.errors import InvariantError
from sglang.srt.mem_cache.table_space import NO_RANGE, IdRange, TableSpace

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

# A table is looked at again after it grew by so much, or by as much as it held.
_LOOK_AGAIN_IDS: Final = 1024
_ONE: Final = np.array(1)  # numpy takes half as long with it as with an int


class TableRows:
    """Where each row's ids stand in the space.

    Per row, int64: ids [begin, end) of the space are the table, room is known up to `limit`;
    `first_page` pages of the sequence were dropped before them; `last_page` is the newest page,
    also when it was dropped since, -1 before the first. All are 0 (`last_page` -1) for a row that
    is not taken. `changes` grows whenever a row gets, loses or exchanges pages at its end, decode
    steps (`append_each`) apart.
    """

    def __init__(self, space: TableSpace) -> None:
        self.space = space
        self.changes = 0
        self.begin: Int64Array = np.zeros(0, np.int64)
        self.end: Int64Array = np.zeros(0, np.int64)
        self.limit: Int64Array = np.zeros(0, np.int64)
        self.first_page: Int64Array = np.zeros(0, np.int64)
        self.last_page: Int64Array = np.zeros(0, np.int64)
        self._ranges: list[IdRange | None] = []  # None: the row is not taken

    def take_row(self, row: int) -> None:
        """Begin an empty table; arrays reach as far as the highest row that was ever taken."""
        if row >= len(self.begin):
            self._grow_to(row + 1)
        self._reset(row, NO_RANGE)

    def free_row(self, row: int) -> None:
        """End a table; its memory goes back when no snapshot reads it."""
        self._reset(row, None)

    def range_of(self, row: int) -> IdRange:
        """What a row's ids stand in. Raises InvariantError when the row is not taken."""
        found = self._ranges[row] if row < len(self._ranges) else None
        if found is None:
            raise InvariantError(f"row {row} has no block table")
        return found

    def ids(self, row: int) -> Int32Array:
        """Page ids of a row in order, zero-copy; what keeps the view keeps the range."""
        first, ids = self.range_of(row)
        return ids[self.begin.item(row) - first : self.end.item(row) - first]

    # ---- growing ----------------------------------------------------------------------------

    def append_each(self, rows: slice | Int64Array, pages: Int64Array) -> None:
        """Append pages[i] to the table of the i-th of `rows`, which are distinct.

        Raises InvariantError when one is not taken.
        """
        place = self.end[rows]
        full = place >= self.limit[rows]
        if np.count_nonzero(full):
            for row in np.arange(len(self.end))[rows][full].tolist():
                self._make_room(row, 1)
            place = self.end[rows]
        self.space.ids[place] = pages
        self.end[rows] = place + _ONE
        self.last_page[rows] = pages

    def extend(self, row: int, pages: Int32Array) -> None:
        """Append pages in order to one row's table; amortised O(len(pages))."""
        if len(pages) == 0:
            return
        if self.end.item(row) + len(pages) > self.limit.item(row):
            self._make_room(row, len(pages))
        end = self.end.item(row)
        self.space.ids[end : end + len(pages)] = pages
        self.end[row] = end + len(pages)
        self.last_page[row] = pages[-1]
        self.changes += 1

    def replace(self, row: int, ids: Int32Array) -> None:
        """Let a table be `ids` from now on, in a fresh range: snapshots stay true."""
        self._move(row, ids, len(ids))
        self.changes += 1
        if len(ids):
            self.last_page[row] = ids[-1]

    # ---- dropping heads ---------------------------------------------------------------------

    def drop_heads(self, rows: Int64Array, first_pages: Int64Array) -> Int32Array:
        """Let the table of rows[i] begin at page first_pages[i] of its sequence, if it does not.

        Returns the pages that were dropped (a copy), row by row; snapshots stay true. The rows are
        distinct. Raises InvariantError, before any change, when a table has too few pages.
        """
        counts = first_pages - self.first_page.take(rows)
        moving = counts > 0
        if not moving.any():
            return NO_RANGE.ids
        rows, counts = rows[moving], counts[moving]
        begin = self.begin.take(rows)
        if (begin + counts > self.end.take(rows)).any():
            raise InvariantError("a table can't drop more pages than it holds")
        ends = np.cumsum(counts)
        places = np.repeat(begin - (ends - counts), counts) + np.arange(int(ends[-1]))
        dropped: Int32Array = self.space.ids[places]
        self.begin[rows] = begin + counts
        self.first_page[rows] += counts
        return dropped

    def check(self, row: int) -> None:
        """A row's ids lie in its range (for `audit`); raises InvariantError."""
        first, ids = self.range_of(row)
        begin, end, limit = (array.item(row) for array in (self.begin, self.end, self.limit))
        if not first <= begin <= end <= limit <= first + len(ids):
            raise InvariantError(f"row {row}: its table [{begin}, {end}) leaves its range")
        if end > begin and self.last_page.item(row) != self.space.ids[end - 1]:
            raise InvariantError(f"row {row}: its last page is not {self.last_page.item(row)}")

    # ---- inside -----------------------------------------------------------------------------

    def _make_room(self, row: int, count: int) -> None:
        """Let a row have room for `count` more ids: more of its range, or another range.

        A head that was dropped stays in the range until it is as long as what is left; then the
        rest moves. So a table's memory follows the pages that it holds, and what is copied is
        paid for by what was appended since.
        """
        first, ids = self.range_of(row)
        begin, end = self.begin.item(row), self.end.item(row)
        held, range_end = end - begin, first + len(ids)
        ahead = max(count, held, _LOOK_AGAIN_IDS)
        if end + count <= range_end and begin - first <= max(held, _LOOK_AGAIN_IDS):
            self.limit[row] = min(range_end, end + ahead)
            return
        self._move(row, self.ids(row), held + max(count, held))

    def _move(self, row: int, ids: Int32Array, room: int) -> None:
        """Put `ids` into a fresh range with room for `room` ids."""
        fresh = self.space.take(room) if room else NO_RANGE
        fresh.ids[: len(ids)] = ids
        self._ranges[row] = fresh
        self.begin[row] = fresh.first
        self.end[row] = fresh.first + len(ids)
        self.limit[row] = fresh.first + min(len(fresh.ids), room + max(len(ids), _LOOK_AGAIN_IDS))

    def _reset(self, row: int, ids: IdRange | None) -> None:
        self._ranges[row] = ids
        for array in (self.begin, self.end, self.limit, self.first_page):
            array[row] = 0
        self.last_page[row] = -1
        self.changes += 1

    def _grow_to(self, num_rows: int) -> None:
        size = max(num_rows, 2 * len(self.begin))
        self.begin = grown(self.begin, size)
        self.end = grown(self.end, size)
        self.limit = grown(self.limit, size)
        self.first_page = grown(self.first_page, size)
        self.last_page = grown(self.last_page, size)
        self._ranges += [None] * (size - len(self._ranges))

    def __repr__(self) -> str:
        taken = sum(found is not None for found in self._ranges)
        return f"TableRows(taken={taken}, {self.space!r})"


def grown(array: Int64Array, size: int) -> Int64Array:
    """A copy of `array` with zeros up to `size` entries."""
    larger = np.zeros(size, np.int64)
    larger[: len(array)] = array
    return larger

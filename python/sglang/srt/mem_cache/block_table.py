"""A request's pages of one layer group, in order, and the frozen view that compute gets.

Rows of the `ReqToTokenPool` own the tables, the facade grows them, attention reads snapshots.
Memory follows the pages in use. See docs/kv_segments.md, Note [Block tables].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sglang.srt.errors import InvariantError
from sglang.srt.mem_cache.id_array import IdArray, is_run

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

Run = tuple[int, int]


@dataclass(frozen=True, slots=True)
class BlockTableSnapshot:
    """The table as it stood when the batch was built; valid while the table grows.

    `page_ids` int32 [P] in order. `runs` are (first_slot, num_slots), the last one possibly
    longer by now: readers clip by seq_len. `first_position` is the position of the first slot.
    """

    page_ids: Int32Array
    first_position: int
    _runs: list[Run]
    _num_runs: int

    @property
    def runs(self) -> list[Run]:
        """Contiguous slot ranges in order; costs a copy of the list's head."""
        return self._runs[: self._num_runs]


class BlockTable:
    """Pages in order, runs kept incrementally. Written by the scheduler's thread only.

    Invariants: `runs` cover exactly the slots of `page_ids`, neighbours merged; `first_page` pages
    were dropped before the first one (a window group's recycled head; 0 for full groups);
    `last_page` is the newest page's id, also when it was dropped since, -1 before the first.
    """

    __slots__ = ("_ids", "_runs", "first_page", "last_page", "page_size")

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.first_page = 0
        self.last_page = -1  # a plain attribute: a decode step reads it for every row
        self._ids = IdArray()
        self._runs: list[Run] = []

    @property
    def num_pages(self) -> int:
        """Pages held now (dropped ones not counted)."""
        return len(self._ids)

    @property
    def end_page(self) -> int:
        """Pages of the sequence up to the table's end, the dropped ones counted."""
        return self.first_page + len(self._ids)

    @property
    def page_ids(self) -> Int32Array:
        """int32 [num_pages], zero-copy; do not write."""
        return self._ids.view()

    @property
    def runs(self) -> list[Run]:
        """(first_slot, num_slots) in order, a copy."""
        return list(self._runs)

    @property
    def next_page_hint(self) -> int:
        """The page that would continue the last run; -1 when the table is empty."""
        return self.last_page + 1 if self.last_page >= 0 else -1

    def extend(self, pages: Int32Array) -> None:
        """Append pages in order; amortised O(len(pages)), snapshots stay true."""
        if len(pages) == 0:
            return
        self._ids.append(pages)
        self.last_page = int(pages[-1])
        if is_run(pages):
            self._add_run(int(pages[0]) * self.page_size, len(pages) * self.page_size)
            return
        breaks = np.flatnonzero(np.diff(pages) != 1) + 1
        starts = [0, *breaks.tolist()]
        ends = [*starts[1:], len(pages)]
        for start, end in zip(starts, ends, strict=True):
            self._add_run(int(pages[start]) * self.page_size, (end - start) * self.page_size)

    def append_page(self, page: int) -> None:
        """Append one page."""
        self._ids.append_one(page)
        self.last_page = page
        self._add_run(page * self.page_size, self.page_size)

    def truncate(self, num_pages: int) -> Int32Array:
        """Keep the first `num_pages` pages and return the others (a copy); snapshots stay true.

        Raises InvariantError when there are fewer pages than that.
        """
        if not 0 <= num_pages <= len(self._ids):
            raise InvariantError(f"cannot keep {num_pages} of {len(self._ids)} pages")
        kept, dropped = self._ids.view(0, num_pages), self._ids.view(num_pages).copy()
        self._ids, self._runs = IdArray(), []  # fresh: a snapshot may still read the old ones
        self.last_page = -1
        self.extend(kept)
        return dropped

    def replace_pages(self, pages: Int32Array) -> None:
        """The same positions stand in other pages now (they were moved); snapshots stay true.

        Raises InvariantError when the number of pages differs.
        """
        if len(pages) != len(self._ids):
            raise InvariantError(f"{self!r} can't have its pages replaced by {len(pages)}")
        self._ids, self._runs = IdArray(), []  # fresh: a snapshot may still read the old ones
        self.extend(pages)

    def begin_at(self, first_page: int) -> None:
        """Let an empty table begin at page `first_page` of the sequence."""
        if len(self._ids):
            raise InvariantError(f"{self!r} has begun already")
        self.first_page = first_page

    def drop_head(self, first_page: int) -> Int32Array:
        """Forget the pages before page `first_page` of the sequence; returns them (a copy).

        Costs O(runs); snapshots stay true. Raises InvariantError when there are too few pages.
        """
        count = first_page - self.first_page
        if not 0 <= count <= len(self._ids):
            raise InvariantError(f"{self!r} can't drop {count} pages")
        left, runs = count * self.page_size, iter(self._runs)
        kept: list[Run] = []  # a new list: a snapshot may still read the old one
        for first_slot, num_slots in runs:
            if left < num_slots:
                kept = [(first_slot + left, num_slots - left), *runs]
                break
            left -= num_slots
        self._runs = kept
        self.first_page = first_page
        return self._ids.drop_head(count)

    def slots(self, first_position: int, count: int) -> Int64Array:
        """Slots of positions [first_position, first_position + count), int64 [count].

        Raises InvariantError when the table does not reach them.
        """
        size = self.page_size
        first = first_position // size - self.first_page
        end = -(-(first_position + count) // size) - self.first_page
        if first < 0 or end > len(self._ids):
            raise InvariantError(f"positions [{first_position}, +{count}) are outside the table")
        bases = self._ids.view(first, end).astype(np.int64) * size
        slots = (bases[:, None] + np.arange(size)).reshape(-1)
        offset = first_position % size
        return slots[offset : offset + count]

    def slot_of(self, position: int) -> int:
        """Slot of one position. Raises IndexError when the table does not reach it."""
        page, offset = divmod(position, self.page_size)
        if page < self.first_page:
            raise IndexError(position)
        return self._ids[page - self.first_page] * self.page_size + offset

    def snapshot(self) -> BlockTableSnapshot:
        """The table as it stands now, O(1); see Note [Block tables]."""
        position = self.first_page * self.page_size
        return BlockTableSnapshot(self._ids.view(), position, self._runs, len(self._runs))

    def _add_run(self, first_slot: int, num_slots: int) -> None:
        runs = self._runs
        if runs and runs[-1][0] + runs[-1][1] == first_slot:
            runs[-1] = (runs[-1][0], runs[-1][1] + num_slots)
        else:
            runs.append((first_slot, num_slots))

    def __repr__(self) -> str:
        return f"BlockTable(pages={len(self._ids)}, runs={len(self._runs)})"

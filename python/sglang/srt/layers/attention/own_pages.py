"""`OwnPages`: a request's table as one KV-parallel rank reads it, its own pages close together.

Made once a step for each request of a group whose pages are dealt to several ranks. Positions stay
those of the request; a *place* counts the tokens that this rank holds, in order. A query at
position p sees the places [0, num_before(p + 1)). No torch; nothing here computes attention. See
docs/kv_segments.md, Note [KV over ranks].

    table (pages)        8   9  10  11  12  13        rank 1 of 4 owns pages 9 and 13
    positions, size 4    0.. 4.. 8..12..16..20..
    places of rank 1         0..             4..      a query at 10 sees places [0, 4)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sglang.srt.errors import InvariantError
from sglang.srt.mem_cache.kv_share import KVShare
from sglang.srt.model_executor.forward_batch_info import BlockTableView

Int64Array = npt.NDArray[np.int64]


class OwnPages:
    """A `BlockTableView` over places: `page_ids` are int32 pages of this rank's planes.

    Raises InvariantError for a table whose head was dropped: only window groups do that, and those
    are whole on every rank.
    """

    first_position = 0

    def __init__(self, view: BlockTableView, share: KVShare, group: int, page_size: int) -> None:
        if view.first_position:
            raise InvariantError("a table without its head can't be read by several ranks")
        pages = view.page_ids
        owned = share.owns(group, pages)
        self._page_size = page_size
        self._owned = owned
        self._own_before: Int64Array = np.concatenate(([0], np.cumsum(owned)))
        self.page_ids = share.own_pages(group, pages)
        self.first_run = _first_run(self.page_ids, page_size)

    def num_before(self, position: int) -> int:
        """Places of this rank's tokens at positions below `position`."""
        page, offset = divmod(position, self._page_size)
        if page > len(self._owned) or (page == len(self._owned) and offset):
            raise InvariantError(f"position {position} is outside {len(self._owned)} pages")
        count = self._own_before.item(page) * self._page_size
        return count + offset if offset and self._owned.item(page) else count

    def positions(self, lo: int, hi: int) -> Int64Array:
        """The positions of places [lo, hi), int64."""
        pages = np.flatnonzero(self._owned)
        places = np.arange(lo, hi)
        found: Int64Array = (
            pages[places // self._page_size] * self._page_size + places % self._page_size
        )
        return found


def _first_run(pages: npt.NDArray[np.int32], page_size: int) -> tuple[int, int]:
    """The first contiguous slot range of a table, (first slot, slots); (0, 0) without pages."""
    if len(pages) == 0:
        return 0, 0
    breaks = np.flatnonzero(np.diff(pages) != 1)
    count = int(breaks[0]) + 1 if len(breaks) else len(pages)
    return int(pages[0]) * page_size, count * page_size

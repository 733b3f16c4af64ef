"""What is different where a page is a request's state: tables have gaps, and few pages are taken.

A step of many tokens leaves the state at two places at most: at the last page border that it
passes, and at its end. The table has page 0 wherever else a page would stand. `KVMemory` and the
recycler ask; nothing here holds state. See docs/kv_segments.md, Note [Recurrent state].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sglang.srt.mem_cache.allocator import PageAllocator, granted
from sglang.srt.mem_cache.block_table import BlockTable
from sglang.srt.mem_cache.kv_layout import SegmentLayout, num_pages_for

Int32Array = npt.NDArray[np.int32]

_STATES_LEFT = 2  # by a step of one request
NO_STATE = 0  # in a table: the dump page, where nothing is kept


def pages_taken(layout: SegmentLayout, count: int) -> int:
    """Pages of a group that a table takes when it grows by `count` pages."""
    return min(count, _STATES_LEFT) if layout.holds_states else count


def grow_table(allocator: PageAllocator, table: BlockTable, count: int) -> None:
    """Let a table grow by `count` pages, of which `pages_taken` are free for certain."""
    taken = pages_taken(allocator.layout, count)
    pages = granted(allocator.alloc_pages(taken, table.next_page_hint))
    if taken < count:
        pages = np.concatenate([np.full(count - taken, NO_STATE, np.int32), pages])
    table.extend(pages)


def held_of(layout: SegmentLayout, table_ids: Int32Array) -> Int32Array:
    """The pages among the entries of a table."""
    return table_ids[table_ids != NO_STATE] if layout.holds_states else table_ids


def clip_expected(
    layouts: Sequence[SegmentLayout], pages: Sequence[int], num_requests: int
) -> tuple[int, ...]:
    """`pages[g]` that the next step may ask for, counted as of tokens: of states far fewer.

    Those that a prompt leaves, and those of decoding requests that come to a page's end. Empty as
    `pages` is.
    """
    if not pages:
        return ()
    return tuple(
        min(count, _STATES_LEFT + num_pages_for(num_requests, layout.page_size))
        if layout.holds_states
        else count
        for layout, count in zip(layouts, pages, strict=True)
    )

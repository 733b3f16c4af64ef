"""What memory would have room for if some requests gave up theirs: asked before any has to.

Called by admission, which plans who gives way to a waiting request. Changes nothing but the
prefix cache's marks of use, as any look at it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import numpy as np
import numpy.typing as npt

from sglang.srt.mem_cache.allocation import KVMemory
from sglang.srt.mem_cache.lease import KVLease
from sglang.srt.mem_cache.page_owner import PageState

Int32Array = npt.NDArray[np.int32]


class RoomWithout:
    """Holds a waiting prompt's cached prefix locked, without a row; for use with `with`.

    The prefix counts as the prompt's from then on, as it would after `KVMemory.open`: who gives up
    its place does not free what the prompt stands on. `num_hit_pages` are its pages in groups that
    keep all.
    """

    def __init__(
        self,
        memory: KVMemory,
        token_ids: Int32Array,
        *,
        extra_key: str | None,
        max_prefix: int,
        priority: int,
    ) -> None:
        self._memory = memory
        hit = memory.cache.match(token_ids, extra_key, max_prefix, priority=priority)
        self._handle = hit.handle
        self.num_hit_pages = hit.num_tokens // memory.page_size

    def __enter__(self) -> RoomWithout:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._memory.cache.release(self._handle)

    def can_hold(self, pages: Sequence[int], leases: Sequence[KVLease]) -> bool:
        """Whether there would be room for `pages[g]` more in every group without `leases`."""
        return self._memory.ladder.can_hold(pages, pages_owned_by(self._memory, leases))


def pages_owned_by(memory: KVMemory, leases: Sequence[KVLease]) -> tuple[int, ...]:
    """Pages per group that could be had if `leases` were closed, and not before.

    What they computed would be cached by then, but nobody would keep it from being evicted. Costs
    O(pages of the leases).
    """
    if not leases:
        return (0,) * len(memory.allocators)
    locked = memory.cache.pages_locked_by([lease.handle for lease in leases])
    owned = []
    for g, allocator in enumerate(memory.allocators):
        tables = np.concatenate([lease.tables[g].page_ids for lease in leases])
        pages, counts = np.unique(tables, return_counts=True)
        alone = allocator.index.rows[pages] == counts
        if memory.recycler.has_window(g):
            owned.append(int(alone.sum()))  # cached pages are kept by rows there, not by locks
        else:
            used = allocator.index.state[pages] == PageState.USED
            owned.append(int((alone & used).sum()) + locked)
    return tuple(owned)

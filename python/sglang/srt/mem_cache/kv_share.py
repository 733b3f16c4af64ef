"""Which pages of a group are this rank's, and where they stand in its planes. Pure arithmetic.

With `--kv-parallel-size N` a full group's page p belongs to rank p mod N, as page p // N of its
planes: neighbouring pages of a request are neighbours on each rank too. Who turns a slot into an
address asks here: where new tokens go, attention plans, the canary's sums, compaction's copies.
See docs/kv_segments.md, Note [KV over ranks].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from sglang.srt.mem_cache.kv_layout import SegmentLayout

Int64Array = npt.NDArray[np.int64]
Ids = TypeVar("Ids", npt.NDArray[np.int32], npt.NDArray[np.int64])


@dataclass(frozen=True, slots=True)
class KVShare:
    """The part of KV-parallel rank `rank`; `sizes[g]` ranks share group g (1: each holds all)."""

    rank: int
    sizes: tuple[int, ...]
    page_size: int

    @classmethod
    def of(cls, rank: int, layouts: Sequence[SegmentLayout]) -> KVShare:
        """Rank `rank`'s part of groups cut by `layouts`."""
        sizes = tuple(layout.kv_parallel for layout in layouts)
        return cls(rank, sizes, layouts[0].page_size)

    def is_shared(self, group: int) -> bool:
        """Whether other ranks hold pages of the group that this one has no memory for."""
        return self.sizes[group] > 1

    @property
    def shares_any(self) -> bool:
        """Whether this is so of any group."""
        return any(size > 1 for size in self.sizes)

    def owns(self, group: int, pages: Ids) -> npt.NDArray[np.bool_]:
        """Which of `pages` are this rank's; bool, as many."""
        size = self.sizes[group]
        owned: npt.NDArray[np.bool_] = pages % size == (self.rank if size > 1 else 0)
        return owned

    def own_pages(self, group: int, pages: Ids) -> Ids:
        """Those of `pages` that are this rank's, in order, as pages of its planes."""
        size = self.sizes[group]
        return pages if size == 1 else pages[self.owns(group, pages)] // size

    def own_slots(self, group: int, slots: Int64Array) -> Int64Array:
        """Those of `slots` that are this rank's, in order, as slots of its planes."""
        if not self.is_shared(group):
            return slots
        pages, offsets = np.divmod(slots, self.page_size)
        own = self.owns(group, pages)
        kept: Int64Array = pages[own] // self.sizes[group] * self.page_size + offsets[own]
        return kept

    def write_slots(self, group: int, slots: Int64Array) -> Int64Array:
        """Where this rank writes tokens of `slots`, int64, as many: other ranks' tokens go to the
        dump page, which nobody reads."""
        if not self.is_shared(group):
            return slots
        pages, offsets = np.divmod(slots, self.page_size)
        own = self.owns(group, pages)
        places: Int64Array = pages // self.sizes[group] * own * self.page_size + offsets
        return places

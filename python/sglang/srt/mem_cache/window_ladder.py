"""The scarcity ladder where window groups exist: needs differ by group, so bytes decide.

Same rungs and same callers as `PageLadder`. What differs: whether a need fits is counted in whole
segments of all groups together, eviction asks each group's own cached pages first, and a group in
need may take segments that another one's evicted pages leave empty. See docs/kv_segments.md,
Note [Window groups recycle].
"""

from __future__ import annotations

from collections.abc import Sequence

from sglang.srt.mem_cache.allocator import PageAllocator
from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache
from sglang.srt.mem_cache.kv_layout import SegmentLayout
from sglang.srt.mem_cache.page_ladder import Coldest, PageLadder
from sglang.srt.mem_cache.segment_manager import SegmentManager

# Segments move between groups at most this often for one need; scattered pages could else make
# two groups take the same segment from each other for ever.
_MAX_EXCHANGES = 8


class WindowPageLadder(PageLadder):
    """`bounds[g]`: most pages that one request holds of group g, None where it keeps all."""

    def __init__(
        self,
        manager: SegmentManager,
        allocators: tuple[PageAllocator, ...],
        cache: BasePrefixCache,
        coldest: Coldest,
        bounds: tuple[int | None, ...],
    ) -> None:
        super().__init__(manager, allocators, cache, coldest)
        self._bounds = bounds

    def owned_pages(self) -> tuple[int, ...]:
        """See `PageLadder.owned_pages`."""
        return tuple(
            allocator.index.num_used + self._cache.locked_pages(g)
            for g, allocator in enumerate(self._allocators)
        )

    def can_hold(self, need: Sequence[int], gone: Sequence[int] | None = None) -> bool:
        """See `PageLadder.can_hold`: counts segments of all groups against one bound."""
        gone = gone or [0] * len(self._allocators)
        for g, (pages, less) in enumerate(zip(need, gone, strict=True)):
            if pages > self._without_growth(g) + less:
                return False
        parts = zip(self.owned_pages(), need, gone, strict=True)
        wanted = [have + more - less for have, more, less in parts]
        return _fit(self._manager.layouts, self._manager.reach_bytes, wanted)

    def headroom_pages(self) -> tuple[int, ...]:
        """Pages that one more request could grow to, the same for every group.

        A window group gives it no more than its bound.
        """
        low, high = 0, max(layout.max_segments * layout.pages_per_segment for layout in self._space)
        while low < high:
            middle = (low + high + 1) // 2
            if self.can_hold(request_pages(middle, self._bounds)):
                low = middle
            else:
                high = middle - 1
        return (low,) * len(self._allocators)

    def capacity_pages(self) -> int:
        """Pages of the longest sequence that one request could have in an empty pool."""
        low, high = 0, max(layout.max_segments * layout.pages_per_segment for layout in self._space)
        while low < high:
            middle = (low + high + 1) // 2
            pages = request_pages(middle, self._bounds)
            fits = _fit(self._space, self._manager.bound_bytes, pages)
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    @property
    def _space(self) -> tuple[SegmentLayout, ...]:
        return self._manager.layouts

    def _without_growth(self, group: int) -> int:
        allocator = self._allocators[group]
        if self._manager.can_grow:
            return allocator.layout.max_segments * allocator.layout.pages_per_segment
        pending = self._manager.pending_pages(allocator.layout.group)
        return allocator.num_free + pending + self._cache.evictable_pages(group)

    def _evict(self, need: Sequence[int]) -> bool:
        """Own cached pages first; then, coldest first, whatever empties segments of others."""
        cache = self._cache
        cache.evict_windows(self._of_windows(self._missing(need)))
        if self._full_missing(need):
            # Snapshots as cold as the coldest prefix go before its pages do.
            cache.evict_cold_windows()
            if not self._grow_over_empty(need):
                cache.evict(self._full_missing(need))
        exchanges = 0
        while not self._enough(need):
            before = self.free_pages()
            if self._grow_over_empty(need):
                return True
            exchanges += before != self.free_pages()
            segments = [allocator.layout.pages_per_segment for allocator in self._allocators]
            freed = cache.evict_windows(self._of_windows(segments))
            gone = any(freed) or cache.evict(max(segments))
            if not gone or exchanges > _MAX_EXCHANGES:
                return self._enough(need)
        return True

    def _of_windows(self, pages: Sequence[int]) -> list[int]:
        pairs = zip(pages, self._bounds, strict=True)
        return [0 if bound is None else count for count, bound in pairs]

    def _full_missing(self, need: Sequence[int]) -> int:
        pairs = zip(self._missing(need), self._bounds, strict=True)
        return max((count for count, bound in pairs if bound is None), default=0)


def request_pages(num_pages: int, bounds: Sequence[int | None]) -> list[int]:
    """Pages per group of one request whose sequence has `num_pages` pages."""
    return [num_pages if bound is None else min(num_pages, bound) for bound in bounds]


def _fit(layouts: Sequence[SegmentLayout], budget_bytes: int, pages: Sequence[int]) -> bool:
    """Whether so many pages of every group fit the budget and the slot space, in segments."""
    total = 0
    for layout, count in zip(layouts, pages, strict=True):
        segments = -(-count // layout.pages_per_segment)
        if segments >= layout.max_segments:
            return False
        total += segments * layout.segment_bytes
    return total <= budget_bytes

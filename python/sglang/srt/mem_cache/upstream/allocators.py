"""`TokenToKVPoolAllocator` and `PagedTokenToKVPoolAllocator`: slots from a `PageAllocator`.

Same names and meanings as SGLang's: int64 tensors of slots, None when there are too few, page 0
never given out. What differs is what is underneath (no free list is copied or searched) and that
a slot that is freed twice raises instead of being given to two requests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sglang.srt.errors import InvariantError
from sglang.srt.mem_cache.allocator import NO_HINT, PageAllocator
from sglang.srt.mem_cache.kv_layout import GroupId, SegmentLayout
from sglang.srt.mem_cache.page_owner import PageState
from sglang.srt.mem_cache.upstream.slots import as_int64, pages_of_slots, slots_of_pages

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

_PAGES_PER_SEGMENT = 1024


class PagedTokenToKVPoolAllocator:
    """Whole pages of `page_size` slots, `size` slots in all.

    `pages` None: a pool of its own, with all slots [page_size, size + page_size). Otherwise the
    slots are those of `pages`, of which `ensure(n)` may bring more (map, evict): it makes n pages
    free and says whether it could. `kvcache` is only kept; `need_sort` changes nothing here.
    """

    def __init__(
        self,
        size: int,
        page_size: int,
        dtype: torch.dtype,
        device: str,
        kvcache: Any,
        need_sort: bool = False,
        *,
        pages: PageAllocator | None = None,
        ensure: Callable[[int], bool] | None = None,
    ) -> None:
        self.size = size
        self.page_size = page_size
        self.dtype = dtype
        self.device = device
        self.need_sort = need_sort
        self.pages = _own_pool(size // page_size, page_size) if pages is None else pages
        self._kvcache = kvcache
        self._ensure = ensure
        self._group: list[Int64Array] | None = None
        self._born = self._used_pages()

    def available_size(self) -> int:
        """Slots that can be had without `ensure`."""
        return self.pages.num_free * self.page_size

    def get_kvcache(self) -> Any:
        """The pool that was given at construction."""
        return self._kvcache

    def alloc(self, need_size: int) -> torch.Tensor | None:
        """`need_size` slots, whole pages, int64; None when there are too few.

        Raises ValueError when that is no multiple of the page size.
        """
        if need_size % self.page_size:
            raise ValueError(f"{need_size} slots are not whole pages of {self.page_size}")
        pages = self._take(np.array([need_size // self.page_size]), np.array([NO_HINT]))
        return None if pages is None else self._out(slots_of_pages(pages, self.page_size))

    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
    ) -> torch.Tensor | None:
        """Slots for positions [prefix, seq) of each request, int64 [extend_num_tokens]; None.

        `last_loc` is the slot of position prefix - 1 (-1: no prefix); its page is filled first.
        """
        del prefix_lens, seq_lens
        size = self.page_size
        prefix, end, last = as_int64(prefix_lens_cpu), as_int64(seq_lens_cpu), as_int64(last_loc)
        counts = end - prefix
        if (counts < 0).any() or int(counts.sum()) != extend_num_tokens:
            raise ValueError(f"{extend_num_tokens} tokens are not the sum of the extends")
        first_new = -(-prefix // size)  # the first page of a request that it does not have
        needed = np.maximum(0, -(-end // size) - first_new)
        pages = self._take(needed, np.where(last >= 0, last // size + 1, NO_HINT))
        if pages is None:
            return None
        starts = np.cumsum(counts) - counts
        offset = np.arange(extend_num_tokens) - np.repeat(starts, counts)
        position = np.repeat(prefix, counts) + offset
        slots = np.repeat(last, counts) + 1 + offset  # true in the page that is filled first
        fresh = position // size >= np.repeat(first_new, counts)
        number = np.repeat(np.cumsum(needed) - needed - first_new, counts) + position // size
        slots[fresh] = pages[number[fresh]].astype(np.int64) * size + position[fresh] % size
        return self._out(slots)

    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        """One slot per request, int64 [B], None when there are too few pages.

        `seq_lens` count the new token; `last_loc` is the slot of the one before it.
        """
        del seq_lens
        lengths, last = as_int64(seq_lens_cpu), as_int64(last_loc)
        starting = (lengths - 1) % self.page_size == 0
        hints = np.where(last >= 0, last // self.page_size + 1, NO_HINT)[starting]
        pages = self._take(np.ones(len(hints), np.int64), hints)
        if pages is None:
            return None
        slots = last + 1
        slots[starting] = pages.astype(np.int64) * self.page_size
        return self._out(slots)

    def free(self, free_index: torch.Tensor) -> None:
        """Give back the pages of these slots, whole; inside a free group: at its end.

        Raises InvariantError when one is not taken.
        """
        slots = as_int64(free_index)
        if self._group is not None:
            self._group.append(slots)
        elif len(slots):
            pages = pages_of_slots(slots, self.page_size)
            if np.isin(pages, self._born).any():
                raise InvariantError("pages were freed that were never given out")
            self.pages.index.drop_row(pages)

    def free_group_begin(self) -> None:
        """Collect what is freed from now on."""
        self._group = []

    def free_group_end(self) -> None:
        """Free what was collected, in one go."""
        group, self._group = self._group, None
        if group:
            self.free(torch.from_numpy(np.concatenate(group)))

    def clear(self) -> None:
        """Free everything that was given out; a free group ends unheard."""
        self._group = None
        self.restore_state(self._born)

    def backup_state(self) -> Int32Array:
        """What is taken now, for `restore_state`."""
        return self._used_pages()

    def restore_state(self, state: Int32Array) -> None:
        """Free what was taken since `backup_state`, take again what was freed since."""
        index, now = self.pages.index, self._used_pages()
        index.drop_row(np.setdiff1d(now, state, assume_unique=True))
        index.take(np.setdiff1d(state, now, assume_unique=True))

    def _used_pages(self) -> Int32Array:
        return np.flatnonzero(self.pages.index.state == PageState.USED).astype(np.int32)

    def _take(self, counts: Int64Array, hints: Int64Array) -> Int32Array | None:
        """Pages for each request, one after the other; all or none. One look per request."""
        total = int(counts.sum())
        enough = total <= self.pages.num_free or (self._ensure is not None and self._ensure(total))
        if not enough:
            return None
        pieces = [np.empty(0, np.int32)]
        for count, hint in zip(counts.tolist(), hints.tolist(), strict=True):
            if count:
                piece = self.pages.alloc_pages(count, hint)
                if piece is None:
                    raise InvariantError("pages that were free are gone")
                pieces.append(piece)
        return np.concatenate(pieces)

    def _out(self, slots: Int64Array) -> torch.Tensor:
        return torch.from_numpy(slots).to(self.device)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(page_size={self.page_size}, {self.pages!r})"


class TokenToKVPoolAllocator(PagedTokenToKVPoolAllocator):
    """Pages of one slot: any number of slots, in any order."""

    def __init__(
        self,
        size: int,
        dtype: torch.dtype,
        device: str,
        kvcache: Any,
        need_sort: bool = False,
        *,
        pages: PageAllocator | None = None,
        ensure: Callable[[int], bool] | None = None,
    ) -> None:
        super().__init__(size, 1, dtype, device, kvcache, need_sort, pages=pages, ensure=ensure)


def _own_pool(num_pages: int, page_size: int) -> PageAllocator:
    """Pages 1 to num_pages; page 0 and what the last segment has too many are out of play."""
    per_segment = min(_PAGES_PER_SEGMENT, num_pages + 1)
    num_segments = -(-(num_pages + 1) // per_segment)
    layout = SegmentLayout(GroupId(0), page_size, per_segment, num_segments, 1, 1, 1, 1)
    pages = PageAllocator(layout)
    pages.add_segments(range(num_segments))
    beyond = np.arange(num_pages + 1, num_segments * per_segment, dtype=np.int32)
    kept = np.concatenate([np.zeros(1, np.int32), beyond])
    pages.index.take(kept)
    return pages

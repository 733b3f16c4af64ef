"""The cache that keeps nothing: `--disable-radix-cache`.

Same promises as the radix cache, with every match empty and nothing ever inserted, so that the
facade has one path.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sglang.srt.errors import InvariantError
from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache, MatchResult, PrefixHandle

Int32Array = npt.NDArray[np.int32]


class ChunkCache(BasePrefixCache):
    """Owns no page; only counts the handles that are out."""

    def __init__(self, num_groups: int) -> None:
        self._num_groups = num_groups
        self._num_handles = 0

    @property
    def num_pages(self) -> int:
        return 0

    @property
    def num_locked_pages(self) -> int:
        return 0

    def match_len(self, token_ids: Int32Array, extra_key: str | None, max_tokens: int) -> int:
        del token_ids, extra_key, max_tokens
        return 0

    def match(
        self,
        token_ids: Int32Array,
        extra_key: str | None,
        max_tokens: int,
        *,
        priority: int = 0,
    ) -> MatchResult:
        del token_ids, extra_key, max_tokens, priority
        self._num_handles += 1
        none = tuple(np.empty(0, np.int32) for _ in range(self._num_groups))
        return MatchResult(0, none, PrefixHandle(None, 0))

    def insert(
        self,
        handle: PrefixHandle,
        token_ids: Int32Array,
        num_tokens: int,
        page_ids: tuple[Int32Array, ...],
    ) -> int:
        del token_ids, num_tokens, page_ids
        if handle.released:
            raise InvariantError("insert with a released handle")
        return 0

    def release(self, handle: PrefixHandle) -> None:
        handle.mark_released()
        self._num_handles -= 1

    def evict(self, num_pages: int) -> int:
        del num_pages
        return 0

    def evict_idle(self, now: float, idle_seconds: float) -> int:
        del now, idle_seconds
        return 0

    def clear(self) -> int:
        return 0

    def check(self, handles: Sequence[PrefixHandle]) -> None:
        if self._num_handles != len(handles):
            raise InvariantError(f"{self!r} but {len(handles)} are out")

    def __repr__(self) -> str:
        return f"ChunkCache(handles={self._num_handles})"

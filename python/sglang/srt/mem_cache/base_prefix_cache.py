"""What a prefix cache promises: token ids and pages in, locked handles out.

The facade in `allocation.py` is the only caller. A cache knows no request: it sees int32 token
arrays, page ids per layer group, and handles. A locked prefix is never evicted; a handle is
released exactly once. See docs/kv_segments.md, Note [A running prefill is shared] and
Note [Eviction cuts tails].
"""

from __future__ import annotations

import abc
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sglang.srt.errors import InvariantError

Int32Array = npt.NDArray[np.int32]


class PrefixHandle:
    """A lock on the prefix [0, num_tokens) of one token sequence.

    `node` is the cache's own place mark and moves down as the holder's tokens enter the cache.
    `priority` is that of the request that holds it.
    """

    __slots__ = ("node", "num_tokens", "priority", "released")

    def __init__(self, node: Any, num_tokens: int, priority: int = 0) -> None:
        self.node = node
        self.num_tokens = num_tokens
        self.priority = priority
        self.released = False

    def mark_released(self) -> None:
        """Note the one release. Raises InvariantError on the second."""
        if self.released:
            raise InvariantError(f"{self!r} was released twice")
        self.released = True

    def __repr__(self) -> str:
        return f"PrefixHandle(tokens={self.num_tokens}, released={self.released})"


@dataclass(frozen=True, slots=True)
class MatchResult:
    """A hit of `num_tokens` tokens (a multiple of the page size, 0: none) and its pages.

    `page_ids[g]` int32 [num_tokens / page_size] are copies. `handle` is locked.
    """

    num_tokens: int
    page_ids: tuple[Int32Array, ...]
    handle: PrefixHandle


@dataclass(frozen=True, slots=True)
class CachedRest:
    """Page `page_ids[g]` of each group begins with the `num_tokens` tokens that were looked for.

    0 < num_tokens <= page size.
    """

    num_tokens: int
    page_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class HeldWindow:
    """A row's pages of one group: `page_ids` int32 [P], the first is the sequence's `first_page`.

    `first_page` is 0 in groups that keep all.
    """

    page_ids: Int32Array
    first_page: int


class BasePrefixCache(abc.ABC):
    """Pages are counted alike in all groups that keep every token of a cached prefix.

    Window groups hold fewer; `locked_pages`, `evictable_pages` and the methods about windows know.
    """

    @property
    @abc.abstractmethod
    def num_pages(self) -> int:
        """Pages that the cache owns, in each group."""

    @property
    @abc.abstractmethod
    def num_locked_pages(self) -> int:
        """Pages under a lock, in each group; the others can be evicted."""

    @property
    def num_evictable_pages(self) -> int:
        """Pages that `evict` could free, in each group."""
        return self.num_pages - self.num_locked_pages

    def locked_pages(self, group: int) -> int:
        """Cached pages of one group that eviction can't free now."""
        del group
        return self.num_locked_pages

    def evictable_pages(self, group: int) -> int:
        """Cached pages of one group that eviction could free."""
        del group
        return self.num_evictable_pages

    def pages_locked_by(self, handles: Sequence[PrefixHandle]) -> int:
        """Pages that only `handles` keep locked, in each group that keeps all."""
        del handles
        return 0

    def keep_window(
        self,
        handle: PrefixHandle,
        token_ids: Int32Array,
        num_tokens: int,
        held: Sequence[HeldWindow],
    ) -> None:
        """Keep the window at the end of [0, num_tokens), just inserted, for repeats.

        `held[g]` are the pages of the row that computed it. Nothing to do without window groups.
        """
        del handle, token_ids, num_tokens, held

    def evict_windows(self, wanted: Sequence[int]) -> tuple[int, ...]:
        """Free snapshots of windows, coldest first, until `wanted[g]` pages of each group are
        free or no snapshot is left; returns pages freed by group."""
        return (0,) * len(wanted)

    def evict_cold_windows(self) -> int:
        """Free the snapshots that were not used after the prefix that `evict` would take next.

        Returns how many edges lost theirs.
        """
        return 0

    @abc.abstractmethod
    def match_len(self, token_ids: Int32Array, extra_key: str | None, max_tokens: int) -> int:
        """Tokens of `token_ids` that `match` would find, at most `max_tokens`; changes nothing."""

    @abc.abstractmethod
    def match(
        self,
        token_ids: Int32Array,
        extra_key: str | None,
        max_tokens: int,
        *,
        priority: int = 0,
    ) -> MatchResult:
        """Find and lock the longest cached prefix of at most `max_tokens` tokens.

        The handle must be released, also when nothing was found. `priority` is the request's,
        for caches that evict by it: the higher, the longer what it uses stays.
        """

    def find_rest(
        self, handle: PrefixHandle, token_ids: Int32Array, max_tokens: int
    ) -> CachedRest | None:
        """The cached page that begins with the most tokens that follow a hit.

        Looks at token_ids[handle.num_tokens : max_tokens]; `handle` is as `match` gave it. Locks
        and changes nothing, so the page is good until the next eviction. None: no page begins with
        enough of them to be worth a copy.
        """
        del handle, token_ids, max_tokens
        return None

    @abc.abstractmethod
    def insert(
        self,
        handle: PrefixHandle,
        token_ids: Int32Array,
        num_tokens: int,
        page_ids: tuple[Int32Array, ...],
    ) -> int:
        """Offer the computed tokens [0, num_tokens) of the handle's sequence, held by one row.

        `page_ids[g]` are the row's pages from position 0. Whole pages past the handle that the
        cache lacks become its own and stay locked by the handle. Returns how many tokens of the
        sequence are now in the cache; pages of tokens that were there already stay the row's own.
        """

    @abc.abstractmethod
    def release(self, handle: PrefixHandle) -> None:
        """Unlock. Raises InvariantError on a second release."""

    @abc.abstractmethod
    def evict(self, num_pages: int) -> int:
        """Free up to `num_pages` unlocked pages per group; returns how many. evict(0) is safe."""

    @abc.abstractmethod
    def evict_idle(self, now: float, idle_seconds: float) -> int:
        """Free unlocked prefixes that nobody used for `idle_seconds`; returns pages per group.

        `now` also becomes the time of every use until the next call. Negative: never evict.
        Bounded work: call again until it returns 0.
        """

    @abc.abstractmethod
    def clear(self) -> int:
        """Free everything unlocked; returns pages per group."""

    def move_pages(self, group: int, nodes: Set[int], moved_to: Int32Array) -> None:
        """Pages of one group were moved: page p of the nodes with these ids is now moved_to[p].

        A cache that owns no page has nothing to do.
        """
        del group, nodes, moved_to

    @abc.abstractmethod
    def check(self, handles: Sequence[PrefixHandle]) -> None:
        """Recount everything against the `handles` that are out; raises InvariantError."""

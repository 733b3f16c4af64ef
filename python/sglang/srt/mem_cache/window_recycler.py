"""Gives the old pages of window groups back: out of the tables at once, free when nobody reads.

Owned by the facade in `allocation.py`, which asks it before it counts what a step needs and tells
it which forwards were launched and completed. It decides nothing about scarcity. See
docs/kv_segments.md, Note [Window groups recycle].
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sglang.srt.mem_cache.allocator import PageAllocator
from sglang.srt.mem_cache.lease import KVLease
from sglang.srt.mem_cache.state_group import held_of
from sglang.srt.mem_cache.table_rows import TableRows
from sglang.srt.mem_cache.window_rule import WindowRule

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


class _Leaving(NamedTuple):
    """Pages of a group that no table has any more, readable until forward `epoch` is done."""

    epoch: int
    group: int
    pages: Int32Array


class WindowRecycler:
    """Drops heads of tables. Invariant: a page here still has the row that it was dropped by."""

    def __init__(
        self,
        rules: Sequence[WindowRule | None],
        allocators: Sequence[PageAllocator],
        tables: Sequence[TableRows],
    ) -> None:
        self._rules = [(g, rule) for g, rule in enumerate(rules) if rule is not None]
        self._allocators = allocators
        self._tables = tables
        self._leaving: deque[_Leaving] = deque()
        self._launched = 0
        self._completed = 0

    @property
    def active(self) -> bool:
        """False when every group keeps all: then nothing here ever has work."""
        return bool(self._rules)

    def before_extend(self, lease: KVLease, num_tokens: int) -> None:
        """Recycle what neither the next `num_tokens` tokens of `lease` nor later ones see."""
        for g, rule in self._rules:
            self._drop(g, lease, rule.kept_page(lease.num_tokens, num_tokens))

    def before_decode(self, rows: Int64Array, lengths: Int64Array) -> None:
        """As `before_extend` for one decoded token of every row; rows[i] has lengths[i] tokens."""
        for g, rule in self._rules:
            kept = rule.kept_pages_of_decode(lengths)
            pages = self._tables[g].drop_heads(rows, kept)
            while len(pages):
                # rows may drop the same cached page: once for each, as rows are counted once a call
                firsts = np.unique(pages, return_index=True)[1]
                self._leave(g, pages[firsts])
                pages = np.delete(pages, firsts)

    def note_launched(self, epoch: int) -> None:
        """Forward `epoch` may read what the tables held until now."""
        self._launched = max(self._launched, epoch)

    def note_completed(self, epoch: int) -> None:
        """Forward `epoch` and all before are done: what only they read becomes free."""
        self._completed = max(self._completed, epoch)
        while self._leaving and self._leaving[0].epoch <= self._completed:
            _, group, pages = self._leaving.popleft()
            self._allocators[group].index.drop_row(pages)

    def leaving_pages(self, group: int) -> list[Int32Array]:
        """Pages of a group that tables have dropped and a forward may still read or write."""
        return [leaving.pages for leaving in self._leaving if leaving.group == group]

    def has_window(self, group: int) -> bool:
        """Whether a row drops its oldest pages of a group."""
        return any(g == group for g, _ in self._rules)

    def pages_held(self, lease: KVLease) -> tuple[int, ...]:
        """Pages per group that stay this lease's when it moves on.

        In a window group pages that other rows read as well do not count: the lease will drop them
        and take new ones while the others keep them.
        """
        held = [table.num_pages for table in lease.tables]
        for g, _ in self._rules:
            rows = self._allocators[g].index.rows[lease.tables[g].page_ids]
            held[g] = int((rows == 1).sum())
        return tuple(held)

    def _drop(self, group: int, lease: KVLease, first_page: int) -> None:
        table = lease.tables[group]
        if first_page > table.first_page:
            self._leave(group, table.drop_head(first_page))

    def _leave(self, group: int, pages: Int32Array) -> None:
        """A row has dropped pages: they are free at once, or when no forward reads them."""
        pages = held_of(self._allocators[group].layout, pages)
        if self._launched > self._completed:
            self._leaving.append(_Leaving(self._launched, group, pages))
        else:
            self._allocators[group].index.drop_row(pages)

    def __repr__(self) -> str:
        return f"WindowRecycler(groups={len(self._rules)}, leaving={len(self._leaving)})"

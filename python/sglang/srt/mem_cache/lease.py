"""Values between the scheduler and memory: a request's lease, its need, and what it was given.

The scheduler holds leases and reads their tables; only `KVMemory` in `allocation.py` makes,
changes and closes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sglang.srt.errors import InvariantError
from sglang.srt.mem_cache.base_prefix_cache import PrefixHandle
from sglang.srt.mem_cache.block_table import BlockTable, BlockTableSnapshot
from sglang.srt.mem_cache.kv_layout import ReqPoolIdx, num_pages_for
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.segment_state import Ticket

Int64Array = npt.NDArray[np.int64]


class KVLease:
    """One request's hold on memory: a row, its block tables and a locked prefix; closed once.

    `num_tokens` tokens have a slot, the first `num_cached_tokens` of them came from the cache. The
    last state that the cache was left is that after `snapshot_tokens`, where states are kept.
    That number and the tables are kept by the row, in the pool's arrays, and only shown here.
    Invariant while open: every table holds exactly the pages of `num_tokens` tokens, or of
    `reached` tokens when that is more: those that had a slot before the last `rewind`. Forwards may
    still write tokens from `rewritten_from` on, whenever they got their slots (None: only such as
    are new): a draft model's layers are behind.
    """

    __slots__ = (
        "_rows",
        "closed",
        "extra_key",
        "handle",
        "next_share_tokens",
        "num_cached_tokens",
        "reached",
        "rewritten_from",
        "row",
        "snapshot_tokens",
        "tables",
    )

    def __init__(
        self,
        rows: ReqToTokenPool,
        row: ReqPoolIdx,
        handle: PrefixHandle,
        extra_key: str | None,
    ) -> None:
        self._rows = rows
        self.row = row
        self.tables: tuple[BlockTable, ...] = rows.tables(row)
        self.handle = handle
        self.extra_key = extra_key
        self.num_cached_tokens = handle.num_tokens
        self.next_share_tokens = 0
        self.snapshot_tokens = handle.num_tokens
        self.reached = 0
        self.rewritten_from: int | None = None
        self.closed = False
        self.num_tokens = handle.num_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens that have a slot; 0 once the lease is closed."""
        return 0 if self.closed else self._rows.num_tokens.item(self.row)

    @num_tokens.setter
    def num_tokens(self, num_tokens: int) -> None:
        self._rows.set_num_tokens(self.row, num_tokens)

    @property
    def has_spare_pages(self) -> bool:
        """Whether the tables hold pages beyond those of the tokens that have a slot."""
        if self.reached == 0 or self.reached <= self.num_tokens:
            return False
        size = self.tables[0].page_size
        return num_pages_for(self.reached, size) > num_pages_for(self.num_tokens, size)

    def leaves_snapshot(self, num_tokens: int, distance: int | None, wanted: bool) -> bool:
        """Whether the cache is to be left what a repeat needs that ends at `num_tokens`.

        It is where it is `wanted`, or so many tokens as `distance` after the last (None: not
        otherwise). Side effect: notes that it is.
        """
        if distance is not None and num_tokens - self.snapshot_tokens >= distance:
            wanted = True
        if wanted:
            self.snapshot_tokens = num_tokens
        return wanted

    def rewind(self, num_tokens: int) -> None:
        """Forget the slots of all but the first `num_tokens` tokens: drafts that were not taken.

        Their pages stay for what comes instead, so that no table changes. No forward may be under
        way. Raises InvariantError when there are fewer tokens than that.
        """
        if num_tokens > self.num_tokens:
            raise InvariantError(f"{self!r} can't be rewound to {num_tokens} tokens")
        self.reached = max(self.reached, self.num_tokens)
        self.num_tokens = num_tokens

    def __repr__(self) -> str:
        return (
            f"KVLease(row={self.row}, tokens={self.num_tokens}, cached={self.num_cached_tokens}, "
            f"locked={self.handle.num_tokens}, closed={self.closed})"
        )


@dataclass(frozen=True, slots=True)
class PageNeed:
    """Room for `num_tokens` new tokens after the lease's present ones."""

    lease: KVLease
    num_tokens: int


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """The requests of a decode step as an array; good for as long as the same ones go on.

    `rows` int64 [B] are the rows of `leases`, in their order.
    """

    leases: tuple[KVLease, ...]
    rows: Int64Array

    @classmethod
    def of(cls, leases: Sequence[KVLease]) -> DecodeRows:
        """Raises InvariantError when a lease is closed."""
        for lease in leases:
            if lease.closed:
                raise InvariantError(f"{lease!r} is closed")
        rows = np.fromiter((lease.row for lease in leases), np.int64, len(leases))
        return cls(tuple(leases), rows)

    @classmethod
    def of_needs(cls, needs: Sequence[PageNeed]) -> DecodeRows:
        """Raises InvariantError when a lease is closed or needs more than one token."""
        for need in needs:
            if need.num_tokens != 1:
                raise InvariantError(f"a decode need of {need.num_tokens} tokens")
        return cls.of([need.lease for need in needs])


@dataclass(frozen=True, slots=True)
class KVPlacement:
    """Where new tokens go: `out_cache_loc[g]` int64 [T], tokens of all needs in order.

    `ticket` is growth for coming steps that was under way when the slots were given, or None.
    `tables()[g]` are snapshots of the needs' tables, to be asked for before anything else changes
    memory: the same tuple as in the step before where no table has changed. None: nobody keeps
    them.
    """

    out_cache_loc: tuple[Int64Array, ...]
    ticket: Ticket | None
    tables: Callable[[], tuple[tuple[BlockTableSnapshot, ...], ...]] | None = None

    @classmethod
    def concat(cls, parts: Sequence[KVPlacement]) -> KVPlacement:
        """Placements of one step's parts (at least one) as one, in order."""
        if len(parts) == 1:
            return parts[0]
        groups = range(len(parts[0].out_cache_loc))
        locs = tuple(np.concatenate([part.out_cache_loc[g] for part in parts]) for g in groups)
        return cls(locs, parts[-1].ticket)

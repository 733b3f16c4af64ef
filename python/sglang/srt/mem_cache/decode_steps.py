"""The coming decode steps of the same requests, foreseen once.

Decoding rows grow by a token a step, so which of them starts a page, and when, follows from their
lengths as they are now. `KVMemory` in `allocation.py` keeps one `DecodeSteps` while the same
requests go on and nothing else moves a row: a step then asks for the pages that are due and adds
one to the rest. See docs/kv_segments.md, Note [Decode steps].

Legend: B rows of the batch, P rows that start a page in this step.
"""

from __future__ import annotations

from functools import cached_property
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from sglang.srt.mem_cache.block_table import BlockTableSnapshot
from sglang.srt.mem_cache.id_array import is_run
from sglang.srt.mem_cache.lease import DecodeRows
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool

Int64Array = npt.NDArray[np.int64]
Places = slice | Int64Array

_ONE: Final = np.array(1)  # numpy takes half as long with it as with an int


class Starting(NamedTuple):
    """Rows that start a page: places in the batch and rows of the pool, int64 [P] each.

    Either is a slice where the numbers stand in a row: cheaper to read and to write with.
    """

    places: Places
    rows: Places
    num_rows: int


_NOBODY: Final = Starting(slice(0, 0), slice(0, 0), 0)


class DecodeSteps:
    """Lengths and next slots of B rows. Invariant: true as long as `pool.changes` is `_seen`.

    `lengths` int64 [B] are the tokens that the rows have before the coming step; do not write.
    """

    def __init__(self, batch: DecodeRows, pool: ReqToTokenPool, page_size: int) -> None:
        self.batch = batch
        self.lengths: Int64Array = pool.num_tokens.take(batch.rows)
        self._pool = pool
        self._page_size = page_size
        self._seen = pool.changes
        self._step = 0
        self._offsets = self.lengths % page_size
        self._rows = _places(batch.rows)
        self._tables: tuple[tuple[BlockTableSnapshot, ...], ...] | None = None
        self._next_slots: list[Int64Array] = []
        for group in pool.groups:
            slots = group.last_page.take(batch.rows)
            slots *= page_size
            slots += self._offsets
            self._next_slots.append(slots)

    def foresees(self, batch: DecodeRows) -> bool:
        """Whether the coming step of `batch` is this object's."""
        return batch is self.batch and self._pool.changes == self._seen

    @property
    def distinct(self) -> bool:
        """Every row has taken a page of its own by now: no two stand in the same last page."""
        return self._step >= self._page_size

    @property
    def starting(self) -> Starting:
        """Rows whose next token is the first of a page."""
        if self._page_size == 1:
            return Starting(slice(0, len(self.lengths)), self._rows, len(self.lengths))
        if self._step == 0:  # the only step, where requests come and go
            return self._start(np.flatnonzero(self._offsets == 0))
        return self._due.get(self._step % self._page_size, _NOBODY)

    def hints(self, group: int, starting: Starting) -> Int64Array:
        """The page behind the last one of every starting row, int64 [P]; 0 for an empty table."""
        hints: Int64Array = self._pool.groups[group].last_page[starting.rows] + _ONE
        return hints

    def take_slots(self, group: int, starting: Starting, pages: Int64Array | None) -> Int64Array:
        """Slots of this step's tokens, int64 [B]; `pages` int64 [P] are what starting rows got."""
        slots = self._next_slots[group]
        if pages is not None:
            slots[starting.places] = pages * self._page_size
            self._tables = None
        self._next_slots[group] = slots + _ONE
        return slots

    def tables(self) -> tuple[tuple[BlockTableSnapshot, ...], ...]:
        """The rows' tables by group as they are now; the same tuples while no row starts a page.

        For groups that drop no page while they decode.
        """
        if self._tables is None:
            leases = self.batch.leases
            self._tables = tuple(
                tuple([lease.tables[group].snapshot() for lease in leases])
                for group in range(len(self._pool.groups))
            )
        return self._tables

    def advance(self) -> None:
        """The step's slots were given: all rows are a token longer, here and in the pool."""
        self.lengths += _ONE
        self._pool.num_tokens[self._rows] = self.lengths
        self._step += 1
        self._seen = self._pool.changes

    @cached_property
    def _due(self) -> dict[int, Starting]:
        """Who starts a page in step s, by s modulo the page size; steps without anyone are left
        out."""
        due = -self._offsets % self._page_size
        order = np.argsort(due, kind="stable")
        steps, firsts = np.unique(due[order], return_index=True)
        ends = [*firsts.tolist()[1:], len(order)]
        parts = zip(steps.tolist(), firsts.tolist(), ends, strict=True)
        return {step: self._start(order[first:end]) for step, first, end in parts}

    def _start(self, places: Int64Array) -> Starting:
        if len(places) == 0:
            return _NOBODY
        return Starting(_places(places), _places(self.batch.rows[places]), len(places))

    def __repr__(self) -> str:
        return f"DecodeSteps(rows={len(self.lengths)}, step={self._step})"


def _places(ids: Int64Array) -> Places:
    """`ids`, as a slice where they stand in a row."""
    if len(ids) == 0 or not is_run(ids):
        return ids
    return slice(ids.item(0), ids.item(-1) + 1)

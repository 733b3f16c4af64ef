"""`ReqToTokenPool` with SGLang's `write` and reads, over block tables instead of a dense matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sglang.srt.mem_cache import memory_pool
from sglang.srt.mem_cache.block_table import BlockTable
from sglang.srt.mem_cache.kv_layout import ReqPoolIdx
from sglang.srt.mem_cache.upstream.slots import as_int64, pages_in_order


class ReqToTokenPool:
    """Rows 1..size; a row's memory follows what was written, not `max_context_len`.

    A row holds whole pages, so what is written has to lie in pages as the allocators give it.
    """

    def __init__(
        self,
        size: int,
        max_context_len: int,
        device: str,
        enable_memory_saver: bool = False,
        *,
        page_size: int = 1,
    ) -> None:
        del enable_memory_saver
        self.size = size
        self.max_context_len = max_context_len
        self.device = device
        self.page_size = page_size
        self._rows = memory_pool.ReqToTokenPool(size, 1, page_size)

    def available_size(self) -> int:
        """Rows that can still be had."""
        return self._rows.available_size()

    def alloc(self, need_size: int) -> list[int] | None:
        """`need_size` rows, None when there are too few."""
        if need_size > self._rows.available_size():
            return None
        rows = [self._rows.alloc_row() for _ in range(need_size)]
        return [int(row) for row in rows if row is not None]

    def free(self, free_index: int | Sequence[int]) -> None:
        """Give rows back. Raises InvariantError when one is not taken."""
        rows = [free_index] if isinstance(free_index, int) else free_index
        for row in rows:
            self._rows.free_row(ReqPoolIdx(row))

    def clear(self) -> None:
        """Give all rows back."""
        self._rows = memory_pool.ReqToTokenPool(self.size, 1, self.page_size)

    def write(self, indices: tuple[int, slice], values: torch.Tensor) -> None:
        """Set the slots of a row's positions: `indices` is (row, slice(first, end)).

        Raises ValueError when positions are left out, or when the slots are not those of whole
        pages in order (the last page, and the first, which the row may have already, in part).
        """
        row, place = indices
        table = self._table(row)
        slots = as_int64(values)
        first = place.start or 0
        end = first + len(slots) if place.stop is None else place.stop
        if end - first != len(slots) or end > self.max_context_len:
            raise ValueError(f"{len(slots)} slots do not fit positions [{first}, {end})")
        if len(slots) == 0:
            return
        size = self.page_size
        # what the first and the last page hold outside [first, end) follows from their slots
        head, tail = first % size, -end % size
        before = slots[0] + np.arange(-head, 0)
        behind = slots[-1] + 1 + np.arange(tail)
        pages = pages_in_order(np.concatenate([before, slots, behind]), size)
        at = first // size
        if at + bool(head) > table.num_pages:
            raise ValueError(f"position {first} is beyond what row {row} holds")
        if head and table.page_ids[at] != pages[0]:
            raise ValueError(f"position {first} lies in a page that row {row} has elsewhere")
        rest = table.truncate(at)[len(pages) :]
        table.extend(pages)
        table.extend(rest)

    def read(self, row: int, first: int, end: int) -> torch.Tensor:
        """Slots of a row's positions [first, end), int64. Raises InvariantError outside."""
        slots = self._table(row).slots(first, end - first)
        return torch.from_numpy(slots.copy()).to(self.device)

    @property
    def req_to_token(self) -> _Matrix:
        """The matrix that is not there: `[row, first:end]` reads, assignment writes."""
        return _Matrix(self)

    def _table(self, row: int) -> BlockTable:
        return self._rows.tables(ReqPoolIdx(row))[0]

    def __repr__(self) -> str:
        return f"upstream.{self._rows!r}"


class _Matrix:
    """Row and slice in, slots out."""

    def __init__(self, pool: ReqToTokenPool) -> None:
        self._pool = pool

    def __getitem__(self, indices: tuple[int, slice]) -> torch.Tensor:
        row, place = indices
        if place.stop is None:
            raise ValueError("say where the slice ends: a row has no fixed length")
        return self._pool.read(row, place.start or 0, place.stop)

    def __setitem__(self, indices: tuple[int, slice], values: Any) -> None:
        self._pool.write(indices, values)

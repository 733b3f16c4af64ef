"""Builds a draft model's part of a step from the scheduler's batch; plain planning, no compute.

The draft model's layers are groups of their own in the same memory, and its tokens have the slots
that the step was given there. See docs/speculative_decoding.md, Note [A draft model].

Shape letters: T packed tokens, B requests that the draft model computes something of, D drafted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sglang.srt.managers.schedule_batch import ScheduleBatch, ScheduledReq
from sglang.srt.model_executor.forward_batch_info import (
    BatchGeometry,
    BlockTableView,
    DraftBatch,
    ForwardBatch,
    ForwardMode,
    Int64Array,
)
from sglang.srt.utils.progress import Progress

Tables = tuple[tuple[BlockTableView, ...], ...]


@dataclass(frozen=True, slots=True)
class DraftSide:
    """What a draft model's batches are made with: its pool and backend, and its groups, which
    begin with `first_group` of the memory's."""

    pool: Any  # MHATokenToKVPool, a part
    backend: Any  # AttentionBackend
    first_group: int
    page_size: int
    progress: Progress

    def plan(self, batch: ScheduleBatch, tables: Tables) -> DraftBatch | None:
        """The draft model's part; `tables` are those of its groups, for all requests of the step.

        None: it has nothing to compute.
        """
        taken = [(i, item) for i, item in enumerate(batch.items) if item.follow_from is not None]
        if not taken:
            return None
        numbers, items = [i for i, _ in taken], [item for _, item in taken]
        own = tuple(tuple(views[i] for i in numbers) for views in tables)
        starts = np.array([_first_of(item) for item in items], np.int64)
        ends = np.array([item.follow_to for item in items], np.int64)
        lengths = np.array([len(item.draft) for item in items], np.int64)
        ids = [i.req.vocabulary_ids(_first_of(i), i.follow_to) for i in items]
        first = self._forward(
            np.concatenate(ids).astype(np.int64),
            starts,
            ends - starts,
            lengths > 0,
            own,
            [self._slots(items, group, starts, ends) for group in range(len(tables))],
        )
        ahead, rows_ahead = self._ahead(items, ends, lengths, own)
        lengths = lengths[lengths > 0]
        rows = np.repeat(np.arange(len(lengths)), lengths)
        depths = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        places = _places_of(batch)
        return DraftBatch(first, ahead, rows_ahead, depths * len(lengths) + rows, places)

    def _ahead(
        self, items: Sequence[ScheduledReq], ends: Int64Array, lengths: Int64Array, tables: Tables
    ) -> tuple[tuple[ForwardBatch, ...], tuple[Int64Array, ...]]:
        """A step of one token each for every token of a draft but its first."""
        batches, rows = [], []
        drafted = np.flatnonzero(lengths > 0)
        for depth in range(1, int(lengths.max(initial=0))):
            chosen = np.flatnonzero(lengths > depth)
            some = [items[i] for i in chosen.tolist()]
            places = ends[chosen] + depth - 1
            batches.append(
                self._forward(
                    np.zeros(len(chosen), np.int64),
                    places,
                    np.ones(len(chosen), np.int64),
                    np.ones(len(chosen), np.bool_),
                    tuple(tuple(views[i] for i in chosen) for views in tables),
                    [self._slots(some, g, places, places + 1) for g in range(len(tables))],
                )
            )
            rows.append(np.searchsorted(drafted, chosen))
        return tuple(batches), tuple(rows)

    def _slots(
        self, items: Sequence[ScheduledReq], group: int, starts: Int64Array, ends: Int64Array
    ) -> Int64Array:
        """Slots of the tokens [start, end) of each request."""
        spans = zip(items, starts.tolist(), ends.tolist(), strict=True)
        return np.concatenate(
            [
                item.lease.tables[self.first_group + group].slots(start, end - start)
                for item, start, end in spans
            ]
        )

    def _forward(
        self,
        input_ids: Int64Array,
        prefix_lens: Int64Array,
        lens: Int64Array,
        says: np.ndarray[Any, np.dtype[np.bool_]],
        tables: Tables,
        slots: Sequence[Int64Array],
    ) -> ForwardBatch:
        """`lens` tokens of each request behind `prefix_lens`; the last of those that it `says`
        something of are wanted."""
        ends = np.cumsum(lens)
        q_starts = ends - lens
        positions = np.arange(ends[-1]) + np.repeat(prefix_lens - q_starts, lens)
        logits_rows = (ends - 1)[says]
        geometry = BatchGeometry(
            seq_lens=prefix_lens + lens,
            extend_prefix_lens=prefix_lens,
            extend_seq_lens=lens,
            q_starts=q_starts,
            logits_rows=logits_rows,
            block_tables=tables,
            page_size=self.page_size,
        )
        is_decode = len(input_ids) == len(lens) == len(logits_rows)
        return ForwardBatch(
            forward_mode=ForwardMode.DECODE if is_decode else ForwardMode.EXTEND,
            input_ids=torch.from_numpy(input_ids),
            positions=torch.from_numpy(positions),
            geometry=geometry,
            out_cache_loc=tuple(torch.from_numpy(loc) for loc in slots),
            logits_rows=torch.from_numpy(logits_rows),
            token_to_kv_pool=self.pool,
            attn_backend=self.backend,
            attn_plan=self.backend.plan(geometry),
            progress=self.progress,
        )


def _first_of(item: ScheduledReq) -> int:
    assert item.follow_from is not None
    return item.follow_from


def _places_of(batch: ScheduleBatch) -> Int64Array:
    """Packed rows [N] of the step's drafted tokens."""
    places: list[int] = []
    end = 0
    for item in batch.items:
        end += item.num_tokens
        places += range(end - len(item.draft), end)
    return np.array(places, np.int64)

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

from sglang.srt.managers.schedule_batch import Follow, ScheduleBatch, ScheduledReq
from sglang.srt.model_executor.forward_batch_info import (
    BatchGeometry,
    BlockTableView,
    DraftBatch,
    ForwardBatch,
    ForwardMode,
    HiddenSpan,
    HiddenStates,
    Int64Array,
    wanted_rows,
)
from sglang.srt.utils.progress import Progress

Tables = tuple[tuple[BlockTableView, ...], ...]
Part = tuple[int, ScheduledReq, Follow]


@dataclass(frozen=True, slots=True)
class DraftSide:
    """What a draft model's batches are made with: its pool and backend, and its groups, which
    begin with `first_group` of the memory's. `reads_hidden`: it is a head on hidden states, those
    that go into `state_layers` of the model or, where there are none, its last ones."""

    pool: Any  # MHATokenToKVPool, a part
    backend: Any  # AttentionBackend
    first_group: int
    page_size: int
    progress: Progress
    reads_hidden: bool = False
    state_layers: tuple[int, ...] = ()

    def plan(self, batch: ScheduleBatch, tables: Tables) -> DraftBatch | None:
        """The draft model's part; `tables` are those of its groups, for all requests of the step.

        None: it has nothing to compute, nor to keep.
        """
        parts = [(i, item, item.follow) for i, item in enumerate(batch.items) if item.follow]
        # What the model has to compute first ends behind its first token.
        before = [part for part in parts if not self.reads_hidden or part[2].end <= part[1].start]
        after = [part for part in parts if part not in before]
        if not parts and not self.reads_hidden:
            return None
        numbers, items = [i for i, *_ in before], [item for _, item, _ in before]
        ends = np.array([follow.end for *_, follow in before], np.int64)
        lengths = np.array([len(item.draft) for item in items], np.int64)
        ahead, rows_ahead = self._ahead(items, ends, lengths, _of(tables, numbers))
        lengths = lengths[lengths > 0]
        rows = np.repeat(np.arange(len(lengths)), lengths)
        depths = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return DraftBatch(
            self._read(before, tables),
            ahead,
            rows_ahead,
            depths * len(lengths) + rows,
            _places_of(batch),
            self._read(after, tables),
            self._hidden(batch, before, after),
        )

    def _read(self, parts: Sequence[Part], tables: Tables) -> ForwardBatch | None:
        """The tokens that each request lacks; None: there are no requests."""
        if not parts:
            return None
        items, follows = [item for _, item, _ in parts], [follow for *_, follow in parts]
        starts = np.array([follow.first for follow in follows], np.int64)
        ends = np.array([follow.end for follow in follows], np.int64)
        shift = int(self.reads_hidden)
        ids = [
            item.req.vocabulary_ids(follow.first + shift, follow.end + shift)
            for _, item, follow in parts
        ]
        return self._forward(
            np.concatenate(ids).astype(np.int64),
            starts,
            ends - starts,
            np.array([bool(item.draft) for item in items]),
            _of(tables, [i for i, *_ in parts]),
            [self._slots(items, group, starts, ends) for group in range(len(tables))],
        )

    def _hidden(
        self, batch: ScheduleBatch, before: Sequence[Part], after: Sequence[Part]
    ) -> HiddenStates | None:
        if not self.reads_hidden:
            return None
        kept = tuple(
            HiddenSpan(item.lease.row, item.start, item.start + item.num_tokens)
            for item in batch.items
        )
        return HiddenStates(kept, _spans(before), _spans(after), wanted_rows(batch))

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
                    _of(tables, chosen.tolist()),
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


def _of(tables: Tables, requests: Sequence[int]) -> Tables:
    return tuple(tuple(views[i] for i in requests) for views in tables)


def _spans(parts: Sequence[Part]) -> tuple[HiddenSpan, ...]:
    return tuple(HiddenSpan(item.lease.row, follow.first, follow.end) for _, item, follow in parts)


def _places_of(batch: ScheduleBatch) -> Int64Array:
    """Packed rows [N] of the step's drafted tokens."""
    places: list[int] = []
    end = 0
    for item in batch.items:
        end += item.num_tokens
        places += range(end - len(item.draft), end)
    return np.array(places, np.int64)

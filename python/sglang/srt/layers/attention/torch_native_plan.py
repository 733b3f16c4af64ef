"""What the torch_native backend will read, and in which pieces: decided once a step.

A work item is a block of one request's consecutive queries; its pieces cover the keys that these
queries see. A piece is one kernel call: a contiguous slot range read in place, or scattered pages
gathered into a bounded buffer. Made from lengths and tables only and shared by all layers of the
same shape; nothing here computes attention. Positions, with an item's queries at [lo, hi):

    no window, or nothing cut:   [0 .......... lo)[lo .. hi)
                                     FULL           CAUSAL
    window W, hi - lo <= W:      [lo-W+1 .. hi-W)[hi-W ...... lo)[lo .. hi)
                                     BAND            FULL          CAUSAL
    window W, hi - lo > W:       [lo-W+1 ........................... hi)
                                     BAND
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sglang.srt.errors import InvariantError
from sglang.srt.model_executor.forward_batch_info import BatchGeometry, BlockTableView

PageIds = npt.NDArray[np.int32]


class Visibility(enum.Enum):
    """Which keys of a piece a query sees: all, those up to itself, or a masked band."""

    FULL = "full"
    CAUSAL = "causal"
    BAND = "band"


class SlotRun(NamedTuple):
    """Keys in slots [first_slot, first_slot + num_tokens), read in place."""

    first_slot: int
    num_tokens: int


class PageList(NamedTuple):
    """Keys on scattered pages (int64 [P]): `num_tokens` of them after the first `skip` slots."""

    pages: torch.Tensor
    skip: int
    num_tokens: int


class Piece(NamedTuple):
    """One kernel call's keys; the first stands at `position`."""

    keys: SlotRun | PageList
    visibility: Visibility
    position: int


class WorkItem(NamedTuple):
    """Rows [row, row + num_rows) of q, at positions [position, position + num_rows)."""

    row: int
    num_rows: int
    position: int
    pieces: tuple[Piece, ...]


class Single(NamedTuple):
    """A query whose keys are one slot run: the common decode."""

    row: int
    first_slot: int
    num_tokens: int


class PlanKey(NamedTuple):
    """What plans differ by within a step. `pruned`: only the rows of `logits_rows` are queries."""

    group: int
    window: int | None
    pruned: bool
    limits: PieceLimits


class PieceLimits(NamedTuple):
    """Bounds of a plan in tokens.

    Items have at most `query_block` queries. Runs below `min_run_tokens` are gathered with their
    neighbours, at most `gather_tokens` at a time. A fully visible piece has at most `max_keys` keys
    and, down to a page, `pair_budget` pairs of query and key.
    """

    query_block: int
    min_run_tokens: int
    gather_tokens: int
    max_keys: int
    pair_budget: int


class _Table(NamedTuple):
    """A block table as the planner reads it; `run_end` is where its first slot run ends."""

    first_position: int
    first_slot: int
    run_end: int
    page_ids: PageIds
    page_size: int

    @classmethod
    def of(cls, view: BlockTableView, page_size: int) -> _Table:
        # `runs` costs a copy: asked once.
        first_slot, num_slots = view.runs[0] if len(view.page_ids) else (0, 0)
        start = view.first_position
        return cls(start, first_slot, start + num_slots, view.page_ids, page_size)

    def pages(self, lo: int, hi: int) -> tuple[PageIds, int]:
        """Pages that hold positions [lo, hi), and the position of the first one's first slot."""
        begin = (lo - self.first_position) // self.page_size
        end = -(-(hi - self.first_position) // self.page_size)
        if begin < 0 or end > len(self.page_ids):
            raise InvariantError(
                f"positions [{lo}, {hi}) are outside a block table of {len(self.page_ids)} pages "
                f"from position {self.first_position}"
            )
        return self.page_ids[begin:end], self.first_position + begin * self.page_size

    def keys(self, lo: int, hi: int) -> SlotRun | PageList:
        """Positions [lo, hi) as one tensor: in place when contiguous, else to be gathered."""
        if lo >= self.first_position and hi <= self.run_end:
            return SlotRun(self.first_slot + lo - self.first_position, hi - lo)
        pages, base = self.pages(lo, hi)
        skip = lo - base
        if len(pages) == 1 or bool((np.diff(pages) == 1).all()):
            return SlotRun(int(pages[0]) * self.page_size + skip, hi - lo)
        return PageList(torch.from_numpy(pages.astype(np.int64)), skip, hi - lo)


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """The work of one layer: `singles` with their rows as a tensor, and everything else."""

    singles: tuple[Single, ...]
    single_rows: torch.Tensor  # int64 [len(singles)]
    items: tuple[WorkItem, ...]


def make_layer_plan(geometry: BatchGeometry, key: PlanKey) -> LayerPlan:
    """Plan a layer from lengths and tables; pure.

    Raises InvariantError when a table does not hold what its request has to see.
    """
    singles: list[Single] = []
    items: list[WorkItem] = []
    for request, row, count, position in _query_runs(geometry, key.pruned):
        table = _Table.of(geometry.block_tables[key.group][request], geometry.page_size)
        for start in range(0, count, key.limits.query_block):
            num_rows = min(key.limits.query_block, count - start)
            pieces = tuple(_pieces(table, position + start, num_rows, key))
            item = WorkItem(row + start, num_rows, position + start, pieces)
            keys = pieces[0].keys
            if num_rows == 1 and len(pieces) == 1 and isinstance(keys, SlotRun):
                singles.append(Single(item.row, keys.first_slot, keys.num_tokens))
            else:
                items.append(item)
    rows = torch.tensor([single.row for single in singles], dtype=torch.int64)
    return LayerPlan(tuple(singles), rows, tuple(items))


def _query_runs(geometry: BatchGeometry, pruned: bool) -> Iterator[tuple[int, int, int, int]]:
    """(request, first row of q, rows, position of the first) of consecutive queries."""
    starts = geometry.q_starts
    if not pruned:
        lens, prefixes = geometry.extend_seq_lens.tolist(), geometry.extend_prefix_lens.tolist()
        for request, row in enumerate(starts.tolist()):
            if lens[request]:
                yield request, row, lens[request], prefixes[request]
        return
    rows = geometry.logits_rows
    if not len(rows):
        return
    owner = np.searchsorted(starts, rows, side="right") - 1
    positions = geometry.extend_prefix_lens[owner] + rows - starts[owner]
    fresh = (np.diff(rows) != 1) | (np.diff(owner) != 0)
    begins = [0, *(np.flatnonzero(fresh) + 1).tolist()]
    for begin, end in zip(begins, [*begins[1:], len(rows)], strict=True):
        yield int(owner[begin]), begin, end - begin, int(positions[begin])


def _pieces(table: _Table, lo: int, num_rows: int, key: PlanKey) -> Iterator[Piece]:
    """The pieces of queries at positions [lo, lo + num_rows); see the module's drawing."""
    hi = lo + num_rows
    window, limits = key.window, key.limits
    first = 0 if window is None else max(0, lo - window + 1)
    if num_rows == 1:
        yield from _full_pieces(table, first, hi, num_rows, limits)
        return
    last_cut = 0 if window is None else max(0, hi - window)  # below it, some query sees nothing
    if last_cut > lo:
        yield Piece(table.keys(first, hi), Visibility.BAND, first)
        return
    if last_cut > first:
        yield Piece(table.keys(first, last_cut), Visibility.BAND, first)
    yield from _full_pieces(table, last_cut, lo, num_rows, limits)
    yield Piece(table.keys(lo, hi), Visibility.CAUSAL, lo)


def _full_pieces(
    table: _Table, lo: int, hi: int, num_rows: int, limits: PieceLimits
) -> Iterator[Piece]:
    """Cover positions [lo, hi) with pieces that each of `num_rows` queries sees."""
    in_place = min(limits.max_keys, limits.pair_budget // num_rows)
    for stretch_lo, stretch_hi, scattered in _stretches(table, lo, hi, limits.min_run_tokens):
        bound = min(in_place, limits.gather_tokens) if scattered else in_place
        # Whole pages, so that no page is gathered twice.
        bound = max(table.page_size, bound - bound % table.page_size)
        start = stretch_lo
        while start < stretch_hi:
            end = min(stretch_hi, start - start % table.page_size + bound)
            yield Piece(table.keys(start, end), Visibility.FULL, start)
            start = end


def _stretches(
    table: _Table, lo: int, hi: int, min_run_tokens: int
) -> Iterator[tuple[int, int, bool]]:
    """Cut [lo, hi) into (lo, hi, scattered): one slot run, or short runs side by side."""
    if lo >= hi:
        return
    if table.first_position <= lo and hi <= table.run_end:
        yield lo, hi, False
        return
    pages, base = table.pages(lo, hi)
    size = table.page_size
    begins = np.concatenate(([0], np.flatnonzero(np.diff(pages) != 1) + 1))
    ends = np.append(begins[1:], len(pages))
    short = (ends - begins) * size < min_run_tokens
    # A stretch begins at every run, except at a short one after a short one. A short run between
    # long ones stays in place: gathering it alone would save no call.
    heads = np.flatnonzero(np.append(True, ~(short[1:] & short[:-1])))
    tails = np.append(heads[1:], len(begins)) - 1
    for head, tail in zip(heads.tolist(), tails.tolist(), strict=True):
        begin, end = base + int(begins[head]) * size, base + int(ends[tail]) * size
        yield max(lo, begin), min(hi, end), head != tail

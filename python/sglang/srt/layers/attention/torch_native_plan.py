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
    chunk that begins at c:      [c .......... lo)[lo .. hi)       an item never leaves its chunk,
                                     FULL           CAUSAL         so a whole chunk is one CAUSAL
    keys of several ranks:       [0 .......... lo)[lo .. hi)       those that this rank holds, by
                                     FULL           MASKED         their places (`OwnPages`)
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
from sglang.srt.layers.attention.own_pages import OwnPages
from sglang.srt.model_executor.forward_batch_info import BatchGeometry, BlockTableView

PageIds = npt.NDArray[np.int32]

_MIN_BATCH = 3  # fewer single queries gain nothing from being gathered


class Visibility(enum.Enum):
    """Which keys of a piece a query sees: all, those up to itself, a band, or as a mask says."""

    FULL = "full"
    CAUSAL = "causal"
    BAND = "band"
    MASKED = "masked"


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
    """One kernel call's keys; the first stands at `position` (of `OwnPages`: at that place).

    `mask` float32 [queries, keys] of 0 and -inf, for MASKED only.
    """

    keys: SlotRun | PageList
    visibility: Visibility
    position: int
    mask: torch.Tensor | None = None


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


class QueryBatch(NamedTuple):
    """N single queries of similar, moderate length, computed together over gathered pages.

    `pages` int64 [N * P] are their tables, filled up with each one's last page. Of the N * P *
    page_size gathered keys, those at `padding` int64 belong to nobody's sight: they are zeroed,
    because an unwritten slot may hold NaN, and hidden by `mask` float32 [N, 1, 1, P * page_size].
    """

    rows: torch.Tensor  # int64 [N]
    pages: torch.Tensor
    padding: torch.Tensor
    mask: torch.Tensor


class PlanKey(NamedTuple):
    """What plans differ by within a step. `pruned`: only the rows of `logits_rows` are queries.

    At most one of `window` (sliding) and `chunk` is set, in tokens.
    """

    group: int
    window: int | None
    pruned: bool
    limits: PieceLimits
    chunk: int | None = None

    def first_seen(self, position: int) -> int:
        """First position that a query at `position` sees."""
        if self.chunk is not None:
            return position - position % self.chunk
        return 0 if self.window is None else max(0, position - self.window + 1)


class PieceLimits(NamedTuple):
    """Bounds of a plan in tokens.

    Items have at most `query_block` queries. Runs below `min_run_tokens` are gathered with their
    neighbours, at most `gather_tokens` at a time. A fully visible piece has at most `max_keys` keys
    and, down to a page, `pair_budget` pairs of query and key. Single queries of at most
    `batch_tokens` keys are gathered and computed together (0: never). A slot run crosses no border
    of `segment_tokens` (0: memory is contiguous, there are none).
    """

    query_block: int
    min_run_tokens: int
    gather_tokens: int
    max_keys: int
    pair_budget: int
    batch_tokens: int
    segment_tokens: int = 0


class _Table(NamedTuple):
    """A block table as the planner reads it; `run_end` is where its first slot run ends."""

    first_position: int
    first_slot: int
    run_end: int
    page_ids: PageIds
    page_size: int
    segment_pages: int  # 0: runs may be of any length

    @classmethod
    def of(cls, view: BlockTableView, page_size: int, segment_tokens: int = 0) -> _Table:
        first_slot, num_slots = view.first_run
        if segment_tokens:
            num_slots = min(num_slots, segment_tokens - first_slot % segment_tokens)
        start = view.first_position
        segment_pages = segment_tokens // page_size
        return cls(start, first_slot, start + num_slots, view.page_ids, page_size, segment_pages)

    def run_begins(self, pages: PageIds) -> npt.NDArray[np.bool_]:
        """[P - 1]: whether page i + 1 begins a new slot run."""
        begins: npt.NDArray[np.bool_] = np.diff(pages) != 1
        if self.segment_pages:
            begins |= pages[1:] % self.segment_pages == 0
        return begins

    def num_pages(self, lo: int, hi: int) -> int:
        """Pages that hold positions [lo, hi)."""
        first = (lo - self.first_position) // self.page_size
        return -(-(hi - self.first_position) // self.page_size) - first

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
        if len(pages) == 1 or not self.run_begins(pages).any():
            return SlotRun(int(pages[0]) * self.page_size + skip, hi - lo)
        return PageList(torch.from_numpy(pages.astype(np.int64)), skip, hi - lo)


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """The work of one layer; every row of q is in exactly one place."""

    batches: tuple[QueryBatch, ...]
    singles: tuple[Single, ...]
    single_rows: torch.Tensor  # int64 [len(singles)]
    items: tuple[WorkItem, ...]


class _Candidate(NamedTuple):
    """A query at position hi - 1 that sees [lo, hi) and may join a batch."""

    num_pages: int
    row: int
    table: _Table
    lo: int
    hi: int


def make_layer_plan(geometry: BatchGeometry, key: PlanKey) -> LayerPlan:
    """Plan a layer from lengths and tables; pure.

    Raises InvariantError when a table does not hold what its request has to see.
    """
    items: list[WorkItem] = []
    candidates: list[_Candidate] = []
    limits = key.limits
    for request, row, count, position in _query_runs(geometry, key.pruned):
        view = geometry.block_tables[key.group][request]
        table = _Table.of(view, geometry.page_size, limits.segment_tokens)
        own = view if isinstance(view, OwnPages) else None
        lo = key.first_seen(position)
        hi = position + 1 if own is None else own.num_before(position + 1)
        if count == 1 and hi - lo <= limits.batch_tokens:
            if hi > lo:
                candidates.append(_Candidate(table.num_pages(lo, hi), row, table, lo, hi))
            continue
        for start, num_rows in _query_blocks(position, count, key):
            if own is not None:
                items += _own_items(table, own, row + start, position + start, num_rows, key)
                continue
            items.append(_make_item(table, row + start, position + start, num_rows, key))
    batches, alone = _make_batches(candidates, limits, geometry.page_size)
    items += [_make_item(c.table, c.row, c.hi - 1, 1, key) for c in alone]
    singles, rest = _split_singles(items)
    rows = torch.tensor([single.row for single in singles], dtype=torch.int64)
    return LayerPlan(batches, singles, rows, rest)


def _query_blocks(position: int, count: int, key: PlanKey) -> Iterator[tuple[int, int]]:
    """Cut `count` queries from `position` on into (offset, queries) of items."""
    start = 0
    while start < count:
        num_rows = min(key.limits.query_block, count - start)
        if key.chunk is not None:
            num_rows = min(num_rows, key.chunk - (position + start) % key.chunk)
        yield start, num_rows
        start += num_rows


def _make_item(table: _Table, row: int, position: int, num_rows: int, key: PlanKey) -> WorkItem:
    return WorkItem(row, num_rows, position, tuple(_pieces(table, position, num_rows, key)))


def _own_items(
    table: _Table, own: OwnPages, row: int, position: int, num_rows: int, key: PlanKey
) -> Iterator[WorkItem]:
    """The item of some queries over the keys that this rank holds; none when they see none."""
    before, end = own.num_before(position), own.num_before(position + num_rows)
    if end == 0:
        return
    if num_rows == 1:
        yield _make_item(table, row, end - 1, 1, key)
        return
    pieces = list(_full_pieces(table, 0, before, num_rows, key.limits))
    if before < end:
        key_at = torch.from_numpy(own.positions(before, end))
        hidden = key_at > torch.arange(position, position + num_rows).unsqueeze(1)
        mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
        pieces.append(Piece(table.keys(before, end), Visibility.MASKED, before, mask))
    yield WorkItem(row, num_rows, position, tuple(pieces))


def _split_singles(items: list[WorkItem]) -> tuple[tuple[Single, ...], tuple[WorkItem, ...]]:
    singles: list[Single] = []
    rest: list[WorkItem] = []
    for item in items:
        keys = item.pieces[0].keys
        if item.num_rows == 1 and len(item.pieces) == 1 and isinstance(keys, SlotRun):
            singles.append(Single(item.row, keys.first_slot, keys.num_tokens))
        else:
            rest.append(item)
    return tuple(singles), tuple(rest)


def _make_batches(
    candidates: list[_Candidate], limits: PieceLimits, page_size: int
) -> tuple[tuple[QueryBatch, ...], list[_Candidate]]:
    """Group queries of similar length; those that find too little company come back."""
    batches: list[QueryBatch] = []
    alone: list[_Candidate] = []
    group: list[_Candidate] = []
    # Stable: equal lengths stay in the order of their rows.
    for candidate in [*sorted(candidates, key=lambda c: c.num_pages), None]:
        if candidate is not None and _fits(group, candidate, limits, page_size):
            group.append(candidate)
            continue
        if len(group) >= _MIN_BATCH:
            batches.append(_make_batch(group, page_size))
        else:
            alone += group
        group = [] if candidate is None else [candidate]
    return tuple(batches), alone


def _fits(
    group: list[_Candidate], longest: _Candidate, limits: PieceLimits, page_size: int
) -> bool:
    """True when the group with `longest` stays within the gather bound and a little padding."""
    if not group:
        return True
    gathered = (len(group) + 1) * longest.num_pages * page_size
    slack = 1 + group[0].num_pages // 4
    return gathered <= limits.gather_tokens and longest.num_pages - group[0].num_pages <= slack


def _make_batch(group: list[_Candidate], page_size: int) -> QueryBatch:
    width = group[-1].num_pages
    pages = np.empty((len(group), width), np.int64)
    visible = np.zeros((len(group), width * page_size), np.bool_)
    for i, (num_pages, _, table, lo, hi) in enumerate(group):
        ids, base = table.pages(lo, hi)
        pages[i, :num_pages] = ids
        pages[i, num_pages:] = ids[-1]
        visible[i, lo - base : hi - base] = True
    mask = torch.zeros(visible.shape).masked_fill_(torch.from_numpy(~visible), float("-inf"))
    return QueryBatch(
        rows=torch.tensor([c.row for c in group], dtype=torch.int64),
        pages=torch.from_numpy(pages.reshape(-1)),
        padding=torch.from_numpy(np.flatnonzero(~visible.reshape(-1))),
        mask=mask.view(len(group), 1, 1, -1),
    )


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
    first = key.first_seen(lo)
    if num_rows == 1:
        yield from _full_pieces(table, first, hi, num_rows, limits)
        return
    # Below it some query of the item sees nothing; all queries of a chunk begin where it does.
    last_cut = first if window is None else max(0, hi - window)
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
    begins = np.concatenate(([0], np.flatnonzero(table.run_begins(pages)) + 1))
    ends = np.append(begins[1:], len(pages))
    short = (ends - begins) * size < min_run_tokens
    # A stretch begins at every run, except at a short one after a short one. A short run between
    # long ones stays in place: gathering it alone would save no call.
    heads = np.flatnonzero(np.append(True, ~(short[1:] & short[:-1])))
    tails = np.append(heads[1:], len(begins)) - 1
    for head, tail in zip(heads.tolist(), tails.tolist(), strict=True):
        begin, end = base + int(begins[head]) * size, base + int(ends[tail]) * size
        yield max(lo, begin), min(hi, end), head != tail

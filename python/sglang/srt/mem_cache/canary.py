"""The KV canary: beside every slot stands a mark of who wrote it, checked before it is read.

A mark is a hash of the whole token sequence up to a position (its namespace included), so a page
that was given away, mixed up, freed while in use or lost in a move can't pass for the right one.
Mode `full` also keeps a sum of the K and V bytes. Off by default and then not there at all.
Called by `managers/scheduler_canary.py`, compaction and the audit. See docs/kv_segments.md,
Note [Canary].
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from sglang.srt.errors import InvariantError
from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache
from sglang.srt.mem_cache.block_table import BlockTable
from sglang.srt.mem_cache.kv_layout import GroupId
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.page_owner import PageIndex, PageState
from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.srt.mem_cache.window_index import NO_PAGE

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]

_MASK = (1 << 64) - 1
_BASE = 0x9E3779B97F4A7C15  # odd: its powers never vanish modulo 2^64
_MIX = np.uint64(0xBF58476D1CE4E5B9)
_SUM_SLOTS = 4096  # slots whose bytes are summed at a time


@dataclass(frozen=True, slots=True)
class ChainPoint:
    """Where a token sequence stands: the hash of its first `position` tokens."""

    position: int
    value: int


def chain_start(extra_key: str | None) -> ChainPoint:
    """The empty sequence of a namespace."""
    return ChainPoint(0, 0 if extra_key is None else 1 + zlib.crc32(extra_key.encode()))


def chain_marks(at: ChainPoint, tokens: Int32Array) -> tuple[UInt64Array, ChainPoint]:
    """Marks of `tokens` (int32 [n]) that follow `at`, uint64 [n], and where the sequence ends.

    The chain is a polynomial hash modulo 2^64, h(i) = h(i-1) + (token + 1) * base^(i+1), so that
    a chunk is a few array operations; a mark mixes its bits and is never 0 (0: nobody wrote).
    """
    powers = np.full(len(tokens), _BASE, np.uint64)
    powers[:1] = pow(_BASE, at.position + 1, 1 << 64)
    values = np.cumsum((tokens.astype(np.uint64) + np.uint64(1)) * np.cumprod(powers))
    values = values + np.uint64(at.value)
    end = int(values[-1]) if len(values) else at.value
    marks = (values ^ (values >> np.uint64(29))) * _MIX | np.uint64(1)
    return marks, ChainPoint(at.position + len(tokens), end & _MASK)


class KVCanary:
    """Marks of every slot of every group; grows with the page indexes.

    `full`: sums of the bytes too. They are taken when the forward that wrote them is over, so a
    forward must be finished before the next one is prepared: overlap is off under the canary.
    """

    def __init__(self, indexes: Sequence[PageIndex], pool: MHATokenToKVPool, *, full: bool) -> None:
        self.indexes = tuple(indexes)
        self._pool = pool
        self._full = full
        size = pool.page_size
        self.marks = [np.zeros((0, size), np.uint64) for _ in indexes]  # [pages, page_size]
        self.sums = [np.zeros((0, size), np.uint64) for _ in indexes]
        self._unsealed: list[list[Int64Array]] = [[] for _ in indexes]

    # ---- writing ----------------------------------------------------------------------------

    def write(self, tables: Sequence[BlockTable], first: int, marks: UInt64Array) -> None:
        """The positions [first, first + len(marks)) of a request are about to be written."""
        self._grow()
        for g, table in self._of_tokens(tables):
            slots = table.slots(first, len(marks))
            self.marks[g].reshape(-1)[slots] = marks
            if self._full:
                self._unsealed[g].append(slots)

    def seal(self) -> None:
        """The forward that was written for is over: sum the bytes that it left (mode full).

        Pages that nobody owns any more are left out: their memory may be gone.
        """
        for g, pieces in enumerate(self._unsealed):
            if pieces:
                slots = np.concatenate(pieces)
                owned = self.indexes[g].state[slots // self._pool.page_size] >= PageState.USED
                slots = slots[owned]
                self.sums[g].reshape(-1)[slots] = self._sum_bytes(GroupId(g), slots)
                pieces.clear()

    def move(self, group: GroupId, sources: Int32Array, targets: Int32Array) -> None:
        """Pages were copied; their marks go along. Call it before the index hears of it."""
        self.seal()
        self._grow()
        for array in (self.marks[group], self.sums[group]):
            array[targets] = array[sources]
            array[sources] = 0

    # ---- checking ---------------------------------------------------------------------------

    def check_tables(self, owner: str, tables: Sequence[BlockTable], marks: UInt64Array) -> None:
        """The first len(marks) positions of a request are what it wrote, as far as a table
        reaches (a window group dropped its head). InvariantError names what is not."""
        self._grow()
        for g, table in self._of_tokens(tables):
            first = min(table.first_page * table.page_size, len(marks))
            places = np.arange(first, len(marks))
            slots = table.slots(first, len(places))
            self._check(owner, GroupId(g), slots, marks[first:], places)

    def check_cache(self, cache: BasePrefixCache) -> None:
        """Every page of the prefix tree holds the tokens of its place in the tree.

        Where an edge has a hole (a window group holds no page there), nothing is to be checked.
        """
        self.seal()
        self._grow()
        if not isinstance(cache, RadixCache):
            return  # owns nothing
        ends: dict[int, ChainPoint] = {}
        for node in cache.tree.nodes():
            if node.parent is None:
                ends[node.id] = chain_start(node.extra_key)
                continue
            at = ends[node.parent.id]
            marks, ends[node.id] = chain_marks(at, node.tokens.view())
            for g, array in enumerate(node.pages):
                if self.indexes[g].layout.holds_states:
                    continue
                held = np.flatnonzero(array.view() != NO_PAGE)
                slots = self._slots_of(array.view()[held])
                places = self._slots_of(held)  # of the edge's own tokens
                self._check(repr(node), GroupId(g), slots, marks[places], places + at.position)

    def _check(
        self,
        owner: str,
        group: GroupId,
        slots: Int64Array,
        marks: UInt64Array,
        places: Int64Array,
    ) -> None:
        """slots[i] carries marks[i] and has an owner; places[i] is its position in the sequence."""
        index = self.indexes[group]
        pages = slots // self._pool.page_size
        if len(pages) and int(pages.max()) >= len(index.state):
            raise InvariantError(f"canary: group {group}, {owner}: page {pages.max()} never was")
        wrong = self.marks[group].reshape(-1)[slots] != marks
        self._report(wrong, "was written by somebody else", owner, group, slots, places)
        free = index.state[pages] < PageState.USED
        self._report(free, "has no owner", owner, group, slots, places)
        if self._full:
            found = self._sum_bytes(group, slots)
            changed = found != self.sums[group].reshape(-1)[slots]
            what = "has other bytes than were written"
            self._report(changed, what, owner, group, slots, places)

    def _report(
        self,
        wrong: npt.NDArray[np.bool_],
        what: str,
        owner: str,
        group: GroupId,
        slots: Int64Array,
        places: Int64Array,
    ) -> None:
        at = np.flatnonzero(wrong)
        if len(at) == 0:
            return
        index = self.indexes[group]
        page = int(slots[at[0]]) // self._pool.page_size
        same = at[slots[at] // self._pool.page_size == page]
        raise InvariantError(
            f"canary: group {group}, page {page} ({PageState(index.state[page]).name}, node "
            f"{index.node[page]}, rows {index.rows[page]}) {what}: positions "
            f"{places[same[0]]} to {places[same[-1]]} of {owner}; {len(at)} slots in all"
        )

    def flip_byte(self, group: int, page: int) -> None:
        """Change one bit of a page's first key, in the group's first layer (a perturbation).

        Only the rank that has the page's memory can.
        """
        layer = self._pool.spec.groups[group].layers[0]
        for own in self._pool.share.own_pages(group, np.array([page])):
            first = self._pool.get_key_buffer(layer).narrow(0, int(own) * self._pool.page_size, 1)
            first.view(torch.uint8)[..., :1] ^= 1

    # ---- inside -----------------------------------------------------------------------------

    def _of_tokens(self, tables: Sequence[BlockTable]) -> Iterator[tuple[int, BlockTable]]:
        """The groups that keep tokens: a state is of all tokens before it, no slot has one."""
        for g, (table, index) in enumerate(zip(tables, self.indexes, strict=True)):
            if not index.layout.holds_states:
                yield g, table

    def _slots_of(self, pages: Int32Array | Int64Array) -> Int64Array:
        """All slots of whole pages in order, int64 [n * page_size]."""
        bases = pages.astype(np.int64) * self._pool.page_size
        return (bases[:, None] + np.arange(self._pool.page_size)).reshape(-1)

    def _grow(self) -> None:
        for g, index in enumerate(self.indexes):
            missing = len(index.state) - len(self.marks[g])
            if missing > 0:
                more = np.zeros((missing, self._pool.page_size), np.uint64)
                self.marks[g] = np.concatenate([self.marks[g], more])
                self.sums[g] = np.concatenate([self.sums[g], more])

    def _sum_bytes(self, group: GroupId, slots: Int64Array) -> UInt64Array:
        """One sum over all layers' K and V bytes of each slot, uint64 [n]; 0 for slots of which
        another rank has the memory."""
        sums = np.zeros(len(slots), np.uint64)
        share = self._pool.share
        own = share.owns(group, slots // self._pool.page_size)
        sums[own] = self._sum_own_bytes(group, share.own_slots(group, slots))
        return sums

    def _sum_own_bytes(self, group: GroupId, slots: Int64Array) -> UInt64Array:
        sums = np.zeros(len(slots), np.uint64)
        for first in range(0, len(slots), _SUM_SLOTS):
            part = slots[first : first + _SUM_SLOTS]
            chosen = torch.from_numpy(part)
            total = np.zeros(len(part), np.uint64)
            for buffer in self._pool.stored_planes(group):
                total = total * _MIX + _row_sums(buffer[chosen.to(buffer.device)])
            sums[first : first + _SUM_SLOTS] = total
        return sums

    def __repr__(self) -> str:
        return f"KVCanary(pages={[len(marks) for marks in self.marks]}, full={self._full})"


def _row_sums(rows: torch.Tensor) -> UInt64Array:
    """Weighted sums of each row's bytes, eight at a time, modulo 2^64."""
    raw = rows.contiguous().view(len(rows), -1).view(torch.uint8).cpu().numpy()
    words = np.zeros((len(raw), -(-raw.shape[1] // 8) * 8), np.uint8)
    words[:, : raw.shape[1]] = raw
    weights = np.cumprod(np.full(words.shape[1] // 8, _BASE, np.uint64))
    sums: UInt64Array = (words.view(np.uint64) * weights).sum(axis=1, dtype=np.uint64)
    return sums

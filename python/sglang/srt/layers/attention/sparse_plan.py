"""How a step's rows divide in sparse attention, and the geometries that other backends compute.

A query at a position below k sees all tokens before it: the rows of a request that stand there are
a shorter request of ordinary attention. Each other row becomes a request of its own, with pages of
one token: those that were chosen for it. Nothing here computes; see docs/kv_segments.md, Note
[Sparse attention].

Legend: T packed new tokens, R rows of q, B requests, K tokens that a row sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sglang.srt.layers.attention.own_pages import OwnPages
from sglang.srt.model_executor.forward_batch_info import (
    BatchGeometry,
    BlockTableView,
    Int32Array,
    Int64Array,
)


class KeyTable(NamedTuple):
    """The pages of index keys of one request that this rank holds: all, or its `own` ones.

    A *place* counts the tokens held, in order; without `own` it is the position.
    """

    page_ids: Int32Array
    own: OwnPages | None

    @classmethod
    def of(cls, view: BlockTableView) -> KeyTable:
        return cls(view.page_ids, view if isinstance(view, OwnPages) else None)

    def num_before(self, position: int) -> int:
        """Places of tokens below `position`."""
        return position if self.own is None else self.own.num_before(position)

    def slots(self, places: Int64Array, page_size: int) -> Int32Array:
        """The slots of any places, int32 of the same shape."""
        pages, offsets = np.divmod(places, page_size)
        found: Int32Array = self.page_ids[pages] * np.int32(page_size) + offsets.astype(np.int32)
        return found

    def positions(self, lo: int, hi: int) -> Int64Array:
        """The positions of places [lo, hi)."""
        return np.arange(lo, hi) if self.own is None else self.own.positions(lo, hi)


@dataclass(frozen=True, slots=True)
class TokenTable:
    """A `BlockTableView` of single tokens: `page_ids` are slots, in the order of positions."""

    page_ids: Int32Array
    first_position: int = 0

    @property
    def first_run(self) -> tuple[int, int]:
        """The first token alone; nobody looks whether the next lie behind it."""
        return (int(self.page_ids[0]), 1) if len(self.page_ids) else (0, 0)

    def num_before(self, position: int) -> int:
        """As `OwnPages` has it; the tokens' own positions play no part any more."""
        return min(position, len(self.page_ids))


class ChosenRows(NamedTuple):
    """Rows that see K chosen tokens: `rows` of q, `packed` rows, `requests`, `positions`; [n]."""

    rows: Int64Array
    packed: Int64Array
    requests: Int64Array
    positions: Int64Array


class RowSplit(NamedTuple):
    """A step's rows of q: those that see all before them, int64 [n], and the others."""

    dense_rows: Int64Array
    chosen: ChosenRows


def split_rows(geometry: BatchGeometry, topk: int, pruned: bool) -> RowSplit:
    """Divide the rows of q; with `pruned` these are the rows `geometry.logits_rows`."""
    requests, packed = _owners(geometry, pruned)
    starts, prefixes = geometry.q_starts, geometry.extend_prefix_lens
    positions = prefixes[requests] + packed - starts[requests]
    sparse = positions >= topk
    rows = np.arange(len(packed))
    chosen = ChosenRows(rows[sparse], packed[sparse], requests[sparse], positions[sparse])
    return RowSplit(rows[~sparse], chosen)


def _owners(geometry: BatchGeometry, pruned: bool) -> tuple[Int64Array, Int64Array]:
    """The request and the packed row of each row of q."""
    lens = geometry.extend_seq_lens
    owners = np.repeat(np.arange(len(lens)), lens)
    if not pruned:
        return owners, np.arange(len(owners))
    return owners[geometry.logits_rows], geometry.logits_rows


def shortened(geometry: BatchGeometry, topk: int) -> BatchGeometry:
    """The batch as if requests ended at `topk` tokens; those without a new one there are left out.

    `logits_rows` are the wanted ones that are still there.
    """
    lens = np.clip(topk - geometry.extend_prefix_lens, 0, geometry.extend_seq_lens)
    kept = np.flatnonzero(lens)
    new_starts = np.cumsum(lens) - lens
    owners, packed = _owners(geometry, pruned=True)
    offsets = packed - geometry.q_starts[owners]
    within = offsets < lens[owners]
    return BatchGeometry(
        seq_lens=(geometry.extend_prefix_lens + lens)[kept],
        extend_prefix_lens=geometry.extend_prefix_lens[kept],
        extend_seq_lens=lens[kept],
        q_starts=new_starts[kept],
        logits_rows=(new_starts[owners] + offsets)[within],
        block_tables=tuple(
            tuple(views[request] for request in kept) for views in geometry.block_tables
        ),
        page_size=geometry.page_size,
    )


def token_geometry(slots: Sequence[Int32Array], num_groups: int) -> BatchGeometry:
    """Rows as requests of one query each, over pages of one token: the slots of each row.

    A row without slots is a request without a query.
    """
    counts = np.fromiter((len(one) for one in slots), np.int64, len(slots))
    rows = np.arange(len(slots))
    return BatchGeometry(
        seq_lens=counts,
        extend_prefix_lens=np.maximum(counts - 1, 0),
        extend_seq_lens=np.minimum(counts, 1),
        q_starts=rows,
        logits_rows=rows,
        block_tables=(tuple(TokenTable(one) for one in slots),) * num_groups,
        page_size=1,
    )


class Choice(NamedTuple):
    """What an indexer chose: for packed rows int64 [n], ascending, the slots of each."""

    packed: Int64Array
    slots: Sequence[Int32Array]

    def of(self, packed: npt.NDArray[np.int64]) -> list[Int32Array]:
        """The slots of some of these rows."""
        return [self.slots[at] for at in np.searchsorted(self.packed, packed)]


class DensePart(NamedTuple):
    """The rows of a step that see all before them, planned by the backend that computes them."""

    geometry: BatchGeometry
    plan: Any


@dataclass(slots=True)
class SparsePlan:
    """A step: planned whole where no row chooses, else divided as layers ask.

    `choice` is that of the last layer with an indexer, and `tokens` what was planned of it; both
    are the only things that change from layer to layer.
    """

    geometry: BatchGeometry
    whole: Any  # the dense backend's plan, None where some row chooses
    dense: DensePart | None = None
    splits: dict[bool, RowSplit] = field(default_factory=dict)  # by whether rows are pruned
    row_numbers: dict[bool, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    key_tables: dict[int, KeyTable] = field(default_factory=dict)  # by request
    choice: Choice | None = None
    tokens: dict[bool, tuple[BatchGeometry, Any]] = field(default_factory=dict)
    on_device: Any = None  # tables and choice where a device keeps them, see `SparseDeviceBackend`

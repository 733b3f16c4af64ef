"""Sparse attention on a device that is not the host: plain tensor operations, and nothing waits.

Index keys are scored, tokens chosen and gathered on the device; the host knows lengths alone. The
requests of a step that have one row each are computed together, prompts request by request. Rows
that see all tokens before them are the backend's that this wraps, Triton's or torch's. Steps with
chosen tokens are not recorded as graphs.

Tested on a CPU as a stand-in and on tensors without values; not yet run on a GPU. See
docs/kv_segments.md, Note [Sparse attention].

Legend: n rows, M queries of one request, K chosen tokens, N keys, H query heads, D head dim, E
value dim, I index heads, X numbers of an index key, P pages of a table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch

from sglang.srt.errors import InvariantError
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend, AttentionLayer
from sglang.srt.layers.attention.sparse_backend import SparseAttnBackend, request_runs
from sglang.srt.layers.attention.sparse_plan import ChosenRows, SparsePlan
from sglang.srt.layers.attention.token_choice import BestTokens, IndexQuery, index_scores
from sglang.srt.mem_cache.segment_backing.segment_plane import raw
from sglang.srt.model_executor.forward_batch_info import BatchGeometry, ForwardBatch, Int64Array
from sglang.srt.utils.device import upload

# Bytes of float32 products, or of gathered keys as float32, at a time.
_BLOCK_BYTES = 64 << 20
_LEAST_KEYS = 1024  # of a block: rather fewer queries at a time


class _Run(NamedTuple):
    """Rows [first, first + num_rows) of the chosen ones: of a request, or of many one each.

    `pages` int64 [1 or num_rows, P] are their tables, `last` int64 [num_rows] their positions.
    """

    first: int
    num_rows: int
    num_keys: int  # up to the last row's own
    pages: torch.Tensor
    last: torch.Tensor


@dataclass(slots=True)
class _OnDevice:
    """`runs` by whether rows are pruned; `slots` int64 [n, K], chosen for packed rows `packed`."""

    runs: dict[bool, list[_Run]]
    packed: Int64Array | None = None
    slots: torch.Tensor | None = None


class SparseDeviceBackend(SparseAttnBackend):
    """Needs planes of contiguous memory; `block_bytes` bounds what exists at a time."""

    name: ClassVar[str] = "sparse_device"

    def __init__(
        self, dense: AttentionBackend, topk: int, *, block_bytes: int = _BLOCK_BYTES
    ) -> None:
        super().__init__(dense, topk)
        self._block_bytes = block_bytes

    def choose(
        self,
        query: IndexQuery,
        layer: AttentionLayer,
        forward_batch: ForwardBatch,
        *,
        rows_pruned: bool,
    ) -> None:
        """See `SparseAttnBackend.choose`."""
        plan: SparsePlan = forward_batch.attn_plan
        split = self.split(plan, rows_pruned)
        plane: torch.Tensor = forward_batch.token_to_kv_pool.index_planes[layer.layer_id]
        device = query.heads.device
        if len(split.dense_rows):
            query = query.rows(self._row_numbers(plan, split, rows_pruned, device)[0])
        there = self._there(plan)
        if rows_pruned not in there.runs:
            group = self.group_of_layer[layer.layer_id]
            there.runs[rows_pruned] = _make_runs(plan.geometry, split.chosen, group, device)
        found = []
        for run in there.runs[rows_pruned]:
            part = query.rows(slice(run.first, run.first + run.num_rows))
            found.append(self._slots_of(part, run, plane))
            forward_batch.progress.tick()
        there.packed, there.slots = split.chosen.packed, torch.cat(found)

    def attend_chosen(
        self,
        q: torch.Tensor,
        layer: AttentionLayer,
        forward_batch: ForwardBatch,
        rows: ChosenRows,
        pruned: bool,
    ) -> torch.Tensor:
        """See `SparseAttnBackend.attend_chosen`. Scores and sums are float32."""
        del pruned  # what was chosen goes by packed rows
        there = self._there(forward_batch.attn_plan)
        if there.slots is None or there.packed is None:
            raise InvariantError(f"layer {layer.layer_id} attends before any tokens were chosen")
        slots = there.slots
        if len(rows.packed) != len(there.packed):
            places = np.searchsorted(there.packed, rows.packed)
            slots = slots.index_select(0, upload([torch.from_numpy(places)], q.device)[0])
        plane: torch.Tensor = forward_batch.token_to_kv_pool.get_key_buffer(layer.layer_id)
        heads = q.view(len(q), layer.num_heads, layer.head_dim)
        step = max(1, self._block_bytes // (4 * slots.shape[1] * layer.head_dim))
        outs = []
        for first in range(0, len(q), step):
            some = slots[first : first + step]
            keys = _gather(plane, some.flatten()).view(*some.shape, layer.head_dim)
            scores = torch.bmm(heads[first : first + step].float(), keys.transpose(1, 2))
            weights = torch.softmax(scores.mul_(layer.scaling), -1)
            outs.append(torch.bmm(weights, keys[..., : layer.v_head_dim]).to(q.dtype))
        forward_batch.progress.tick()
        return torch.cat(outs).flatten(1)

    def _there(self, plan: SparsePlan) -> _OnDevice:
        if plan.on_device is None:
            plan.on_device = _OnDevice({})
        made: _OnDevice = plan.on_device
        return made

    def _slots_of(self, query: IndexQuery, run: _Run, plane: torch.Tensor) -> torch.Tensor:
        """Slots of the best tokens of a run's queries: int64 [M, K]."""
        shared = len(run.pages) == 1
        heads, width = query.heads.shape[1:]
        per_key = heads if shared else max(heads, width)  # numbers of a query and a key
        rows = self._block_bytes // (4 * per_key * max(self._topk, _LEAST_KEYS))
        rows = max(1, min(run.num_rows, rows))
        found = []
        for first in range(0, run.num_rows, rows):
            part = query.rows(slice(first, first + rows))
            pages = run.pages if shared else run.pages[first : first + rows]
            last = run.last[first : first + rows]
            best = self._best(part, pages, last, run.num_keys, plane, per_key)
            assert best.places is not None
            page = torch.div(best.places, self.spec.page_size, rounding_mode="floor")
            offsets = best.places - page * self.spec.page_size
            tables = pages.expand(len(last), -1)
            found.append(tables.gather(-1, page) * self.spec.page_size + offsets)
        return torch.cat(found)

    def _best(
        self,
        query: IndexQuery,
        pages: torch.Tensor,
        last: torch.Tensor,
        num_keys: int,
        plane: torch.Tensor,
        per_key: int,
    ) -> BestTokens:
        """The best positions of queries at `last` [M] over their tables, block by block."""
        size = self.spec.page_size
        rows = len(last)
        step = self._block_bytes // (4 * rows * per_key * size)
        step = max(-(-self._topk // size), step)
        best = BestTokens(self._topk)
        for first in range(0, -(-num_keys // size), step):
            some = pages[:, first : first + step]
            keys = self._keys(plane, some)
            if len(some) == 1:
                scores = index_scores(query, keys[0])
            else:
                scores = row_scores(query, keys)
            begin = first * size
            at = torch.arange(begin, begin + keys.shape[1], device=plane.device)
            scores.masked_fill_(at > last.unsqueeze(1), float("-inf"))
            best.add(scores, begin)
        return best

    def _keys(self, plane: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        """Index keys of pages [n, P] of a plane [S, 1, X]: float32 [n, P * page size, X]."""
        paged = raw(plane).view(-1, self.spec.page_size * plane.shape[2])
        found = paged.index_select(0, pages.flatten()).view(plane.dtype)
        return found.view(len(pages), -1, plane.shape[2]).float()


def row_scores(query: IndexQuery, keys: torch.Tensor) -> torch.Tensor:
    """`index_scores` of rows that have keys [n, N, X] of their own: float32 [n, N]."""
    products = torch.bmm(query.heads.float(), keys.transpose(1, 2)).relu_()
    scores = torch.bmm(query.weights.float().unsqueeze(1), products).squeeze(1)
    return scores.nan_to_num_(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))


def _gather(plane: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Rows of slots int64 [*] of a plane [S, 1, D]: float32 [*, D]."""
    rows = raw(plane).view(-1, plane.shape[2]).index_select(0, slots)
    return rows.view(plane.dtype).float()


def _make_runs(
    geometry: BatchGeometry, chosen: ChosenRows, group: int, device: torch.device
) -> list[_Run]:
    """The chosen rows in their order: neighbours of one row each together, others by request."""
    views, last = geometry.block_tables[group], chosen.positions
    runs = list(request_runs(chosen))
    tables: list[tuple[int, int, list[int]]] = []  # first row, rows, requests
    for request, first, end in runs:
        single = end - first == 1
        if single and tables and len(tables[-1][2]) == tables[-1][1]:
            start, count, requests = tables[-1]
            tables[-1] = (start, count + 1, [*requests, request])
        else:
            tables.append((first, end - first, [request]))
    made = []
    for first, count, requests in tables:
        num_keys = int(last[first : first + count].max()) + 1
        num_pages = -(-num_keys // geometry.page_size)
        pages = np.zeros((len(requests), num_pages), np.int64)
        for row, request in enumerate(requests):
            ids = views[request].page_ids[:num_pages]
            pages[row, : len(ids)] = ids
        here = [torch.from_numpy(pages), torch.from_numpy(last[first : first + count])]
        moved = upload(here, device)
        made.append(_Run(first, count, num_keys, moved[0], moved[1]))
    return made

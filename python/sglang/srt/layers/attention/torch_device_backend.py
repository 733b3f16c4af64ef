"""torch_native on a device that is not the host: plain tensor operations on pages.

The reference for kernels on a GPU, and what serves where none of them can be had. Everything that
a step's attention depends on lies in tensors of the device, so a decode step is the same calls
whatever its lengths and can be recorded; prompts go request by request in blocks. Scores are
float32 and exist in blocks of bounded size, which makes it slow: it reads K and V twice.

Tested on a CPU against torch_native; not yet run on a GPU. See docs/gpu.md, Device.

Legend: R query rows, H query heads, G kv heads, J = H / G, D head dim, E value dim, N keys,
P pages of a table, B requests.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from sglang.srt.errors import InvariantError
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend, AttentionLayer
from sglang.srt.layers.attention.merge import Partial, PartialSum, apply_sinks, dense_attention
from sglang.srt.mem_cache.segment_backing.segment_plane import raw
from sglang.srt.model_executor.forward_batch_info import BatchGeometry, ForwardBatch
from sglang.srt.utils.device import upload

# Bytes of K, as float32, that are gathered at a time; scores take about as much.
_BLOCK_BYTES = 64 << 20
_QUERY_BLOCK = 256
# Steps whose requests all fit in so many tokens can be recorded; a recorded step reads as many.
RECORDED_TOKENS = 4096


@dataclass(slots=True)
class _Tables:
    """One group's tables on the device: pages int64 [B, P], the rest int64 [B].

    `first` is the position of a table's first slot, `last` that of the newest token.
    """

    pages: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor


@dataclass(frozen=True, slots=True)
class TorchDevicePlan:
    """A step's lengths and tables; `tables` come to the device when the first layer asks.

    `num_pages`: as many pages as a recorded step reads, None for a step that is not recorded.
    """

    geometry: BatchGeometry
    num_pages: int | None = None
    tables: dict[int, _Tables] = field(default_factory=dict)


class TorchDeviceAttnBackend(AttentionBackend):
    """Attention by torch's tensor operations on K and V of any device; see the module."""

    name: ClassVar[str] = "torch_native"
    preferred_page_size: ClassVar[int] = 64
    records_steps: ClassVar[bool] = True

    def plan(self, geometry: BatchGeometry) -> TorchDevicePlan:
        """Hold the geometry."""
        return TorchDevicePlan(geometry)

    def plan_recorded(self, geometry: BatchGeometry) -> TorchDevicePlan:
        """See `AttentionBackend`: room for any step that `may_record` allows."""
        return TorchDevicePlan(geometry, -(-RECORDED_TOKENS // geometry.page_size) + 1)

    def may_record(self, geometry: BatchGeometry) -> bool:
        """See `AttentionBackend`."""
        return bool(
            (geometry.extend_seq_lens == 1).all() and (geometry.seq_lens <= RECORDED_TOKENS).all()
        )

    def renew(self, plan: TorchDevicePlan, geometry: BatchGeometry) -> None:
        """See `AttentionBackend.renew`."""
        for group, tables in plan.tables.items():
            new = _host_tables(geometry, group, plan.num_pages)
            moved = upload(new, tables.pages.device)
            for old, values in zip((tables.pages, tables.first, tables.last), moved, strict=True):
                old.copy_(values)

    def forward(
        self,
        q: torch.Tensor,
        layer: AttentionLayer,
        forward_batch: ForwardBatch,
        *,
        rows_pruned: bool,
    ) -> torch.Tensor:
        """See `AttentionBackend.forward`. Scores and sums are float32 whatever the KV dtype."""
        pool = forward_batch.token_to_kv_pool
        k: torch.Tensor = pool.get_key_buffer(layer.layer_id)
        v: torch.Tensor = pool.get_value_buffer(layer.layer_id)
        plan: TorchDevicePlan = forward_batch.attn_plan
        tables = self._tables(plan, self.group_of_layer[layer.layer_id], q.device)
        groups = layer.num_kv_heads
        heads = q.view(len(q), groups, layer.num_heads // groups, layer.head_dim)
        geometry = plan.geometry
        lens = geometry.extend_seq_lens
        if len(lens) and (lens == 1).all() and not rows_pruned:
            out, lse = self._attend_singles(heads, layer, tables, k, v)
        else:
            out, lse = self._attend_requests(heads, layer, tables, geometry, k, v, rows_pruned)
        if layer.sinks is not None:
            apply_sinks(out, lse, layer.sinks)
        forward_batch.progress.tick()
        return out.flatten(1).to(q.dtype)

    def _tables(self, plan: TorchDevicePlan, group: int, device: torch.device) -> _Tables:
        if group not in plan.tables:
            new = _host_tables(plan.geometry, group, plan.num_pages)
            plan.tables[group] = _Tables(*upload(new, device))
        return plan.tables[group]

    def _attend_singles(
        self,
        heads: torch.Tensor,
        layer: AttentionLayer,
        tables: _Tables,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One query a request, heads [B, G, J, D]: out float32 [B, H, E], lse float32 [B, H]."""
        total = PartialSum()
        rows, num_pages = tables.pages.shape
        size = self.spec.page_size
        step = max(1, _BLOCK_BYTES // (4 * k.shape[1] * k.shape[2] * size * max(1, rows)))
        for first in range(0, num_pages, step):
            pages = tables.pages[:, first : first + step]
            offsets = torch.arange(first * size, (first + pages.shape[1]) * size, device=k.device)
            at = tables.first.unsqueeze(1) + offsets  # [B, N]
            visible = _visible(layer, tables.last.unsqueeze(1), at)
            keys = self._pages(k, pages).view(rows, -1, *k.shape[1:])
            values = self._pages(v, pages).view(rows, -1, *v.shape[1:])
            total.add(_attend_rows(heads, layer, keys, values, visible))
        out, lse = total.result()
        return out.reshape(rows, -1, out.shape[-1]), lse.reshape(rows, -1)

    def _attend_requests(
        self,
        heads: torch.Tensor,
        layer: AttentionLayer,
        tables: _Tables,
        geometry: BatchGeometry,
        k: torch.Tensor,
        v: torch.Tensor,
        rows_pruned: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Request by request, blocks of queries by blocks of keys; results as above, of R rows."""
        rows = heads.shape[0]
        out = heads.new_zeros((rows, layer.num_heads, layer.v_head_dim), dtype=torch.float32)
        lse = heads.new_zeros((rows, layer.num_heads), dtype=torch.float32)
        for request, first, positions in _query_blocks(geometry, rows_pruned):
            queries = heads[first : first + len(positions)]
            (at,) = upload([torch.from_numpy(positions)], heads.device)
            view = geometry.block_tables[self.group_of_layer[layer.layer_id]][request]
            low, high = _span(layer, int(positions[0]), int(positions[-1]))
            total = self._attend_block(
                queries, layer, at, tables.pages[request], view.first_position, low, high, k, v
            )
            # [G, M, J, E] as rows of heads
            out[first : first + len(positions)] = total[0].transpose(0, 1).flatten(1, 2)
            lse[first : first + len(positions)] = total[1].transpose(0, 1).flatten(1, 2)
        return out, lse

    def _attend_block(
        self,
        queries: torch.Tensor,
        layer: AttentionLayer,
        at: torch.Tensor,
        pages: torch.Tensor,
        table_start: int,
        low: int,
        high: int,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> Partial:
        """Queries [M, G, J, D] at positions `at` over the keys at [low, high), in blocks."""
        size = self.spec.page_size
        step = max(1, _BLOCK_BYTES // (4 * size * max(k.shape[1] * k.shape[2], 1)))
        step = min(step, max(1, _BLOCK_BYTES // (4 * size * len(queries) * layer.num_heads)))
        total = PartialSum()
        last_page = -(-(high - table_start) // size)
        for first in range(max(0, low - table_start) // size, last_page, step):
            some = pages[first : min(first + step, last_page)]
            begin = table_start + first * size
            key_at = torch.arange(begin, begin + len(some) * size, device=k.device)
            visible = _visible(layer, at.unsqueeze(1), key_at)
            mask = torch.zeros(visible.shape, device=k.device)
            mask.masked_fill_(~visible, float("-inf"))
            written = (key_at < high).view(-1, 1, 1)  # the rest of a page may hold anything
            total.add(
                dense_attention(
                    queries.float(),
                    self._pages(k, some).masked_fill(~written, 0.0),
                    self._pages(v, some).masked_fill(~written, 0.0),
                    layer.scaling,
                    mask,
                    layer.logit_cap,
                )
            )
        return total.result()

    def _pages(self, plane: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        """The slots of pages int64 [*], one after another, as float32 [slots, G, D]."""
        paged = raw(plane).view(-1, self.spec.page_size, *plane.shape[1:])
        found = paged.index_select(0, pages.flatten()).view(plane.dtype)
        return found.view(-1, *plane.shape[1:]).float()


def _host_tables(geometry: BatchGeometry, group: int, num_pages: int | None) -> list[torch.Tensor]:
    """pages [B, P], first [B] and last [B] of a group; entries beyond a table are page 0."""
    views = geometry.block_tables[group]
    longest = max((len(view.page_ids) for view in views), default=0)
    if num_pages is not None and longest > num_pages:
        raise InvariantError(f"a recorded step reads {num_pages} pages, a table has {longest}")
    pages = np.zeros((len(views), longest if num_pages is None else num_pages), np.int64)
    first = np.zeros(len(views), np.int64)
    for row, view in enumerate(views):
        end = view.first_position + len(view.page_ids) * geometry.page_size
        if end < geometry.seq_lens[row]:
            raise InvariantError(
                f"a table that ends at position {end} for {geometry.seq_lens[row]} tokens"
            )
        pages[row, : len(view.page_ids)] = view.page_ids
        first[row] = view.first_position
    last = np.asarray(geometry.seq_lens, np.int64) - 1
    return [torch.from_numpy(pages), torch.from_numpy(first), torch.from_numpy(last)]


def _visible(layer: AttentionLayer, at: torch.Tensor, key_at: torch.Tensor) -> torch.Tensor:
    """Whether queries at positions `at` see keys at `key_at`; the two are broadcast."""
    visible = key_at <= at
    if layer.sliding_window is not None:
        visible &= key_at > at - layer.sliding_window
    if layer.attention_chunk is not None:
        visible &= key_at >= at - at % layer.attention_chunk
    return visible


def _span(layer: AttentionLayer, first: int, last: int) -> tuple[int, int]:
    """The first key position that a query at `first` sees, and the end of those up to `last`."""
    if layer.sliding_window is not None:
        return max(0, first - layer.sliding_window + 1), last + 1
    if layer.attention_chunk is not None:
        return first - first % layer.attention_chunk, last + 1
    return 0, last + 1


def _query_blocks(geometry: BatchGeometry, rows_pruned: bool) -> list[tuple[int, int, Any]]:
    """(request, first row, positions int64 [M]) of blocks that hold every query row once."""
    starts, lens = geometry.q_starts, geometry.extend_seq_lens
    blocks = []
    row = 0
    for request in range(len(lens)):
        begin, end = int(starts[request]), int(starts[request] + lens[request])
        packed = np.arange(begin, end)
        if rows_pruned:
            wanted = geometry.logits_rows
            packed = wanted[(wanted >= begin) & (wanted < end)]
        positions = geometry.extend_prefix_lens[request] + packed - begin
        for first in range(0, len(positions), _QUERY_BLOCK):
            some = positions[first : first + _QUERY_BLOCK].astype(np.int64)
            blocks.append((request, row + first, some))
        row += len(positions)
    return blocks


def _attend_rows(
    heads: torch.Tensor,
    layer: AttentionLayer,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor,
) -> Partial:
    """Rows [B, G, J, D] each over its own keys [B, N, G, D] where `visible` [B, N]."""
    scores = torch.einsum("bgjd,bngd->bgjn", heads.float(), keys) * layer.scaling
    if layer.logit_cap > 0.0:
        scores = (scores / layer.logit_cap).tanh() * layer.logit_cap
    shown = visible.view(len(visible), 1, 1, -1)
    scores = scores.masked_fill(~shown, float("-inf"))
    lse = torch.logsumexp(scores, -1)
    weights = (scores - lse.clamp(min=-1e30).unsqueeze(-1)).exp()
    seen = values.masked_fill(~visible.view(*visible.shape, 1, 1), 0.0)
    return torch.einsum("bgjn,bnge->bgje", weights, seen), lse

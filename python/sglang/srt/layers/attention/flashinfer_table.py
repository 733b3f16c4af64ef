"""FlashInfer over a segment table: a run for each segment that a step reads, merged in float32.

The wrappers read one pool of pages at a time. Pages before a sequence's first query are whole and
seen by all of its queries, so they are attended segment by segment without a mask; the pages from
there on, and everything that a window cuts, are gathered into one buffer and attended causally.
FlashInfer's own merge takes 16 bits only, so ours is used. Plans are made again for every run: it
is right, not fast; Triton's kernel reads segments itself. Not yet run against the package.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
import torch

from sglang.srt.layers.attention.base_attn_backend import AttentionBackend, AttentionLayer
from sglang.srt.layers.attention.flashinfer_backend import (
    FlashInferAttnBackend,
    Int32Array,
    Int64Array,
    LayerKind,
    Sequences,
    make_sequences,
    scales_of,
)
from sglang.srt.layers.attention.flashinfer_wrappers import PrefillWrapper, Wrappers
from sglang.srt.layers.attention.merge import Partial, PartialSum, apply_sinks
from sglang.srt.mem_cache.kv_layout import KVCacheSpec
from sglang.srt.mem_cache.segment_backing.segment_plane import SegmentPlane
from sglang.srt.model_executor.forward_batch_info import BatchGeometry, ForwardBatch
from sglang.srt.utils.device import upload


class Run(NamedTuple):
    """Sequences over one pool of pages: a segment's, or (None) the gathered ones, causally.

    `rows` int64 are the query rows in order, which `parts` counts from 0.
    """

    segment: int | None
    rows: Int64Array
    parts: Sequences


@dataclass(frozen=True, slots=True)
class TablePlan:
    """A step's lengths and tables, and its runs by kind of layer."""

    geometry: BatchGeometry
    runs: dict[LayerKind, list[Run]] = field(default_factory=dict)


class FlashInferTableBackend(AttentionBackend):
    """`FlashInferAttnBackend` where K and V have no common range.

    `segment_tokens` are the tokens of a segment, by group. Arguments and errors as there.
    """

    name: ClassVar[str] = FlashInferAttnBackend.name
    preferred_page_size: ClassVar[int] = 64

    def __init__(
        self, spec: KVCacheSpec, segment_tokens: tuple[int, ...], wrappers: Wrappers | None = None
    ) -> None:
        super().__init__(spec)
        self._whole = FlashInferAttnBackend(spec, wrappers)
        self._segment_tokens = segment_tokens
        self._wrapper: PrefillWrapper | None = None

    def plan(self, geometry: BatchGeometry) -> TablePlan:
        """Hold the geometry; runs follow when layers of new kinds ask."""
        return TablePlan(geometry)

    def forward(
        self,
        q: torch.Tensor,
        layer: AttentionLayer,
        forward_batch: ForwardBatch,
        *,
        rows_pruned: bool,
    ) -> torch.Tensor:
        """See `AttentionBackend.forward`."""
        forward_batch.progress.tick()
        if len(q) == 0:
            return q.new_empty(0, layer.num_heads * layer.v_head_dim)
        kind = LayerKind.of(self.group_of_layer[layer.layer_id], layer, pruned=rows_pruned)
        plan: TablePlan = forward_batch.attn_plan
        if kind not in plan.runs:
            per_segment = self._segment_tokens[kind.group] // self.spec.page_size
            found = make_sequences(plan.geometry, kind)
            plan.runs[kind] = split_sequences(
                found, self.spec.page_size, per_segment, gathered=kind.window is not None
            )
        heads = self._whole.computed(q, layer)
        pool = forward_batch.token_to_kv_pool
        planes = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
        total = PartialSum()
        for run in plan.runs[kind]:
            total.add(self._attend(heads, kind, run, planes, scales_of(layer)))
            forward_batch.progress.tick()
        out, lse = total.result()
        if layer.sinks is not None:
            out = out.float()
            apply_sinks(out, lse, layer.sinks)
        return out.flatten(1).to(q.dtype)

    def _attend(
        self,
        heads: torch.Tensor,
        kind: LayerKind,
        run: Run,
        planes: tuple[SegmentPlane, SegmentPlane],
        scales: dict[str, float],
    ) -> Partial:
        """One run's output [R, H, D] and natural log-sum-exp [R, H]; rows outside see nothing."""
        if self._wrapper is None:
            self._wrapper = self._whole.wrappers.prefill(heads.device)
        parts, pages = run.parts, run.parts.pages
        pools = []
        for plane in planes:
            if run.segment is not None:
                memory = plane.part(run.segment)
            else:
                memory = torch.empty(
                    (len(pages), self.spec.page_size, *plane.shape[1:]),
                    dtype=plane.dtype,
                    device=plane.device,
                )
                plane.gather_pages(torch.from_numpy(pages.astype(np.int64)), memory)
            pools.append(memory.view(-1, self.spec.page_size, *plane.shape[1:]))
        if run.segment is None:
            pages = np.arange(len(pages), dtype=np.int32)
        there, rows = upload([torch.from_numpy(pages), torch.from_numpy(run.rows)], heads.device)
        indptrs = (torch.from_numpy(parts.rows), torch.from_numpy(parts.indptr))
        options = self._whole.options(kind, heads.dtype)
        causal = run.segment is None
        self._wrapper.plan(
            *indptrs,
            there,
            torch.from_numpy(parts.last),
            *self._whole.shape(kind),
            causal=causal,
            **options,
        )
        some = heads.index_select(0, rows)
        out, lse = self._wrapper.run(some, tuple(pools), return_lse=True, **scales)
        if len(run.rows) == len(heads):
            return out, lse * math.log(2.0)
        whole = out.new_zeros(heads.shape)
        sums = lse.new_full(heads.shape[:2], float("-inf"))
        whole.index_copy_(0, rows, out)
        sums.index_copy_(0, rows, lse * math.log(2.0))
        return whole, sums


def split_sequences(
    found: Sequences, page_size: int, pages_per_segment: int, *, gathered: bool
) -> list[Run]:
    """A run for each segment, ascending, of what lies before the first queries; then the rest.

    `gathered`: everything is the rest, as a window cuts it.
    """
    heads: dict[int, list[tuple[int, Int32Array]]] = {}
    rest: list[tuple[int, Int32Array]] = []
    for n in range(len(found.last)):
        pages = found.pages[found.indptr[n] : found.indptr[n + 1]]
        queries = int(found.rows[n + 1] - found.rows[n])
        num_keys = (len(pages) - 1) * page_size + int(found.last[n])
        whole = 0 if gathered else (num_keys - queries) // page_size
        segments = pages[:whole] // pages_per_segment
        for segment in np.unique(segments).tolist():
            mine = pages[:whole][segments == segment] - segment * pages_per_segment
            heads.setdefault(segment, []).append((n, mine))
        rest.append((n, pages[whole:]))
    runs = [_run(found, segment, heads[segment], page_size) for segment in sorted(heads)]
    return [*runs, _run(found, None, rest, page_size)]


def _run(
    found: Sequences, segment: int | None, parts: list[tuple[int, Int32Array]], page_size: int
) -> Run:
    rows = [np.arange(found.rows[n], found.rows[n + 1], dtype=np.int64) for n, _ in parts]
    counts = [len(part) for part in rows]
    lengths = [len(pages) for _, pages in parts]
    last = [page_size if segment is not None else int(found.last[n]) for n, _ in parts]
    sequences = Sequences(
        np.cumsum([0, *counts]).astype(np.int32),
        np.cumsum([0, *lengths]).astype(np.int32),
        np.concatenate([pages for _, pages in parts]).astype(np.int32),
        np.array(last, np.int32),
    )
    return Run(segment, np.concatenate(rows), sequences)

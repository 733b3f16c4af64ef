"""Attention through FlashInfer's paged wrappers (--attention-backend flashinfer), optional.

A step becomes *sequences*: runs of query rows at neighbouring positions that see a common stretch
of keys which ends at the last of them. So windows, chunks and single wanted rows are all sequences
of their own, and the wrappers' causal mask, which is aligned at the end, is right for each. Page
tables go to the device once for each kind of layer. FlashInfer's log-sum-exps are to base 2; sinks
join by them in float32 here. A decode step is recorded with wrappers of its own, whose tables have
fixed places and which are planned anew between replays.

Written from FlashInfer's documentation (docs.flashinfer.ai) and tested with wrappers that do in
plain torch what it says; not yet run against the package. It computes in 16 bits only.

Legend: R query rows, H query heads, G kv heads, D head dim, N sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sglang.srt.errors import InvariantError
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend, AttentionLayer
from sglang.srt.layers.attention.flashinfer_wrappers import (
    WORKSPACE_BYTES,
    WRAPPER_BYTES,
    DecodeWrapper,
    FlashInferWrappers,
    PageBuffers,
    PrefillWrapper,
    Wrappers,
)
from sglang.srt.layers.attention.merge import apply_sinks
from sglang.srt.mem_cache.kv_layout import KVCacheSpec
from sglang.srt.mem_cache.segment_backing.base import KV_TORCH_DTYPES
from sglang.srt.model_executor.forward_batch_info import BatchGeometry, ForwardBatch
from sglang.srt.utils.device import upload

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

# Page ids that a recorded step may read; longer tables are computed call by call.
RECORDED_PAGES: Final = 1 << 22
_PAGE_ID_BYTES: Final = 4


class LayerKind(NamedTuple):
    """Layers of one kind share a plan. `scaling` is that of what K means, not of what is stored."""

    group: int
    window: int | None
    chunk: int | None
    pruned: bool
    num_heads: int
    logit_cap: float
    scaling: float

    @classmethod
    def of(cls, group: int, layer: AttentionLayer, *, pruned: bool) -> LayerKind:
        """The kind of a layer whose slots are those of `group`."""
        return cls(
            group,
            layer.sliding_window,
            layer.attention_chunk,
            pruned,
            layer.num_heads,
            layer.logit_cap,
            # Rounded, so that layers agree whatever scale theirs was multiplied and divided by.
            float(np.float32(layer.scaling / layer.k_scale)),
        )


class Sequences(NamedTuple):
    """A step's queries as sequences, on the host.

    Sequence n is query rows [rows[n], rows[n + 1]); its keys are the pages
    pages[indptr[n]:indptr[n + 1]], the last of which holds last[n] of them. int32.
    """

    rows: Int32Array
    indptr: Int32Array
    pages: Int32Array
    last: Int32Array


class Planned(NamedTuple):
    """A wrapper that was planned, for queries of which type and on which device."""

    wrapper: DecodeWrapper | PrefillWrapper
    q_dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True)
class FlashInferPlan:
    """A step's lengths and tables, and the wrappers that were planned for it.

    `recorded`: the wrappers keep their tables where they are and are nobody else's.
    """

    geometry: BatchGeometry
    recorded: bool = False
    planned: dict[LayerKind, Planned] = field(default_factory=dict)


class FlashInferAttnBackend(AttentionBackend):
    """FlashInfer's kernels over contiguous planes.

    `wrappers` None: the package's. Raises ValueError for KV that it does not serve, ImportError
    without the package.
    """

    name: ClassVar[str] = "flashinfer"
    preferred_page_size: ClassVar[int] = 64
    records_steps: ClassVar[bool] = True

    def __init__(self, spec: KVCacheSpec, wrappers: Wrappers | None = None) -> None:
        super().__init__(spec)
        self._kv_dtype = KV_TORCH_DTYPES[spec.dtype]
        if self._kv_dtype is torch.float32:
            raise ValueError("attention backend flashinfer computes in 16 bits; use --dtype")
        if spec.values_in_keys:
            raise ValueError("attention backend flashinfer does not serve latent attention")
        if spec.v_head_dim != spec.head_dim:
            raise ValueError("attention backend flashinfer wants K and V heads of one width")
        self.wrappers = wrappers or FlashInferWrappers()
        # A wrapper's buffers are those of its last plan, which work in flight may read in order.
        self._made: dict[tuple[LayerKind, bool], DecodeWrapper | PrefillWrapper] = {}
        # Page ids of recorded steps: those of all sizes, since one step is computed at a time.
        self._recorded_pages: dict[LayerKind, torch.Tensor] = {}

    @classmethod
    def device_bytes(cls, sizes: Sequence[int], num_groups: int) -> int:
        """See `AttentionBackend`: the workspace, wrappers, and recorded tables."""
        some = 2 * (num_groups + 1)  # prompts and decodes, and the last layer's wanted rows
        tables = _PAGE_ID_BYTES * (RECORDED_PAGES + max(sizes)) if sizes else 0
        wrappers = WRAPPER_BYTES * (some + num_groups * len(sizes))
        return WORKSPACE_BYTES + wrappers + num_groups * tables

    def plan(self, geometry: BatchGeometry) -> FlashInferPlan:
        """Hold the geometry; wrappers are planned when layers of new kinds ask."""
        return FlashInferPlan(geometry)

    def plan_recorded(self, geometry: BatchGeometry) -> FlashInferPlan:
        """See `AttentionBackend`: as many sequences as requests, tables at fixed places."""
        return FlashInferPlan(geometry, recorded=True)

    def may_record(self, geometry: BatchGeometry) -> bool:
        """See `AttentionBackend`: one token for each request, as long as the tables find room."""
        most = max(
            (sum(len(view.page_ids) for view in views) for views in geometry.block_tables),
            default=0,
        )
        return most <= RECORDED_PAGES and bool((geometry.extend_seq_lens == 1).all())

    def renew(self, plan: FlashInferPlan, geometry: BatchGeometry) -> None:
        """See `AttentionBackend.renew`."""
        for kind, planned in plan.planned.items():
            self._plan_wrapper(planned, geometry, kind)

    def forward(
        self,
        q: torch.Tensor,
        layer: AttentionLayer,
        forward_batch: ForwardBatch,
        *,
        rows_pruned: bool,
    ) -> torch.Tensor:
        """See `AttentionBackend.forward`. Scores are products in 16 bits, summed in float32."""
        forward_batch.progress.tick()
        if len(q) == 0:
            return q.new_empty(0, layer.num_heads * layer.v_head_dim)
        pool = forward_batch.token_to_kv_pool
        heads = self.computed(q, layer)
        wrapper = self._planned(forward_batch.attn_plan, layer, rows_pruned, heads)
        size = self.spec.page_size
        planes = tuple(
            plane.view(-1, size, *plane.shape[1:])
            for plane in (
                pool.get_key_buffer(layer.layer_id),
                pool.get_value_buffer(layer.layer_id),
            )
        )
        out, lse = wrapper.run(heads, planes, return_lse=True, **scales_of(layer))
        if layer.sinks is not None:
            out = out.float()
            apply_sinks(out, lse * math.log(2.0), layer.sinks)
        flat: torch.Tensor = out.flatten(1).to(q.dtype)
        return flat

    def computed(self, q: torch.Tensor, layer: AttentionLayer) -> torch.Tensor:
        """The queries [R, H, D] in the type that is computed in."""
        dtype = q.dtype if self._kv_dtype.itemsize == 1 else self._kv_dtype
        return q.view(-1, layer.num_heads, layer.head_dim).to(dtype)

    def shape(self, kind: LayerKind) -> tuple[int, int, int, int]:
        """What a plan is told of heads and pages."""
        return (kind.num_heads, self.spec.kv_heads, self.spec.head_dim, self.spec.page_size)

    def options(self, kind: LayerKind, q_dtype: torch.dtype) -> dict[str, Any]:
        """The keywords of a plan, `causal` aside."""
        return {
            "window_left": -1 if kind.window is None else kind.window - 1,
            "logits_soft_cap": kind.logit_cap if kind.logit_cap > 0.0 else None,
            "sm_scale": kind.scaling,
            "q_data_type": q_dtype,
            "kv_data_type": self._kv_dtype,
        }

    def _planned(
        self, plan: FlashInferPlan, layer: AttentionLayer, pruned: bool, heads: torch.Tensor
    ) -> DecodeWrapper | PrefillWrapper:
        # All rows of a recorded step are wanted.
        pruned = pruned and not plan.recorded
        kind = LayerKind.of(self.group_of_layer[layer.layer_id], layer, pruned=pruned)
        if kind not in plan.planned:
            if plan.recorded:
                size = len(plan.geometry.seq_lens)
                wrapper = self._recorded_wrapper(kind, size, heads.device)
            else:
                wrapper = self._wrapper(kind, plan.geometry, heads.device)
            planned = Planned(wrapper, heads.dtype, heads.device)
            self._plan_wrapper(planned, plan.geometry, kind)
            plan.planned[kind] = planned
        return plan.planned[kind].wrapper

    def _plan_wrapper(self, planned: Planned, geometry: BatchGeometry, kind: LayerKind) -> None:
        found = make_sequences(geometry, kind)
        # Where plans look at lengths they look at the host; only the pages are read on the device.
        (pages,) = upload([torch.from_numpy(found.pages)], planned.device)
        rows, indptr, last = (
            torch.from_numpy(part) for part in (found.rows, found.indptr, found.last)
        )
        options, shape = self.options(kind, planned.q_dtype), self.shape(kind)
        wrapper: Any = planned.wrapper
        if _is_single(geometry, kind):
            wrapper.plan(indptr, pages, last, *shape, **options)
        else:
            wrapper.plan(rows, indptr, pages, last, *shape, causal=True, **options)

    def _recorded_wrapper(
        self, kind: LayerKind, size: int, device: torch.device
    ) -> DecodeWrapper | PrefillWrapper:
        room = RECORDED_PAGES + size  # rows that are too many have a page each
        pages = self._recorded_pages.get(kind)
        if pages is None or len(pages) < room:
            pages = torch.zeros(room, dtype=torch.int32, device=device)
            self._recorded_pages[kind] = pages
        indptr = torch.zeros(size + 1, dtype=torch.int32, device=device)
        last = torch.ones(size, dtype=torch.int32, device=device)
        return self.wrappers.recorded_decode(PageBuffers(indptr, pages, last))

    def _wrapper(
        self, kind: LayerKind, geometry: BatchGeometry, device: torch.device
    ) -> DecodeWrapper | PrefillWrapper:
        single = _is_single(geometry, kind)
        key = (kind, single)
        if key not in self._made:
            make: Callable[[torch.device], DecodeWrapper | PrefillWrapper] = (
                self.wrappers.decode if single else self.wrappers.prefill
            )
            self._made[key] = make(device)
        return self._made[key]


def scales_of(layer: AttentionLayer) -> dict[str, float]:
    """The keywords by which a run learns what a layer's K is divided by in the cache."""
    return {} if layer.k_scale == 1.0 else {"k_scale": layer.k_scale}


def _is_single(geometry: BatchGeometry, kind: LayerKind) -> bool:
    """Whether every sequence of a step has one query."""
    return kind.pruned or not (geometry.extend_seq_lens > 1).any()


def make_sequences(geometry: BatchGeometry, kind: LayerKind) -> Sequences:
    """Cut a step's queries into sequences and name the pages of each.

    Raises InvariantError when a table does not reach its tokens, ValueError for chunks that are
    not whole pages.
    """
    size = geometry.page_size
    if kind.chunk is not None and kind.chunk % size:
        raise ValueError(f"chunks of {kind.chunk} tokens are no whole pages of {size}")
    rows, pages, indptr, last = [0], [], [0], []
    for request, position, count in _runs(geometry, kind):
        view = geometry.block_tables[kind.group][request]
        first = position
        if kind.chunk is not None:
            first -= first % kind.chunk
        elif kind.window is not None:
            first = max(0, first - kind.window + 1)
        else:
            first = 0
        begin = max(0, first - view.first_position) // size
        end = position + count - view.first_position
        some = view.page_ids[begin : -(-end // size)]
        if end > len(view.page_ids) * size or not len(some):
            raise InvariantError("a block table does not reach its request's last token")
        pages.append(some)
        indptr.append(indptr[-1] + len(some))
        last.append((end - 1) % size + 1)
        rows.append(rows[-1] + count)
    return Sequences(
        np.array(rows, np.int32),
        np.array(indptr, np.int32),
        np.concatenate(pages).astype(np.int32) if pages else np.empty(0, np.int32),
        np.array(last, np.int32),
    )


def _runs(geometry: BatchGeometry, kind: LayerKind) -> list[tuple[int, int, int]]:
    """(request, first position, queries) of every sequence, in the order of the query rows."""
    runs = []
    starts, lens = geometry.q_starts, geometry.extend_seq_lens
    for request in range(len(lens)):
        start, count = int(starts[request]), int(lens[request])
        prefix = int(geometry.extend_prefix_lens[request])
        if kind.pruned:
            wanted = geometry.logits_rows
            mine = wanted[(wanted >= start) & (wanted < start + count)]
            runs += [(request, prefix + int(row) - start, 1) for row in mine]
            continue
        at, end = prefix, prefix + count
        while at < end:
            stop = end
            if kind.chunk is not None:
                stop = min(end, at - at % kind.chunk + kind.chunk)
            runs.append((request, at, stop - at))
            at = stop
    return runs

"""Attention through the Triton kernels of sgl-kernel, over planes or segment tables.

A step is planned on the host from its lengths alone, once for each shape of layer; work items go
to the device in one copy and block tables by what is new in them. A layer is a launch or two. On
a CPU it runs in Triton's interpreter, for tests. See docs/gpu.md, Note [Triton attention]. Not yet
run on a GPU.

Legend: R query rows, H query heads, D head dim, E value dim, B requests.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from sglang.srt.errors import InvariantError
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend, AttentionLayer
from sglang.srt.layers.attention.triton_tables import DeviceTables
from sglang.srt.layers.rotary_embedding import Rotation
from sglang.srt.mem_cache.kv_layout import KVCacheSpec
from sglang.srt.mem_cache.segment_backing.segment_plane import SegmentPlane
from sglang.srt.model_executor.forward_batch_info import BatchGeometry, ForwardBatch
from sglang.srt.utils.device import upload
from sglang.srt.utils.native import triton_kernels

# Programs of single queries that a multiprocessor holds at a time, see `launch_sizes`.
_PROGRAMS_PER_SM = 3
_INTERPRETED_PROGRAMS = 8
# Outputs of parts that one launch may leave to be merged.
_PART_BYTES = 256 << 20


def check_triton(device: str) -> None:
    """Raises ValueError unless the kernels can run on `device`."""
    kernels = triton_kernels()
    if kernels is None:
        raise ValueError("attention backend 'triton' needs the packages sgl-kernel and triton")
    if device == "cpu" and not kernels.is_interpreted():
        raise ValueError(
            "attention backend 'triton' computes on a GPU; on a CPU it runs for tests, in Triton's "
            "interpreter: set the environment variable TRITON_INTERPRET=1"
        )


class WorkKey(NamedTuple):
    """Layers of one key share a step's work items."""

    group: int
    window: int | None
    chunk: int | None
    pruned: bool
    num_heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class TritonPlan:
    """A step's lengths and tables, and what was made of them so far on the worker's thread.

    `recorded`: what stands on the device has room for any step that may be recorded.
    """

    geometry: BatchGeometry
    recorded: bool = False
    tables: dict[int, Any] = field(default_factory=dict)  # group -> Tables
    works: dict[WorkKey, tuple[Any, ...]] = field(default_factory=dict)  # DeviceWork of each wave


@dataclass(slots=True)
class _Pointers:
    """A segment table's addresses on the device, as of so many changes of the plane's."""

    plane: SegmentPlane
    tensor: torch.Tensor
    changes: int = -1

    def refresh(self) -> None:
        """Upload what changed, to the same place."""
        changes = self.plane.changes  # read first: what changes meanwhile is uploaded next time
        if self.changes != changes:
            (moved,) = upload([self.plane.pointers], self.tensor.device)
            self.tensor.copy_(moved)
            self.changes = changes


class TritonAttnBackend(AttentionBackend):
    """Attention of every kind of layer that `AttentionLayer` can describe.

    `chip` None: the device's own number of programs. K and V of fp8 are computed in q's type.
    """

    name: ClassVar[str] = "triton"
    preferred_page_size: ClassVar[int] = 64
    records_steps: ClassVar[bool] = True
    rotates: ClassVar[bool] = True
    scales_values: ClassVar[bool] = True

    def __init__(
        self, spec: KVCacheSpec, *, chip: Any = None, part_bytes: int = _PART_BYTES
    ) -> None:
        super().__init__(spec)
        kernels = triton_kernels()
        if kernels is None:
            raise ValueError("attention backend triton needs the packages sgl-kernel and triton")
        self._kernels = kernels
        self._chip = chip
        self._part_bytes = part_bytes
        self._most_heads = spec.kv_heads  # programs that read a key, of the layers so far
        self._tables: dict[int, DeviceTables] = {}
        self._recorded_moves: dict[int, int] = {}  # of a group's tables when steps were recorded
        self._pointers: dict[int, _Pointers] = {}  # by the plane's id

    def plan(self, geometry: BatchGeometry) -> TritonPlan:
        """Hold the geometry; the rest follows when layers of new shapes ask."""
        return TritonPlan(geometry)

    def plan_recorded(self, geometry: BatchGeometry) -> TritonPlan:
        """See `AttentionBackend`: arrays of fixed size, in which unused items are empty."""
        return TritonPlan(geometry, recorded=True)

    def may_record(self, geometry: BatchGeometry) -> bool:
        """See `AttentionBackend`: one token for each request, as long as tables need not move."""
        if self._chip is None or not (geometry.extend_seq_lens == 1).all():
            return False
        most = self._chip.most_keys(self._most_heads)
        views = geometry.block_tables
        return int(geometry.seq_lens.sum()) <= most and all(
            tables.moves == self._recorded_moves.get(group, tables.moves)
            and tables.holds(views[group])
            for group, tables in self._tables.items()
        )

    def renew(self, plan: TritonPlan, geometry: BatchGeometry) -> None:
        """See `AttentionBackend.renew`."""
        for group, tables in plan.tables.items():
            pages, starts, origins = self._located(geometry, group, tables.pages.device)
            if pages is not tables.pages:
                raise InvariantError("block tables moved under a recorded step")
            tables.starts.copy_(starts)
            tables.origins.copy_(origins)
        for key, (work,) in plan.works.items():
            (new,) = self._plan_waves(geometry, key, work.buffer.device, recorded=True)
            work.renew(new)
        for pointers in self._pointers.values():
            pointers.refresh()

    def store(
        self, k: torch.Tensor, v: torch.Tensor, layer: AttentionLayer, forward_batch: ForwardBatch
    ) -> None:
        """See `AttentionBackend.store`: one launch for both, on planes and segments alike.

        Slots are not looked at: on a device they were checked when the batch moved there.
        """
        targets = self._targets(layer, forward_batch, k.device)
        scales = {"k_scale": layer.k_scale, "v_scale": layer.v_scale}
        rows = (k.flatten(1), k.flatten(1) if self.spec.values_in_keys else v.flatten(1))
        self._kernels.store_kv(*rows, *targets, **scales)

    def rotate_and_store(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rotation: Rotation,
        layer: AttentionLayer,
        forward_batch: ForwardBatch,
    ) -> torch.Tensor:
        """See `AttentionBackend.rotate_and_store`. Numbers are rounded to q's type, then stored."""
        targets = self._targets(layer, forward_batch, k.device)
        scales = {"k_scale": layer.k_scale, "v_scale": layer.v_scale}
        cos, sin, interleaved = rotation
        turned: torch.Tensor = self._kernels.rotate_and_store(
            q, k, v, cos, sin, *targets, interleaved=interleaved, **scales
        )
        return turned

    def _targets(
        self, layer: AttentionLayer, forward_batch: ForwardBatch, device: torch.device
    ) -> tuple[Any, ...]:
        """The new tokens' slots, and the planes of K and V as the kernels take them."""
        loc = forward_batch.out_cache_loc[self.group_of_layer[layer.layer_id]]
        return (loc, *self._planes(layer, forward_batch, device))

    def _planes(
        self, layer: AttentionLayer, forward_batch: ForwardBatch, device: torch.device
    ) -> tuple[Any, Any]:
        """K and V of the layer; K twice where values are the first numbers of keys."""
        pool = forward_batch.token_to_kv_pool
        k = self._plane(pool.get_key_buffer(layer.layer_id), device)
        if self.spec.values_in_keys:
            return k, k
        return k, self._plane(pool.get_value_buffer(layer.layer_id), device)

    def forward(
        self,
        q: torch.Tensor,
        layer: AttentionLayer,
        forward_batch: ForwardBatch,
        *,
        rows_pruned: bool,
    ) -> torch.Tensor:
        """See `AttentionBackend.forward`. Scores are products in the KV dtype, summed in fp32."""
        heads = q.view(-1, layer.num_heads, layer.head_dim)
        out = heads.new_empty(len(heads), layer.num_heads, layer.v_head_dim)
        if len(heads):
            plan: TritonPlan = forward_batch.attn_plan
            k, v = self._planes(layer, forward_batch, q.device)
            value_dim = layer.v_head_dim if self.spec.values_in_keys else None
            sight = self._kernels.Sight(layer.sliding_window, layer.attention_chunk)
            for work in self._works(plan, layer, rows_pruned, q, k.dtype):
                self._kernels.paged_attention(
                    heads,
                    k,
                    v,
                    self._device_tables(plan, self.group_of_layer[layer.layer_id], q.device),
                    work,
                    sight,
                    scale=layer.scaling,
                    v_scale=layer.v_scale,
                    logit_cap=layer.logit_cap,
                    sinks=layer.sinks,
                    out=out,
                    value_dim=value_dim,
                )
        forward_batch.progress.tick()
        return out.flatten(1)

    def _plane(self, plane: torch.Tensor | SegmentPlane, device: torch.device) -> Any:
        if isinstance(plane, torch.Tensor):
            return plane
        pointers = plane.pointers
        if device.type != "cpu":
            held = self._pointers.get(id(plane))
            if held is None:
                tensor = torch.empty_like(pointers, device=device)
                held = self._pointers[id(plane)] = _Pointers(plane, tensor)
            held.refresh()
            pointers = held.tensor
        _, kv_heads, width = plane.shape
        return self._kernels.Segments(
            pointers, plane.dtype, kv_heads, width, plane.slots_per_segment
        )

    def _device_tables(self, plan: TritonPlan, group: int, device: torch.device) -> Any:
        if group not in plan.tables:
            located = self._located(plan.geometry, group, device)
            plan.tables[group] = self._kernels.Tables(*located, plan.geometry.page_size)
            if plan.recorded:
                self._recorded_moves[group] = self._tables[group].moves
        return plan.tables[group]

    def _located(
        self, geometry: BatchGeometry, group: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All page ids, where each table's begin and at which position; the new ids uploaded."""
        views = geometry.block_tables[group]
        origins = np.array([view.first_position for view in views], np.int64)
        lens = np.array([len(view.page_ids) for view in views], np.int64)
        if (origins + lens * geometry.page_size < geometry.seq_lens).any():
            raise InvariantError("a block table does not reach its request's last token")
        if group not in self._tables:
            self._tables[group] = DeviceTables(device)
        tables = self._tables[group]
        starts = torch.from_numpy(tables.update(views))
        first = torch.from_numpy(origins.astype(np.int32))
        moved = upload([starts, first], device)
        return tables.pages, moved[0], moved[1]

    def _works(
        self,
        plan: TritonPlan,
        layer: AttentionLayer,
        pruned: bool,
        q: torch.Tensor,
        kv_dtype: torch.dtype,
    ) -> tuple[Any, ...]:
        dtype = q.dtype if kv_dtype.itemsize == 1 else kv_dtype
        kv_heads = layer.num_kv_heads
        if self.spec.values_in_keys:
            kv_heads = layer.num_heads // self._kernels.heads_together(layer.num_heads)
        self._most_heads = max(self._most_heads, kv_heads)
        key = WorkKey(
            self.group_of_layer[layer.layer_id],
            layer.sliding_window,
            layer.attention_chunk,
            pruned,
            layer.num_heads,
            kv_heads,
            layer.head_dim,
            layer.v_head_dim,
            dtype,
        )
        if key not in plan.works:
            upload = self._kernels.DeviceWork.upload
            waves = self._plan_waves(plan.geometry, key, q.device, recorded=plan.recorded)
            plan.works[key] = tuple(upload(work, q.device) for work in waves)
        return plan.works[key]

    def _plan_waves(
        self, geometry: BatchGeometry, key: WorkKey, device: torch.device, *, recorded: bool
    ) -> tuple[Any, ...]:
        num_rows = len(geometry.seq_lens)
        chip = self._chip_of(device)
        num_items = chip.most_items(num_rows, key.kv_heads)
        per_group = key.num_heads // key.kv_heads
        small, large = self._kernels.default_tiles(
            key.head_dim, key.v_head_dim, per_group, key.dtype
        )
        row_bytes = 4 * key.num_heads * (key.v_head_dim + 1)
        waves: tuple[Any, ...] = self._kernels.plan_waves(
            self._kernels.Queries(*query_runs(geometry, pruned=key.pruned)),
            self._kernels.Sight(key.window, key.chunk),
            group=per_group,
            kv_heads=key.kv_heads,
            small=small,
            large=large,
            chip=chip,
            max_part_rows=num_items if recorded else max(1, self._part_bytes // row_bytes),
        )
        return tuple(work.padded(num_items, num_rows) for work in waves) if recorded else waves

    def _chip_of(self, device: torch.device) -> Any:
        if self._chip is None:
            programs = _INTERPRETED_PROGRAMS
            if device.type == "cuda":
                found = torch.cuda.get_device_properties(device).multi_processor_count
                programs = _PROGRAMS_PER_SM * found
            self._chip = self._kernels.Chip(programs)
        return self._chip


def query_runs(
    geometry: BatchGeometry, *, pruned: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A step's queries as runs of neighbours: first rows of q, counts, positions and requests.

    Pruned, q has the rows `logits_rows` alone; those that stand side by side in a request are one
    run. int64 [n] each, no run is empty.
    """
    starts, prefixes = geometry.q_starts, geometry.extend_prefix_lens
    if not pruned:
        used = np.flatnonzero(geometry.extend_seq_lens)
        return starts[used], geometry.extend_seq_lens[used], prefixes[used], used
    rows = geometry.logits_rows
    owner = np.searchsorted(starts, rows, side="right") - 1
    begins = np.flatnonzero(
        np.concatenate(([True], (np.diff(rows) != 1) | (np.diff(owner) != 0)))[: len(rows)]
    )
    counts = np.diff(begins, append=len(rows))
    owner = owner[begins]
    return begins, counts, prefixes[owner] + rows[begins] - starts[owner], owner

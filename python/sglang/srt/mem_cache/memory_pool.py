"""Where requests keep their tables and layers keep K and V.

`ReqToTokenPool` owns the rows and their block tables: rows exist while a request runs, nothing is
sized requests x context. `MHATokenToKVPool` gives layers zero-copy views of the backing and
writes new tokens into them, `MLATokenToKVPool` where latent attention keeps one row for both. The
facade calls the first, compute the others; none decides which page goes to whom.

Shape letters: T packed new tokens, S slots of a group's whole space, G kv heads, D head dim.
"""

from __future__ import annotations

import copy
import heapq
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
import torch

from sglang.srt.errors import InvariantError
from sglang.srt.mem_cache.block_table import BlockTable
from sglang.srt.mem_cache.index_planes import IndexPlanes
from sglang.srt.mem_cache.kv_layout import (
    GroupId,
    KVCacheSpec,
    ReqPoolIdx,
    SegmentLayout,
    layers_of,
)
from sglang.srt.mem_cache.kv_share import KVShare
from sglang.srt.mem_cache.segment_backing.base import (
    KV_TORCH_DTYPES,
    Plane,
    SegmentBacking,
)
from sglang.srt.mem_cache.segment_backing.segment_plane import (
    SegmentPlane,
    raw,
    round_to,
)
from sglang.srt.mem_cache.slot_pieces import Piece, check_slots, find_pieces
from sglang.srt.mem_cache.state_pool import MambaPool, make_state_pool
from sglang.srt.mem_cache.table_rows import TableRows, grown
from sglang.srt.mem_cache.table_space import TableSpace
from sglang.srt.utils.device import CpuRuntime, DeviceRuntime
from sglang.srt.utils.native import device_kernels_for, native_kernels

Int64Array = npt.NDArray[np.int64]


class ReqToTokenPool:
    """Rows 1..size, the lowest free one first; row 0 stands for padding and is never given out.

    What a decode step reads and writes of its requests stands in arrays indexed by row:
    `num_tokens` int64, the tokens that have a slot (0 for a row that is not taken), and per group
    the `TableRows` in `groups`. They reach as far as the highest row that was ever taken.
    """

    def __init__(self, size: int, num_groups: int, page_size: int) -> None:
        self.size = size
        self._page_size = page_size
        space = TableSpace()
        self.groups = tuple(TableRows(space) for _ in range(num_groups))
        self.num_tokens: Int64Array = np.zeros(0, np.int64)
        self._recounts = 0
        self._tables: dict[ReqPoolIdx, tuple[BlockTable, ...]] = {}
        self._returned: list[ReqPoolIdx] = []  # heap of rows below `_fresh` that are free
        self._fresh = 1

    @property
    def changes(self) -> int:
        """Grows when a row comes, goes, or gets tokens or pages by other ways than decode steps."""
        changes = self._recounts
        for group in self.groups:
            changes += group.changes
        return changes

    def set_num_tokens(self, row: ReqPoolIdx, num_tokens: int) -> None:
        """Note how many tokens of a row have a slot."""
        self.num_tokens[row] = num_tokens
        self._recounts += 1

    def available_size(self) -> int:
        """Rows that `alloc_row` can still give."""
        return self.size - len(self._tables)

    def alloc_row(self) -> ReqPoolIdx | None:
        """Take a row with one empty table per group; None when all rows are taken."""
        if len(self._tables) >= self.size:
            return None
        if self._returned:
            row = heapq.heappop(self._returned)
        else:
            row = ReqPoolIdx(self._fresh)
            self._fresh += 1
        if row >= len(self.num_tokens):
            self.num_tokens = grown(self.num_tokens, max(row + 1, 2 * len(self.num_tokens)))
        for group in self.groups:
            group.take_row(row)
        self._tables[row] = tuple(
            BlockTable(self._page_size, group, int(row)) for group in self.groups
        )
        return row

    def free_row(self, row: ReqPoolIdx) -> None:
        """Give a row and its tables back. Raises InvariantError when it is not taken."""
        if self._tables.pop(row, None) is None:
            raise InvariantError(f"row {row} was freed but is not taken")
        self.num_tokens[row] = 0
        for group in self.groups:
            group.free_row(row)
        heapq.heappush(self._returned, row)

    def tables(self, row: ReqPoolIdx) -> tuple[BlockTable, ...]:
        """Block tables of a taken row, by group. Raises InvariantError when it is not taken."""
        tables = self._tables.get(row)
        if tables is None:
            raise InvariantError(f"row {row} is not taken")
        return tables

    def rows(self) -> list[ReqPoolIdx]:
        """Taken rows in the order in which they were taken."""
        return list(self._tables)

    def __repr__(self) -> str:
        return f"ReqToTokenPool(rows={len(self._tables)}/{self.size})"


class MHATokenToKVPool:
    """K and V of every layer over a backing's reserved space.

    Views are taken once; their addresses never change. Only slots of mapped segments and of the
    dump page may be read or written, and never a whole plane at once. `contiguous`: a layer's
    buffers are tensors, so that a slot range may cross a segment border.

    With several KV-parallel ranks a plane holds one rank's pages (`layouts` are those of the
    planes), and `share` says which slot of a plane a slot is; `kv_rank` is this rank. `states`
    (None: there are none) has what layers of linear attention keep, of which nothing else here
    speaks.
    """

    contiguous: ClassVar[bool] = True

    def __init__(
        self,
        spec: KVCacheSpec,
        layouts: tuple[SegmentLayout, ...],
        backing: SegmentBacking,
        kv_rank: int = 0,
    ) -> None:
        self.spec = spec
        self.share = KVShare.of(kv_rank, layouts)
        self.layouts = tuple(layout.on_rank for layout in layouts)
        self.page_size = spec.page_size
        self.dtype = KV_TORCH_DTYPES[spec.dtype]
        self._group_of_layer = spec.group_of_layer()
        self._num_planes = 2 if spec.v_width else 1
        self._layers = [
            layer for group in spec.groups if group.state is None for layer in group.layers
        ]
        self.states: MambaPool | None = make_state_pool(spec, backing)
        self._take_planes(backing)
        self.index_planes = IndexPlanes.of(spec, backing)
        self._is_byte = self.dtype.itemsize == 1
        self._runtime: DeviceRuntime = CpuRuntime()
        self._native_planes: dict[int, Any] = {}  # of layers that stored scattered slots
        self._last_loc: torch.Tensor | None = None
        self._last_pieces: list[Piece] | None = None

    def _take_planes(self, backing: SegmentBacking) -> None:
        self._keys = {layer: backing.view(layer, Plane.KEY) for layer in self._layers}
        self._values = {layer: backing.view(layer, Plane.VALUE) for layer in self._layers}

    def part(self, groups: Sequence[int]) -> Self:
        """The layers of some groups as one model sees them, over the same memory.

        Layers and groups are numbered from 0, as in `KVCacheSpec.part`. Call it after `serve`; the
        whole is itself, and copies whole pages whatever their heads.
        """
        if len(groups) == self.spec.num_groups:
            return self
        chosen = [self.spec.groups[group] for group in groups]
        made = copy.copy(self)
        made.spec = self.spec.part([GroupId(group) for group in groups])
        made.layouts = tuple(
            replace(self.layouts[group], group=GroupId(at)) for at, group in enumerate(groups)
        )
        made.share = replace(self.share, sizes=tuple(self.share.sizes[g] for g in groups))
        made._group_of_layer = made.spec.group_of_layer()
        layers = layers_of(chosen)
        made._keep_layers(layers)
        made._layers = list(range(len(layers)))
        made.index_planes = self.index_planes.part(layers)
        made._native_planes = {}
        made._last_loc, made._last_pieces = None, None
        return made

    def _keep_layers(self, layers: Sequence[int]) -> None:
        self._keys = {at: self._keys[layer] for at, layer in enumerate(layers)}
        self._values = {at: self._values[layer] for at, layer in enumerate(layers)}

    @property
    def is_on_host(self) -> bool:
        """Whether K and V stand in the host's memory, where this thread's copies need no stream."""
        return self.get_key_buffer(self._layers[0]).device.type == "cpu"

    def serve(self, runtime: DeviceRuntime) -> None:
        """Be written by what `runtime` computes. Until this is called: by the host."""
        self._runtime = runtime

    def settle(self) -> None:
        """Return when copies that were made outside of a step are done.

        A device's compute stream waits for nobody.
        """
        self._runtime.synchronize()

    def get_key_buffer(self, layer_id: int) -> torch.Tensor | SegmentPlane:
        """Keys of one layer, [S, G, D] in the KV dtype, zero-copy over all slots.

        Of int8 D + 4, see `pack_int8`; the same holds for values.
        """
        return self._keys[layer_id]

    def get_value_buffer(self, layer_id: int) -> torch.Tensor | SegmentPlane:
        """Values of one layer, [S, G, D of V] in the KV dtype, zero-copy over all slots."""
        return self._values[layer_id]

    def get_kv_buffer(
        self, layer_id: int
    ) -> tuple[torch.Tensor | SegmentPlane, torch.Tensor | SegmentPlane]:
        """Both buffers of one layer."""
        return self.get_key_buffer(layer_id), self.get_value_buffer(layer_id)

    def stored_planes(self, group: int) -> list[torch.Tensor | SegmentPlane]:
        """All memory of a group: each layer's K, V and index keys, where it has planes for them; or
        the states."""
        if self.states is not None and self.states.group == group:
            return [self.states.plane]
        planes: list[torch.Tensor | SegmentPlane] = []
        for layer in self.spec.groups[group].layers:
            planes += self.get_kv_buffer(layer)[: self._num_planes]
            planes += self.index_planes.of_layer(layer)
        return planes

    def group_of_layer(self, layer_id: int) -> int:
        """The layer group whose slots this layer's buffers are indexed by."""
        return self._group_of_layer[layer_id]

    def set_kv_buffer(
        self,
        layer_id: int,
        loc: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
    ) -> None:
        """Write new tokens: slot loc[t] gets k[t] / k_scale and v[t] / v_scale in the KV dtype.

        `loc` int64 [T] of slots, distinct but for those of the dump page, `k` [T, G, D], `v`
        [T, G, D of V]. Slots that stand in a row are copied as one range, others one by one. `loc`
        must not be changed afterwards: its ranges are remembered for the other layers of the step.
        On a device that runs behind the host nobody looks at the values of `loc`, which would
        wait; see `check_slots`.
        """
        pieces = None
        if not self._runtime.is_async:
            pieces = self._pieces_of(loc, len(self._keys[layer_id]))
        if pieces is None:
            self._scatter(layer_id, loc, k, v, k_scale, v_scale)
            return
        buffers, news = (self._keys[layer_id], self._values[layer_id]), ((k, k_scale), (v, v_scale))
        for buffer, (new, scale) in zip(buffers[: self._num_planes], news, strict=False):
            source, target = raw(round_to(new, self.dtype, scale)), raw(buffer)
            for row, slot, count in pieces:
                target[slot : slot + count].copy_(source[row : row + count])

    def _scatter(
        self,
        layer_id: int,
        loc: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        k_scale: float,
        v_scale: float,
    ) -> None:
        """Write slots that stand apart; `_pieces_of` has seen that they exist."""
        kernels = None if self._runtime.is_async else native_kernels()
        if kernels is not None:
            # The kernel rounds to bytes itself, so that a tape can.
            if not self._is_byte or k.dtype != v.dtype:
                k, v = round_to(k, self.dtype, k_scale), round_to(v, self.dtype, v_scale)
                k_scale = v_scale = 1.0
            planes = self._native_planes.get(layer_id)
            if planes is None:
                planes = kernels.KVPlanes(self._keys[layer_id], self._values[layer_id])
                self._native_planes[layer_id] = planes
            planes.store(
                *(loc, k, v), k_scale=k_scale, v_scale=v_scale, num_threads=torch.get_num_threads()
            )
            return
        keys, values = self._keys[layer_id], self._values[layer_id]
        there = device_kernels_for(k, v) if k.dtype == v.dtype else None
        if there is not None:
            rows = (k.flatten(1), v.flatten(1))
            there.store_kv(*rows, loc, keys, values, k_scale=k_scale, v_scale=v_scale)
            return
        buffers, news = (self._keys[layer_id], self._values[layer_id]), ((k, k_scale), (v, v_scale))
        for buffer, (new, scale) in zip(buffers[: self._num_planes], news, strict=False):
            raw(buffer).index_copy_(0, loc, raw(round_to(new, self.dtype, scale)))

    def get_kv_size_bytes(self) -> tuple[int, int]:
        """Address space of all key planes and of all value planes, in bytes."""
        keys = sum(buffer.numel() * buffer.element_size() for buffer in self._keys.values())
        values = sum(buffer.numel() * buffer.element_size() for buffer in self._values.values())
        return keys, values

    def _pieces_of(self, loc: torch.Tensor, num_slots: int) -> list[Piece] | None:
        """(first row, first slot, count) of the ranges in `loc`, None when there are too many.

        None too where the kernel that scatters is the one that rounds to bytes fast.
        Raises InvariantError, once a step, when slots are not below `num_slots`.
        """
        if loc is not self._last_loc:
            kernels = native_kernels()
            if kernels is not None and kernels.is_recording():
                return None  # where they stand will be another matter when the tape is played
            scatters = self._is_byte and kernels is not None
            pieces = None if scatters else find_pieces(loc)
            if pieces is None or any(slot + count > num_slots for _, slot, count in pieces):
                check_slots(loc, num_slots)
            self._last_loc, self._last_pieces = loc, pieces
        return self._last_pieces

    def check_slots(self, group: int, loc: torch.Tensor) -> None:
        """Raises InvariantError unless every slot of int64 `loc` is one of the group's."""
        check_slots(loc, self.layouts[group].num_slots)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(layers={self.spec.num_layers}, dtype={self.spec.dtype})"


class MLATokenToKVPool(MHATokenToKVPool):
    """The rows of latent attention, one plane a layer: a token's latent, then its rotary key.

    Both are one head's K, of which the latent is V too. See docs/kv_segments.md, Note [Latent
    attention].
    """

    def _take_planes(self, backing: SegmentBacking) -> None:
        self._keys = {layer: backing.view(layer, Plane.KEY) for layer in self._layers}
        self._values = self._keys  # what scatters writes two planes: here the same row twice

    def _keep_layers(self, layers: Sequence[int]) -> None:
        self._keys = {at: self._keys[layer] for at, layer in enumerate(layers)}
        self._values = self._keys

    @property
    def kv_lora_rank(self) -> int:
        """Numbers of a latent."""
        return self.spec.v_head_dim

    @property
    def qk_rope_head_dim(self) -> int:
        """Numbers of a rotary key."""
        return self.spec.head_dim - self.spec.v_head_dim

    def get_value_buffer(self, layer_id: int) -> torch.Tensor:
        """Latents of one layer, [S, 1, `kv_lora_rank`]: the beginnings of the keys."""
        return self._keys[layer_id].narrow(-1, 0, self.kv_lora_rank)

    def set_mla_kv_buffer(
        self,
        layer_id: int,
        loc: torch.Tensor,
        cache_k_nope: torch.Tensor,
        cache_k_rope: torch.Tensor,
    ) -> None:
        """Write latents [T, 1, `kv_lora_rank`] and rotary keys [T, 1, `qk_rope_head_dim`].

        `loc` as in `set_kv_buffer`.
        """
        rows = torch.cat((cache_k_nope, cache_k_rope), -1)
        self.set_kv_buffer(layer_id, loc, rows, cache_k_nope)

    def get_kv_size_bytes(self) -> tuple[int, int]:
        """See MHATokenToKVPool: values take nothing of their own."""
        return super().get_kv_size_bytes()[0], 0

    def _scatter(
        self,
        layer_id: int,
        loc: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        k_scale: float,
        v_scale: float,
    ) -> None:
        del v, v_scale  # both are in k
        super()._scatter(layer_id, loc, k, k, k_scale, k_scale)


class NSATokenToKVPool(MLATokenToKVPool):
    """Latents, and beside them the index keys by which tokens are chosen.

    See docs/kv_segments.md, Note [Sparse attention].
    """

    def get_index_k_buffer(self, layer_id: int) -> torch.Tensor | SegmentPlane:
        """Index keys of a layer that keeps them, [S, 1, `index_dim`] in the KV dtype."""
        return self.index_planes[layer_id]

    def set_index_k_buffer(self, layer_id: int, loc: torch.Tensor, index_k: torch.Tensor) -> None:
        """Write index keys [T, `index_dim`]; `loc` as in `set_kv_buffer`."""
        self.index_planes.store(layer_id, loc, index_k)

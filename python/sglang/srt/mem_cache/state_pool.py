"""`MambaPool`: the states of linear attention, one page for each, in float32.

A page holds a request's state over all layers of its group, so that a snapshot is one range of
memory. Layers read and write through here by page; who owns which page is decided above. Whether
the backing has one range or pieces makes no difference. See docs/kv_segments.md, Note [Recurrent
state].

Legend: N pages that are asked for, H heads, K and V widths of a head's key and value, W inputs of
the convolution that are kept, C its channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sglang.srt.mem_cache.kv_layout import GroupId, KVCacheSpec, KVGroupSpec, StateShape
from sglang.srt.mem_cache.segment_backing.base import Plane, SegmentBacking, TableBacking
from sglang.srt.mem_cache.segment_backing.segment_plane import SegmentPlane


class LayerState(NamedTuple):
    """Float32: `matrix` [N, H, K, V] and `inputs` [N, W, C], the newest input last."""

    matrix: torch.Tensor
    inputs: torch.Tensor


class MambaPool:
    """All pages of a STATE group; `plane` is [S, 1, numbers of a slot], zero-copy."""

    def __init__(
        self,
        group: GroupId,
        spec: KVGroupSpec,
        page_size: int,
        plane: torch.Tensor | SegmentPlane,
    ) -> None:
        assert spec.state is not None
        self.group = group
        self.plane = plane
        self.shape: StateShape = spec.state
        self._page_size = page_size
        self._first = {layer: i * spec.state.numbers for i, layer in enumerate(spec.layers)}
        self._page_numbers = page_size * plane.shape[2]

    @property
    def device(self) -> torch.device:
        return self.plane.device

    def view(self, layer_id: int, page: int) -> LayerState:
        """One layer's part of one page, zero-copy, N = 1; the page must have memory."""
        slots = self.plane.narrow(0, page * self._page_size, self._page_size)
        return self._split(layer_id, slots.view(1, self._page_numbers))

    def load(self, layer_id: int, pages: torch.Tensor) -> LayerState:
        """Copies of one layer's part of `pages`, int64 [N] on the plane's device."""
        if isinstance(self.plane, SegmentPlane):
            states = [self.view(layer_id, page) for page in pages.tolist()]
            return LayerState(*(torch.cat(parts) for parts in zip(*states, strict=True)))
        rows = self._rows(self.plane, layer_id)
        return self._parts(rows.index_select(0, pages))

    def store(self, layer_id: int, pages: torch.Tensor, state: LayerState) -> None:
        """Write one layer's part of `pages`, int64 [N], distinct but for the dump page."""
        if isinstance(self.plane, SegmentPlane):
            for row, page in enumerate(pages.tolist()):
                there = self.view(layer_id, page)
                there.matrix[0].copy_(state.matrix[row])
                there.inputs[0].copy_(state.inputs[row])
            return
        rows = self._rows(self.plane, layer_id)
        cut = self.shape.matrix_numbers
        rows[:, :cut].index_copy_(0, pages, state.matrix.flatten(1))
        rows[:, cut:].index_copy_(0, pages, state.inputs.flatten(1))

    def _rows(self, plane: torch.Tensor, layer_id: int) -> torch.Tensor:
        """One layer's part of every page, [pages, numbers], zero-copy."""
        pages = plane.view(-1, self._page_numbers)
        return pages.narrow(1, self._first[layer_id], self.shape.numbers)

    def _split(self, layer_id: int, pages: torch.Tensor) -> LayerState:
        return self._parts(pages.narrow(1, self._first[layer_id], self.shape.numbers))

    def _parts(self, rows: torch.Tensor) -> LayerState:
        one, cut = self.shape, self.shape.matrix_numbers
        matrix = rows[:, :cut].view(-1, one.heads, one.key_dim, one.value_dim)
        return LayerState(matrix, rows[:, cut:].view(-1, one.conv_tokens, one.channels))

    def __repr__(self) -> str:
        return f"MambaPool(group={self.group}, layers={len(self._first)}, {self.shape})"


def make_state_pool(spec: KVCacheSpec, backing: SegmentBacking) -> MambaPool | None:
    """The pool of the group of states; None without one."""
    for number, group in enumerate(spec.groups):
        if group.state is not None:
            layer = group.layers[0]
            plane: torch.Tensor | SegmentPlane
            if isinstance(backing, TableBacking):
                plane = backing.plane(layer, Plane.KEY)
            else:
                plane = backing.view(layer, Plane.KEY)
            return MambaPool(GroupId(number), group, spec.page_size, plane)
    return None

"""Copies pages of the KV pool, content only: who owns them is the callers' business.

Called by compaction, which moves pages, and by `KVMemory`, which begins a request's page with
what another request's page begins with. Nothing may write the sources or use the targets meanwhile.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from sglang.srt.errors import InvariantError
from sglang.srt.mem_cache.kv_layout import GroupId
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.segment_backing.segment_plane import SegmentPlane, split_by_segment

Int32Array = npt.NDArray[np.int32]

# What is gathered at a time while pages are copied.
COPY_BUFFER_BYTES = 8 << 20


def copy_pages(
    pool: MHATokenToKVPool, group: GroupId, sources: Int32Array, targets: Int32Array
) -> None:
    """Copy whole pages of all layers of a group, every plane, byte for byte; the two are disjoint.

    Each page and its target belong to one rank; every rank copies its own.
    """
    if (pool.share.owns(group, sources) != pool.share.owns(group, targets)).any():
        raise InvariantError("a page can't move to another rank")
    origin, goal = (
        torch.from_numpy(pool.share.own_pages(group, pages)).long() for pages in (sources, targets)
    )
    for plane in pool.stored_planes(group):
        if not isinstance(plane, SegmentPlane):  # whose own tables are on the host
            origin, goal = origin.to(plane.device), goal.to(plane.device)
        page_bytes = pool.page_size * plane.shape[1] * plane.shape[2] * plane.dtype.itemsize
        step = max(1, COPY_BUFFER_BYTES // page_bytes)
        for first in range(0, len(origin), step):
            part = slice(first, first + step)
            _copy_within(plane, pool.page_size, origin[part], goal[part])
    pool.settle()


def _copy_within(
    plane: torch.Tensor | SegmentPlane, page_size: int, origin: torch.Tensor, goal: torch.Tensor
) -> None:
    """Copy pages int64 [P] of one plane to other pages of it, through a buffer."""
    shape = (len(origin), page_size, *plane.shape[1:])
    if isinstance(plane, SegmentPlane):
        buffer = torch.empty(shape, dtype=plane.dtype, device=plane.device)
        plane.gather_pages(origin, buffer)
        slots = (goal[:, None] * page_size + torch.arange(page_size)).flatten()
        parts = split_by_segment(slots, plane.slots_per_segment)
        plane.store(parts, buffer.view(-1, *plane.shape[1:]))
        return
    raw = plane.view(torch.uint8) if plane.dtype.itemsize == 1 else plane
    pages = raw.view(-1, *shape[1:])
    pages.index_copy_(0, goal, pages.index_select(0, origin))

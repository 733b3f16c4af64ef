"""Paged attention on a GPU: prompts and single queries, over a plane or over segments of one.

The backend plans with `plan_work`, uploads the arrays once a step and calls `paged_attention` once
a layer. Nothing here allocates on the host or waits for the device, so that a call can be captured
in a graph. See docs/gpu.md, Note [Triton attention]. Not yet run on a GPU.

Legend: R query rows, H query heads, G kv heads, J = H / G, D head dim, E value dim, S slots.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from sgl_kernel.library import KernelError
from sgl_kernel.triton.kernels.attention import merge_parts_kernel, paged_attention_kernel
from sgl_kernel.triton.launch import (
    FP_FUSION,
    TRITON_TYPES,
    check_device,
    is_interpreted,
    power_of_two,
)
from sgl_kernel.triton.work import ITEM_COLUMNS, Sight, Tile, Work

_LATENT_HEADS = 16  # rows of the smallest product on a GPU's tensor cores
_MERGED_PARTS = 16  # parts that the merge reads at a time
_FULL, _SLIDING, _CHUNKED = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Segments:
    """A plane [S, G, width] whose segments of `slots` slots lie anywhere.

    `pointers` int64 [segments] on the device: the address of each, at a multiple of 16 bytes, 0
    where there is no memory.
    """

    pointers: torch.Tensor
    dtype: torch.dtype
    kv_heads: int
    width: int
    slots: int


@dataclass(frozen=True, slots=True)
class Tables:
    """Block tables on the device: request b's page ids are pages[starts[b]:].

    `pages` int32, `starts` int64 [B], `origins` int32 [B] the position of each table's first slot.
    """

    pages: torch.Tensor
    starts: torch.Tensor
    origins: torch.Tensor
    page_size: int


@dataclass(frozen=True, slots=True)
class DeviceWork:
    """`Work` on the device: per launch its tile and items int32 [W, 8]; merged int32 [*, 4].

    All are views of `buffer` int32.
    """

    launches: tuple[tuple[Tile, torch.Tensor], ...]
    merged: torch.Tensor
    num_parts: int
    buffer: torch.Tensor

    @classmethod
    def upload(cls, work: Work, device: torch.device) -> DeviceWork:
        """One copy to the device, of all arrays together."""
        sizes = [*(launch.items.size for launch in work.launches), work.merged.size]
        buffer = torch.empty(sum(sizes), dtype=torch.int32, device=device)
        *parts, merged = torch.split(buffer, sizes)
        launches = tuple(
            (launch.tile, items.view(-1, ITEM_COLUMNS))
            for launch, items in zip(work.launches, parts, strict=True)
        )
        made = cls(launches, merged.view(-1, 4), work.num_parts, buffer)
        made.renew(work)
        return made

    def renew(self, work: Work) -> None:
        """Become another work of as many items and merged rows, at the same addresses."""
        arrays = [*(launch.items for launch in work.launches), work.merged]
        host = torch.cat([torch.from_numpy(array.reshape(-1)) for array in arrays])
        if self.buffer.device.type == "cuda":
            host = host.pin_memory()
        self.buffer.copy_(host, non_blocking=True)


def default_tiles(
    head_dim: int, v_head_dim: int, group: int, dtype: torch.dtype
) -> tuple[Tile, Tile]:
    """(small, large) tiles for heads of these widths: what fits an H100's shared memory in bf16.

    `dtype` is what is computed in. Chosen by arithmetic, not by measurement.
    """
    width = power_of_two(max(head_dim, v_head_dim)) * dtype.itemsize
    small = Tile(max(16, power_of_two(group)), 64 if width <= 256 else 32)
    if width <= 256:
        return small, Tile(max(128, small.rows), 64)
    return small, Tile(max(64, small.rows), 32)


def heads_together(num_heads: int) -> int:
    """Query heads that a program takes where all read one row, as in latent attention.

    Work for it is planned as if so many were a group of a kv head of their own.
    """
    return math.gcd(num_heads, _LATENT_HEADS)


def launch_sizes(
    tile: Tile, v_head_dim: int, kv_dtype: torch.dtype, *, segmented: bool
) -> dict[str, int]:
    """Warps that hold a tile's sums in their registers, and stages of loads ahead of arithmetic.

    K and V wait for a page's id, and over `segmented` memory for an address too. The compiler gives
    each load of such a chain as many stages as the others, so it takes two (or three) stages for a
    block that is on its way while another is computed, and one more: with fewer, every block would
    be waited for. Small tiles of bytes have two blocks on their way.
    """
    sums = tile.rows * power_of_two(v_head_dim)
    ahead = 2 if kv_dtype.itemsize == 1 and tile.rows < 64 else 1
    chain = 3 if segmented else 2
    return {
        "num_warps": 8 if tile.rows >= 128 or sums > 64 * 128 else 4,
        "num_stages": chain * (ahead + 1) + 1,
    }


def paged_attention(
    q: torch.Tensor,
    k: torch.Tensor | Segments,
    v: torch.Tensor | Segments,
    tables: Tables,
    work: DeviceWork,
    sight: Sight,
    *,
    scale: float,
    v_scale: float = 1.0,
    logit_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    value_dim: int | None = None,
) -> torch.Tensor:
    """Attention of the rows that `work` names: q [R, H, D] over k [S, G, D], v [S, G, E].

    With `value_dim` E the values are the first E numbers of the keys, `v` is `k`, and G is 1: see
    `heads_together`.

    K and V of fp8 are computed in q's type, others in their own; sums are float32. `work` was
    planned with the same `sight`; `scale` is above 0. Results are multiplied by `v_scale`, before
    they are rounded: neither number is part of what is compiled. Returns `out` [R, H, E] in q's
    type (a new one if None), whose other rows are not touched. `lse` float32 [R, H] gets the
    log-sum-exps, `sinks` [H] included. Raises KernelError for shapes, types and scales that are not
    served.
    """
    if not scale > 0.0:
        raise KernelError(f"scores times {scale} keep no order")
    check_device(q, plane_base(k))
    kv_heads, head_dim, v_head_dim = _check_shapes(q, k, v)
    num_rows, num_heads, _ = q.shape
    if value_dim is not None:
        _check_latent(k, v, kv_heads, head_dim, value_dim)
        kv_heads, v_head_dim = num_heads // heads_together(num_heads), value_dim
    if out is None:
        out = q.new_empty(num_rows, num_heads, v_head_dim)
    parts = q.new_empty((work.num_parts, num_heads, v_head_dim), dtype=torch.float32)
    part_lse = q.new_empty((work.num_parts, num_heads), dtype=torch.float32)
    segmented = isinstance(k, Segments)
    segment_pages = k.slots // tables.page_size if isinstance(k, Segments) else 1
    span, kind = _span(sight)
    shared = _of_outputs(v_head_dim, sinks, lse)
    for tile, items in work.launches:
        paged_attention_kernel[(len(items) * kv_heads,)](
            *(q, plane_base(k), plane_base(v), out, parts, part_lse, lse, sinks),
            *(items, tables.starts, tables.origins, tables.pages),
            *(q.stride(0), segment_pages, span, scale, logit_cap, v_scale),
            KV_HEADS=kv_heads,
            GROUP=num_heads // kv_heads,
            **_row_blocks(head_dim, v_head_dim, is_latent=value_dim is not None),
            BLOCK_M=tile.rows,
            BLOCK_N=tile.keys,
            PAGE_SIZE=tables.page_size,
            SIGHT=kind,
            CAPPED=logit_cap > 0.0,
            SEGMENTED=segmented,
            **_types(q.dtype, k.dtype),
            **launch_sizes(tile, v_head_dim, k.dtype, segmented=segmented),
            **shared,
        )
    if len(work.merged):
        merge_parts_kernel[(len(work.merged) * num_heads,)](
            *(out, lse, parts, part_lse, sinks, work.merged, v_scale),
            NUM_HEADS=num_heads,
            BLOCK_P=_MERGED_PARTS,
            num_warps=4,
            **shared,
        )
    return out


def plane_base(plane: torch.Tensor | Segments) -> torch.Tensor:
    """What a kernel finds a plane's slots by."""
    return plane.pointers if isinstance(plane, Segments) else plane


def _of_outputs(
    v_head_dim: int, sinks: torch.Tensor | None, lse: torch.Tensor | None
) -> dict[str, Any]:
    """What the kernel of parts and that of their merge are told alike."""
    return {
        "VALUE_DIM": v_head_dim,
        "BLOCK_E": max(16, power_of_two(v_head_dim)),
        "HAS_SINKS": sinks is not None,
        "HAS_LSE": lse is not None,
        **FP_FUSION,
    }


def _types(q_dtype: torch.dtype, kv_dtype: torch.dtype) -> dict[str, Any]:
    """What K and V are stored in, what is computed in, and how exactly products are made."""
    compute = q_dtype if kv_dtype.itemsize == 1 else kv_dtype
    return {
        "KV_TYPE": TRITON_TYPES[kv_dtype],
        "COMPUTE_TYPE": TRITON_TYPES[compute],
        "DOT_TYPE": TRITON_TYPES[torch.float32 if is_interpreted() else compute],
        "PRECISION": "ieee" if compute is torch.float32 else "tf32",
    }


def _row_blocks(head_dim: int, v_head_dim: int, *, is_latent: bool) -> dict[str, Any]:
    """How a kernel loads a row of K: at once, or what is V and the rest apart."""
    first, rest = (v_head_dim, head_dim - v_head_dim) if is_latent else (head_dim, 0)
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, power_of_two(first)),
        "BLOCK_R": max(16, power_of_two(rest)),
        "LATENT": is_latent,
    }


def _check_latent(
    k: torch.Tensor | Segments,
    v: torch.Tensor | Segments,
    heads: int,
    head_dim: int,
    value_dim: int,
) -> None:
    if v is not k or heads != 1 or not 0 < value_dim < head_dim:
        raise KernelError(f"{value_dim} are no values within one head's keys of {head_dim}")


def _span(sight: Sight) -> tuple[int, int]:
    if sight.chunk is not None:
        return sight.chunk, _CHUNKED
    return (0, _FULL) if sight.window is None else (sight.window, _SLIDING)


def _check_shapes(
    q: torch.Tensor, k: torch.Tensor | Segments, v: torch.Tensor | Segments
) -> tuple[int, int, int]:
    """(kv heads, head dim, value dim); raises KernelError where they don't fit together."""
    widths = []
    for plane in (k, v):
        if isinstance(plane, Segments):
            widths.append((plane.kv_heads, plane.width))
        else:
            heads, width = plane.shape[1:]
            if plane.stride() != (heads * width, width, 1):
                raise KernelError(f"a plane with strides {plane.stride()} is not contiguous")
            widths.append((heads, width))
    (kv_heads, head_dim), (v_heads, v_head_dim) = widths
    if isinstance(k, Segments) != isinstance(v, Segments) or k.dtype != v.dtype:
        raise KernelError("K and V lie in different kinds of memory or types")
    if k.dtype not in TRITON_TYPES or q.dtype not in TRITON_TYPES or q.dtype.itemsize == 1:
        raise KernelError(f"no attention of {q.dtype} over {k.dtype}")
    if kv_heads != v_heads or q.shape[1] % kv_heads or q.shape[2] != head_dim:
        raise KernelError(f"q {tuple(q.shape)} does not fit {kv_heads} heads of {head_dim}")
    if q.stride(2) != 1 or q.stride(1) != head_dim:
        raise KernelError(f"the heads of a row of q must lie side by side, not {q.stride()}")
    return kv_heads, head_dim, v_head_dim

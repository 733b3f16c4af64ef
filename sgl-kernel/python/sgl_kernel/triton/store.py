"""New K and V to their slots, rotated on the way: one launch a layer.

The model's own rotation and the pool's store do the same in many; see docs/gpu.md, Note [Fused
rows]. Not yet run on a GPU.

Legend: T tokens, H query heads, G kv heads, D head dim, E value dim, S slots.
"""

from __future__ import annotations

import torch

from sgl_kernel.library import KernelError
from sgl_kernel.triton.attention import Segments, plane_base
from sgl_kernel.triton.kernels.store import rotate_and_store_kernel
from sgl_kernel.triton.launch import FP_FUSION, TRITON_TYPES, check_device, power_of_two

_HEADS = 8  # of a program


def rotate_and_store(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    k_plane: torch.Tensor | Segments,
    v_plane: torch.Tensor | Segments,
    *,
    interleaved: bool = False,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> torch.Tensor:
    """Rotated q [T, H * D] as a new tensor; slot slots[t] gets rotated k[t] and v[t].

    `k` [T, G * D] and `v` [T, G * E] of q's type, `cos` and `sin` float32 [T, D] (the sine's first
    half, or the first of each pair when `interleaved`, negated), `slots` int64 [T], distinct but
    for padding rows. Planes [S, G, D] and [S, G, E] as attention reads them. Numbers are rounded
    to q's type, then to the planes'; beyond fp8's largest they become that. Planes of fp8 hold
    k / `k_scale` and v / `v_scale`, as products with the float32 inverse. Raises KernelError for
    shapes and types that are not served.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    scales = (k_scale, v_scale)
    _launch(q, k, v, (cos, sin), slots, k_plane, v_plane, out, interleaved, scales)
    return out


def store_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    k_plane: torch.Tensor | Segments,
    v_plane: torch.Tensor | Segments,
    *,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """Slot slots[t] gets k[t] and v[t]; as `rotate_and_store` without a rotation."""
    _launch(k[:, :0], k, v, None, slots, k_plane, v_plane, k, False, (k_scale, v_scale))


def _launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor] | None,
    slots: torch.Tensor,
    k_plane: torch.Tensor | Segments,
    v_plane: torch.Tensor | Segments,
    out: torch.Tensor,
    interleaved: bool,
    scales: tuple[float, float],
) -> None:
    _check(q, k, v, angles, slots, k_plane, v_plane, scales)
    if not len(k):
        return
    kv_heads, head_dim = _shape(k_plane)
    num_heads, v_head_dim = q.shape[1] // head_dim, _shape(v_plane)[1]
    cos, sin = (k, k) if angles is None else angles
    blocks = 2 * -(-kv_heads // _HEADS) + (0 if angles is None else -(-num_heads // _HEADS))
    rotate_and_store_kernel[(len(k), blocks)](
        *(q, k, v, out, cos, sin, slots, plane_base(k_plane), plane_base(v_plane)),
        *(q.stride(0), k.stride(0), v.stride(0)),
        k_plane.slots if isinstance(k_plane, Segments) else 1,
        *(1.0 / scale for scale in scales),
        NUM_HEADS=num_heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        VALUE_DIM=v_head_dim,
        BLOCK_PAIRS=power_of_two(head_dim // 2),
        BLOCK_E=power_of_two(v_head_dim),
        BLOCK_HEADS=_HEADS,
        ROTATES=angles is not None,
        INTERLEAVED=interleaved,
        SEGMENTED=isinstance(k_plane, Segments),
        X_TYPE=TRITON_TYPES[k.dtype],
        KV_TYPE=TRITON_TYPES[k_plane.dtype],
        LARGEST=torch.finfo(k_plane.dtype).max if k_plane.dtype.itemsize == 1 else 0.0,
        num_warps=4,
        **FP_FUSION,
    )


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor] | None,
    slots: torch.Tensor,
    k_plane: torch.Tensor | Segments,
    v_plane: torch.Tensor | Segments,
    scales: tuple[float, float],
) -> None:
    """Raises KernelError for shapes, types and scales that are not served."""
    check_device(k)
    kv_heads, head_dim = _shape(k_plane)
    v_heads, v_head_dim = _shape(v_plane)
    tokens = len(k)
    fits = (
        k.shape == (tokens, kv_heads * head_dim)
        and v.shape == (tokens, kv_heads * v_head_dim)
        and q.shape == (tokens, q.shape[1] // head_dim * head_dim)
        and v_heads == kv_heads
        and head_dim % 2 == 0
        and len(slots) == tokens
    )
    if not fits:
        raise KernelError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} don't fit planes of "
            f"{kv_heads} heads of {head_dim} and {v_head_dim}"
        )
    if not q.dtype == k.dtype == v.dtype or k.dtype not in TRITON_TYPES:
        raise KernelError(f"q, k and v must be of one type, not {q.dtype}, {k.dtype}, {v.dtype}")
    if max(x.stride(-1) for x in (q, k, v)) != 1:
        raise KernelError("the elements of a row must lie side by side")
    if angles is not None and not all(angle.is_contiguous() for angle in angles):
        raise KernelError("cosines and sines must be contiguous")
    if scales != (1.0, 1.0) and k_plane.dtype.itemsize != 1:
        raise KernelError(f"only planes of fp8 have scales, not {k_plane.dtype}")


def _shape(plane: torch.Tensor | Segments) -> tuple[int, int]:
    if isinstance(plane, Segments):
        return plane.kv_heads, plane.width
    heads, width = plane.shape[1:]
    if plane.stride() != (heads * width, width, 1):
        raise KernelError(f"a plane with strides {plane.stride()} is not contiguous")
    return heads, width

"""Work on single rows, each read from memory once: norms, gates, rotations, copies to slots.

Computed in float32 and rounded once. Sources: RMSNorm, arXiv 1910.07467; SwiGLU, arXiv 2002.05202;
rotary embedding, arXiv 2104.09864.

Legend: R rows, D width, H heads, G kv heads, S slots.
"""

from __future__ import annotations

import ctypes

import torch

from sgl_kernel.library import (
    DTYPES,
    GateCall,
    Isa,
    KernelError,
    NormCall,
    RotateCall,
    StoreCall,
    allowed_isa,
    library,
)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    *,
    offset: float = 0.0,
    num_threads: int = 1,
    isa: Isa | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Normalise x [R, D], or x + residual: (norm [R, D] in the weight's type, the float32 sum).

    The factor is offset + weight [D]; `residual` is float32 [R, D], and without one the second is
    None. `isa` lowers the instructions used. Raises KernelError for what is not served.
    """
    rows, width = x.shape
    if x.dtype not in DTYPES or weight.dtype not in DTYPES or x.stride(1) != 1:
        raise KernelError(f"rms_norm does not serve {x.dtype} by {weight.dtype}")
    if weight.shape != (width,) or not weight.is_contiguous():
        raise KernelError(f"the weight must be contiguous [{width}]")
    out = torch.empty(rows, width, dtype=weight.dtype)
    total = None
    if residual is not None:
        if residual.dtype != torch.float32 or residual.shape != x.shape or residual.stride(1) != 1:
            raise KernelError(f"the residual must be float32 {list(x.shape)}")
        total = torch.empty(rows, width, dtype=torch.float32)
    call = NormCall(
        x.data_ptr(), None if residual is None else residual.data_ptr(),
        None if total is None else total.data_ptr(), weight.data_ptr(), out.data_ptr(),
        x.stride(0), 0 if residual is None else residual.stride(0), width, width, rows, width,
        eps, offset, DTYPES[x.dtype], DTYPES[weight.dtype],
        allowed_isa(isa), num_threads,
    )  # fmt: skip
    if library().sgl_norm(ctypes.byref(call)):
        raise KernelError(f"rms_norm does not serve {list(x.shape)}")
    return out, total


def silu_and_mul(x: torch.Tensor, *, num_threads: int = 1, isa: Isa | None = None) -> torch.Tensor:
    """silu(gate) * up of x [R, 2 D], which holds gate then up: [R, D] in the type of x.

    `isa` lowers the instructions used. Raises KernelError for what is not served.
    """
    rows, width = x.shape[0], x.shape[1] // 2
    if x.dtype not in DTYPES or x.stride(1) != 1 or x.shape[1] % 2:
        raise KernelError(f"silu_and_mul does not serve {x.dtype} {list(x.shape)}")
    out = torch.empty(rows, width, dtype=x.dtype)
    call = GateCall(
        x.data_ptr(), out.data_ptr(), x.stride(0), width, rows, width, DTYPES[x.dtype],
        allowed_isa(isa), num_threads,
    )  # fmt: skip
    if library().sgl_silu_and_mul(ctypes.byref(call)):
        raise KernelError(f"silu_and_mul does not serve {list(x.shape)}")
    return out


def rotate(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
    num_threads: int = 1,
    isa: Isa | None = None,
) -> torch.Tensor:
    """Turn the heads of x [R, H * D] by the angles of their rows: a new [R, H * D] of its type.

    `cos` and `sin` are float32 [R, D] or [R, 1, D]; the sine of a pair's first dimension comes
    negated. Pairs are dimensions d and d + D / 2, or 2 d and 2 d + 1 when `interleaved`. `isa`
    lowers the instructions used. Raises KernelError for what is not served.
    """
    rows, width = x.shape
    dim = cos.shape[-1]
    if x.dtype not in DTYPES or x.stride(1) != 1 or dim < 2 or dim % 2 or width % dim:
        raise KernelError(f"rotate does not serve {x.dtype} {list(x.shape)} in heads of {dim}")
    for angles in (cos, sin):
        if angles.dtype != torch.float32 or angles.numel() != rows * dim:
            raise KernelError(f"angles must be float32 [{rows}, {dim}]")
        if not angles.is_contiguous():
            raise KernelError("angles must be contiguous")
    out = torch.empty(rows, width, dtype=x.dtype)
    call = RotateCall(
        x.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr(), x.stride(0), dim, width,
        rows, width, dim, interleaved, DTYPES[x.dtype],
        allowed_isa(isa), num_threads,
    )  # fmt: skip
    if library().sgl_rotate(ctypes.byref(call)):
        raise KernelError(f"rotate does not serve {list(x.shape)}")
    return out


class KVPlanes:
    """A layer's K and V planes [S, G, D] as `store` writes them; holds both tensors.

    Raises KernelError where a slot of a plane is not contiguous.
    """

    def __init__(self, k_plane: torch.Tensor, v_plane: torch.Tensor) -> None:
        self.planes = (k_plane, v_plane)
        for plane in self.planes:
            if not plane[0].is_contiguous():
                raise KernelError(f"slots of {list(plane.shape)} must be contiguous")
        self._shapes = (k_plane.shape[1:], v_plane.shape[1:])
        self._dtypes = (k_plane.dtype, v_plane.dtype)
        self._addresses = (k_plane.data_ptr(), v_plane.data_ptr())
        self._slot_bytes = tuple(p.stride(0) * p.element_size() for p in self.planes)
        self._row_bytes = tuple(p.shape[1] * p.shape[2] * p.element_size() for p in self.planes)

    def store(
        self, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, num_threads: int = 1
    ) -> None:
        """Write row i of k and v [R, G, D] into slot slots[i] of their planes.

        `slots` int64 [R] must be distinct and in [0, S), which the caller has made sure of: a
        step's slots are the same for every layer. Raises KernelError for other shapes or types.
        """
        rows = len(slots)
        if slots.dtype != torch.int64 or not slots.is_contiguous():
            raise KernelError("slots must be contiguous int64")
        sources = []
        for new, shape, dtype in zip((k, v), self._shapes, self._dtypes, strict=True):
            if new.dtype != dtype or len(new) != rows or new.shape[1:] != shape:
                raise KernelError(f"{new.dtype} {list(new.shape)} does not fit the plane's slots")
            row, head, element = new.stride()
            if element != 1 or (head != shape[1] and shape[0] > 1):
                raise KernelError("rows must be contiguous")
            sources.append((new.data_ptr(), row * new.element_size()))
        (k_data, k_row), (v_data, v_row) = sources
        call = StoreCall(
            k_data, v_data, *self._addresses, slots.data_ptr(), k_row, v_row, *self._slot_bytes,
            rows, *self._row_bytes, num_threads,
        )  # fmt: skip
        if library().sgl_store(ctypes.byref(call)):
            raise KernelError(f"store does not serve {list(k.shape)}")

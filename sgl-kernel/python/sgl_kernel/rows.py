"""Work on single rows, fused so that a row is read from memory once: norms and gates.

Computed in float32 and rounded once. Sources: RMSNorm, arXiv 1910.07467; SwiGLU, arXiv 2002.05202.

Legend: R rows, D width.
"""

from __future__ import annotations

import ctypes

import torch

from sgl_kernel.library import DTYPES, GateCall, Isa, KernelError, NormCall, cpu_isa, library


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
    best = cpu_isa()
    call = NormCall(
        x.data_ptr(), None if residual is None else residual.data_ptr(),
        None if total is None else total.data_ptr(), weight.data_ptr(), out.data_ptr(),
        x.stride(0), 0 if residual is None else residual.stride(0), width, width, rows, width,
        eps, offset, DTYPES[x.dtype], DTYPES[weight.dtype],
        best if isa is None else min(isa, best), num_threads,
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
    best = cpu_isa()
    call = GateCall(
        x.data_ptr(), out.data_ptr(), x.stride(0), width, rows, width, DTYPES[x.dtype],
        best if isa is None else min(isa, best), num_threads,
    )  # fmt: skip
    if library().sgl_silu_and_mul(ctypes.byref(call)):
        raise KernelError(f"silu_and_mul does not serve {list(x.shape)}")
    return out

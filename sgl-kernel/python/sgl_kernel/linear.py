"""Products of a few rows with a weight as its checkpoint has it: the weight is read once.

Meant for decode steps, whose products wait for memory: a weight row in a 16-bit type is widened in
registers, so half the bytes of float32 are read. For many rows a blocked matrix product is faster,
but with AVX2 alone, where this is one.

Legend: R rows, N outputs, K inputs.
"""

from __future__ import annotations

import torch

from sgl_kernel.library import DTYPES, Isa, KernelError, LinearCall, Op, allowed_isa
from sgl_kernel.tape import empty, make


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    num_threads: int = 1,
    isa: Isa | None = None,
) -> torch.Tensor:
    """x [R, K] times weight [N, K] transposed, plus bias [N], all of one dtype: [R, N].

    Summed in float32 and rounded once; what a row gets does not depend on the other rows beyond
    the order of additions. `isa` lowers the instructions used. Raises KernelError for shapes and
    types that are not served.
    """
    rows, width = x.shape
    outs = weight.shape[0]
    if x.dtype not in DTYPES or weight.dtype != x.dtype or weight.shape[1] != width:
        raise KernelError(f"linear does not serve {x.dtype} {list(x.shape)} by {weight.dtype}")
    if x.stride(1) != 1 or weight.stride(1) != 1:
        raise KernelError("rows must be contiguous")
    if bias is not None and (
        bias.dtype != x.dtype or bias.shape != (outs,) or not bias.is_contiguous()
    ):
        raise KernelError(f"bias must be contiguous {x.dtype} [{outs}]")
    out = empty((rows, outs), x.dtype)
    if rows == 0 or outs == 0:
        return out
    call = LinearCall(
        x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr(),
        x.stride(0), weight.stride(0), outs, rows, outs, width,
        DTYPES[x.dtype], allowed_isa(isa), num_threads,
    )  # fmt: skip
    make(Op.LINEAR, call, x, weight, bias)
    return out

"""Rows on a GPU: norms, gated activations and the choice of experts, one launch each.

What each computes is what the layer of the same name does (layernorm.py, activation.py, moe.py of
sglang.srt.layers); see docs/gpu.md, Note [Fused rows]. Not yet run on a GPU.

Legend: T tokens, H hidden width, E experts, K experts of a token.
"""

from __future__ import annotations

import torch

from sgl_kernel.library import KernelError
from sgl_kernel.triton.kernels.rows import gate_kernel, rms_norm_kernel, route_kernel
from sgl_kernel.triton.launch import FP_FUSION, check_device, power_of_two

_MOST_COLUMNS = 1 << 16  # of a row that a program holds whole
_GATE_COLUMNS = 1024
_SILU, _GELU_TANH, _CLAMPED = 0, 1, 2


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    *,
    offset: float = 0.0,
    keep: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Norm of x [T, H] (+ residual [T, H]) times weight [H] + offset, in the weight's type.

    The second result is x + residual in float32, or x in float32 with `keep`, else None. Inputs
    are not changed. Raises KernelError for shapes that do not fit.
    """
    check_device(x)
    rows, width = x.shape
    sides = [x] if residual is None else [x, residual]
    if any(side.shape != x.shape or side.stride(1) != 1 for side in sides):
        raise KernelError(f"rows of {tuple(x.shape)} are normed, with residuals of that shape")
    if weight.shape != (width,) or width > _MOST_COLUMNS:
        raise KernelError(f"{width} columns, {tuple(weight.shape)} weights")
    out = torch.empty((rows, width), dtype=weight.dtype, device=x.device)
    keeps = keep or residual is not None
    total = torch.empty((rows, width), dtype=torch.float32, device=x.device) if keeps else None
    if rows:
        block = power_of_two(width)
        rms_norm_kernel[(rows,)](
            x,
            residual,
            weight,
            out,
            total,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            eps,
            offset,
            WIDTH=width,
            BLOCK=block,
            ADDS=residual is not None,
            KEEPS=keeps,
            num_warps=min(16, max(4, block // 512)),
            **FP_FUSION,
        )
    return out, total


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of x [T, 2 d], which holds gate then up: [T, d]."""
    return _gate(x, _SILU)


def gelu_tanh_and_mul(x: torch.Tensor) -> torch.Tensor:
    """gelu(gate) * up, with gelu's tanh approximation: x [T, 2 d] to [T, d]."""
    return _gate(x, _GELU_TANH)


def clamped_gate(x: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """(up + 1) * gate * sigmoid(alpha gate), gate up to `limit` and up within it: to [T, d]."""
    return _gate(x, _CLAMPED, alpha, limit)


def _gate(x: torch.Tensor, kind: int, alpha: float = 0.0, limit: float = 0.0) -> torch.Tensor:
    check_device(x)
    rows, both = x.shape
    if both % 2 or x.stride(1) != 1:
        raise KernelError(f"{tuple(x.shape)} is no gate and up side by side")
    width = both // 2
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    if rows and width:
        block = min(_GATE_COLUMNS, power_of_two(width))
        gate_kernel[(rows, -(-width // block))](
            x, out, x.stride(0), alpha, limit, WIDTH=width, BLOCK=block, KIND=kind, **FP_FUSION
        )
    return out


def route(
    logits: torch.Tensor, num_chosen: int, *, softmax: bool, renormalize: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of every token, int64 [T, K], best first, and their weights, float32 [T, K].

    `logits` [T, E]. `softmax`: weights of the softmax over all experts, divided by the sum of the
    chosen ones with `renormalize`; else the chosen logits' sigmoids (Llama 4). Among equals the
    lowest expert is taken.
    """
    check_device(logits)
    tokens, num_experts = logits.shape
    if not 1 <= num_chosen <= num_experts or logits.stride(1) != 1:
        raise KernelError(f"{num_chosen} of {num_experts} experts can't be chosen")
    shape, device = (tokens, num_chosen), logits.device
    experts = torch.empty(shape, dtype=torch.int64, device=device)
    weights = torch.empty(shape, dtype=torch.float32, device=device)
    if tokens:
        route_kernel[(tokens,)](
            logits,
            experts,
            weights,
            logits.stride(0),
            NUM_EXPERTS=num_experts,
            BLOCK=power_of_two(num_experts),
            CHOSEN=num_chosen,
            SOFTMAX=softmax,
            RENORMALIZE=renormalize,
            BLOCK_CHOSEN=power_of_two(num_chosen),
            num_warps=1 if num_experts <= 128 else 4,
            **FP_FUSION,
        )
    return experts, weights

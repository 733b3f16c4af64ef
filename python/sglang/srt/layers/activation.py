"""Gated activations of the MLP: stateless modules over a merged gate and up projection.

All map x [*, 2 d], which holds gate then up, to [*, d] (arXiv 2002.05202).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from sglang.srt.utils.native import kernels_for

# Below, the native kernel's call from Python costs more than PyTorch's passes over the memory.
_FEW_ELEMENTS = 1 << 15


class SiluAndMul(nn.Module):
    """silu(gate) * up."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernels = kernels_for(x)
        if kernels is not None and (x.numel() >= _FEW_ELEMENTS or kernels.is_recording()):
            flat = x.reshape(-1, x.shape[-1])
            out: torch.Tensor = kernels.silu_and_mul(flat, num_threads=torch.get_num_threads())
            return out.view(*x.shape[:-1], x.shape[-1] // 2)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up


class GeluTanhAndMul(nn.Module):
    """gelu(gate) * up, with the tanh approximation of gelu (arXiv 1606.08415)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh") * up


class ClampedGate(nn.Module):
    """(up + 1) * gate * sigmoid(alpha * gate), gate at most `limit` and up within +-`limit`.

    Source: arXiv 2508.10925; x * sigmoid(1.702 x) approximates gelu, arXiv 1606.08415.
    """

    def __init__(self, alpha: float, limit: float) -> None:
        super().__init__()
        self.alpha, self.limit = alpha, limit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        gate = gate.clamp(max=self.limit)
        up = up.clamp(-self.limit, self.limit)
        return (up + 1) * gate * torch.sigmoid(self.alpha * gate)

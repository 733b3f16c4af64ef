"""`ResidualSum`: adding to the residual stream where no norm follows that would add for it."""

from __future__ import annotations

import torch
from torch import nn

from sglang.srt.layers.scaled import DROWNING_EPS, TAKEN_BACK
from sglang.srt.utils.native import kernels_for


class ResidualSum(nn.Module):
    """x + residual: the sum in x's type for a layer to read, and in float32 for the stream."""

    def __init__(self, hidden_size: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.zeros: torch.Tensor
        self.register_buffer("zeros", torch.zeros(hidden_size, dtype=dtype), persistent=False)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, hidden] and float32 residual [T, hidden]; neither is modified."""
        kernels = kernels_for(x, self.zeros)
        if kernels is not None and kernels.is_recording():
            out: tuple[torch.Tensor, torch.Tensor] = kernels.rms_norm(
                x,
                self.zeros,
                DROWNING_EPS,
                residual,
                offset=TAKEN_BACK,
                num_threads=torch.get_num_threads(),
            )
            return out
        total = x + residual
        return total.to(x.dtype), total


def begin_residual(x: torch.Tensor) -> torch.Tensor:
    """x [T, hidden] in float32: a new residual stream."""
    kernels = kernels_for(x)
    if kernels is not None and kernels.is_recording():
        wide: torch.Tensor = kernels.widen(x, num_threads=torch.get_num_threads())
        return wide
    return x.float()

"""`ResidualSum`: adding to the residual stream where no norm follows that would add for it."""

from __future__ import annotations

import torch
from torch import nn

from sglang.srt.utils.native import kernels_for

# A norm's eps beside which the mean of squares is nothing: it then divides by 2^30, which its
# factor takes back, both without rounding. So the kernel that is there adds and rounds.
_DROWNING_EPS = 2.0**60
_TAKEN_BACK = 2.0**30


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
                _DROWNING_EPS,
                residual,
                offset=_TAKEN_BACK,
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

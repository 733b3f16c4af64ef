"""Layer normalisation with the residual addition, in `RMSNorm`'s shape.

Source: arXiv 1607.06450. A layer norm is the root-mean-square norm of x less its mean. Where a
tape is recorded it is made of the native calls that there are: the mean is a product with a row
of 1 / hidden, and its negative, spread over the row by another, is what the norm adds.
"""

from __future__ import annotations

from types import ModuleType
from typing import overload

import torch
import torch.nn.functional as F

from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.residual import ResidualSum, begin_residual
from sglang.srt.layers.weights import copy_checked, frozen_parameter
from sglang.srt.utils.native import kernels_for


class BiaslessLayerNorm(RMSNorm):
    """(x - mean(x)) / sqrt(var(x) + eps) * weight over the last dimension, in float32."""

    def __init__(self, hidden_size: int, eps: float, *, dtype: torch.dtype) -> None:
        super().__init__(hidden_size, eps, dtype=dtype)
        self.sum = ResidualSum(hidden_size, dtype=dtype)
        self.average: torch.Tensor
        self.spread: torch.Tensor
        for name, row in (
            ("average", torch.full((1, hidden_size), 1 / hidden_size, dtype=torch.float32)),
            ("spread", torch.full((hidden_size, 1), -1.0, dtype=torch.float32)),
        ):
            self.register_buffer(name, row, persistent=False)

    @overload
    def forward(self, x: torch.Tensor, residual: None = None) -> torch.Tensor: ...

    @overload
    def forward(
        self, x: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """As `RMSNorm.forward`, of x [T, hidden_size]."""
        if residual is None:
            return self._normed(begin_residual(x))
        total = self.sum(x, residual)[1]
        return self._normed(total), total

    def begin(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `RMSNorm.begin`."""
        wide = begin_residual(x)
        return self._normed(wide), wide

    def _normed(self, wide: torch.Tensor) -> torch.Tensor:
        kernels = kernels_for(wide, self.weight)
        if kernels is not None and kernels.is_recording():
            return self._recorded(kernels, wide)
        normed = F.layer_norm(wide, wide.shape[-1:], self.weight.float(), None, self.eps)
        return normed.to(self.weight.dtype)

    def _recorded(self, kernels: ModuleType, wide: torch.Tensor) -> torch.Tensor:
        threads = torch.get_num_threads()
        mean = kernels.linear(wide, self.average, num_threads=threads)
        centre = kernels.linear(mean, self.spread, num_threads=threads)
        normed: torch.Tensor = kernels.rms_norm(
            wide, self.weight, self.eps, centre, num_threads=threads
        )[0]
        return normed


class BiasedLayerNorm(BiaslessLayerNorm):
    """The same plus a bias; its steps are not recorded."""

    def __init__(self, hidden_size: int, eps: float, *, dtype: torch.dtype) -> None:
        super().__init__(hidden_size, eps, dtype=dtype)
        self.bias = frozen_parameter(hidden_size, dtype=dtype)

    def _normed(self, wide: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        normed = F.layer_norm(wide, wide.shape[-1:], weight, bias, self.eps)
        return normed.to(self.weight.dtype)

    def weight_loader(self, param_name: str, loaded: torch.Tensor) -> None:
        """Copy "weight" or "bias"; ValueError for a wrong name or shape."""
        if param_name == "bias":
            copy_checked(self.bias.data, loaded, param_name)
        else:
            super().weight_loader(param_name, loaded)

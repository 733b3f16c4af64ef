"""Root-mean-square normalisation (arXiv 1910.07467), with the residual addition fused in.

Used before attention, before the MLP, at the end, and on heads (QK norm). Statistics in float32.
The residual stream stays in float32 whatever the model's type: 60 additions rounded to bfloat16
cost a third of the accuracy of a 30-layer model's logits, keeping them costs next to nothing.
On a CPU the native kernel, where it is installed, reads a row once for all of it. Beside it layer
normalisation (arXiv 1607.06450), of encoders and of index keys.
"""

from __future__ import annotations

from types import ModuleType
from typing import ClassVar, overload

import torch
import torch.nn.functional as F
from torch import nn

from sglang.srt.layers.compiled import CompiledLayer, compiled
from sglang.srt.layers.weights import LoadedWeight, copy_checked, frozen_parameter
from sglang.srt.utils.native import device_kernels_for, kernels_for


class RMSNorm(CompiledLayer):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

    weight_offset: ClassVar[float] = 0.0  # added to the checkpoint's weight

    def __init__(self, hidden_size: int, eps: float, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = frozen_parameter(hidden_size, dtype=dtype)
        self.eps = eps

    @overload
    def forward(self, x: torch.Tensor, residual: None = None) -> torch.Tensor: ...

    @overload
    def forward(
        self, x: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Normalise x [*, hidden_size]; with `residual` return (norm(x + residual), x + residual).

        The norm comes in the weight's type, the sum in the residual's. Neither input is modified.
        """
        if self.compiles(x):
            if residual is None:
                single: torch.Tensor = compiled(type(self)._norm)(self, x)
                return single
            pair: tuple[torch.Tensor, torch.Tensor] = compiled(type(self)._add)(self, x, residual)
            return pair
        kernels = kernels_for(x, self.weight)
        if kernels is not None and (residual is None or residual.dtype is torch.float32):
            out, total = kernels.rms_norm(
                x if x.dim() == 3 else x.reshape(-1, x.shape[-1]),
                self.weight,
                self.eps,
                None if residual is None else residual.reshape(-1, x.shape[-1]),
                offset=self.weight_offset,
                num_threads=torch.get_num_threads(),
            )
            normed = out.view(x.shape)
            return normed if residual is None else (normed, total.view(x.shape))
        there = device_kernels_for(x, self.weight)
        if there is not None and (residual is None or residual.dtype is torch.float32):
            flat = None if residual is None else residual.reshape(-1, x.shape[-1])
            normed, total = self._launch(there, x, flat, keep=False)
            return normed if residual is None else (normed, total)
        return self._norm(x) if residual is None else self._add(x, residual)

    def begin(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Norm of x [*, hidden_size] in the weight's type, and x in float32: a new residual."""
        if self.compiles(x):
            begun: tuple[torch.Tensor, torch.Tensor] = compiled(type(self)._begin)(self, x)
            return begun
        kernels = kernels_for(x, self.weight)
        there = device_kernels_for(x, self.weight)
        if there is not None:
            return self._launch(there, x, None, keep=True)
        if kernels is None:
            return self._begin(x)
        out, residual = kernels.rms_norm(
            x.reshape(-1, x.shape[-1]),
            self.weight,
            self.eps,
            offset=self.weight_offset,
            keep=True,
            num_threads=torch.get_num_threads(),
        )
        return out.view(x.shape), residual.view(x.shape)

    def _launch(
        self, kernels: ModuleType, x: torch.Tensor, residual: torch.Tensor | None, *, keep: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm and the sum by Triton's kernel; the sum is x itself where nobody wants one."""
        out, total = kernels.rms_norm(
            x.reshape(-1, x.shape[-1]),
            self.weight,
            self.eps,
            residual,
            offset=self.weight_offset,
            keep=keep,
        )
        return out.view(x.shape), x if total is None else total.view(x.shape)

    def _begin(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._norm(x), x.float()

    def _add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = x + residual
        return self._norm(total), total

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight if x.dtype == self.weight.dtype else self.weight.to(x.dtype)
        return F.rms_norm(x, (x.shape[-1],), weight, self.eps).to(self.weight.dtype)

    def weight_loader(self, param_name: str, loaded: torch.Tensor) -> None:
        """Copy "weight"; ValueError for a wrong name or shape."""
        if param_name != "weight":
            raise ValueError(f"RMSNorm has no parameter {param_name!r}")
        copy_checked(self.weight.data, loaded, param_name)


class GemmaRMSNorm(RMSNorm):
    """`RMSNorm` whose checkpoint weight is the distance of the factor from 1.

    1 + weight is computed in float32: in bfloat16 a small weight would be lost beside the 1.
    """

    weight_offset: ClassVar[float] = 1.0

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        factor = self.weight_offset + self.weight.float()
        return F.rms_norm(x.float(), (x.shape[-1],), factor, self.eps).to(self.weight.dtype)


class LayerNorm(nn.Module):
    """Layer normalisation in float32: [*, hidden_size] -> [*, hidden_size] in `dtype`."""

    def __init__(self, hidden_size: int, eps: float, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = frozen_parameter(hidden_size, dtype=dtype)
        self.bias = frozen_parameter(hidden_size, dtype=dtype)
        self._eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = F.layer_norm(
            x.float(), x.shape[-1:], self.weight.float(), self.bias.float(), self._eps
        )
        return wide.to(self.weight.dtype)

    def weight_loader(self, param_name: str, loaded: LoadedWeight) -> None:
        """Copy "weight" or "bias"; ValueError for a wrong name, shape or kind."""
        if not isinstance(loaded, torch.Tensor):
            raise ValueError(f"{param_name}: quantised numbers don't belong here")
        copy_checked(self.get_parameter(param_name).data, loaded, param_name)

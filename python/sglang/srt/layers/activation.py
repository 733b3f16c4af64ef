"""Gated activations of the MLP: stateless modules over a merged gate and up projection.

All map x [*, 2 d], which holds gate then up, to [*, d] (arXiv 2002.05202).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sglang.srt.utils.native import kernels_for

# Below, the native kernel's call from Python costs more than PyTorch's passes over the memory.
_FEW_ELEMENTS = 1 << 15


class GatedActivation(nn.Module, ABC):
    """What the activations share: the native kernel where there is one, else `compute`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernels = kernels_for(x)
        if kernels is not None and (x.numel() >= _FEW_ELEMENTS or kernels.is_recording()):
            flat = x.reshape(-1, x.shape[-1])
            threads = torch.get_num_threads()
            out: torch.Tensor = kernels.gate_and_mul(
                flat, self.opening(kernels), num_threads=threads
            )
            return out.view(*x.shape[:-1], x.shape[-1] // 2)
        return self.compute(*x.chunk(2, dim=-1))

    @abstractmethod
    def compute(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """The answer for gate and up [*, d]: [*, d]."""

    @abstractmethod
    def opening(self, kernels: ModuleType) -> Any:
        """The same as `sgl_kernel.Gate`; `kernels` is that package."""


class SiluAndMul(GatedActivation):
    """silu(gate) * up."""

    def compute(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return F.silu(gate) * up

    def opening(self, kernels: ModuleType) -> Any:
        return kernels.Gate(kernels.GateKind.SILU)


class GeluTanhAndMul(GatedActivation):
    """gelu(gate) * up, with the tanh approximation of gelu (arXiv 1606.08415)."""

    def compute(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return F.gelu(gate, approximate="tanh") * up

    def opening(self, kernels: ModuleType) -> Any:
        return kernels.Gate(kernels.GateKind.GELU_TANH)


class ClampedGate(GatedActivation):
    """(up + 1) * gate * sigmoid(alpha * gate), gate at most `limit` and up within +-`limit`.

    Source: arXiv 2508.10925; x * sigmoid(1.702 x) approximates gelu, arXiv 1606.08415.
    """

    def __init__(self, alpha: float, limit: float) -> None:
        super().__init__()
        self.alpha, self.limit = alpha, limit

    def compute(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate = gate.clamp(max=self.limit)
        up = up.clamp(-self.limit, self.limit)
        return (up + 1) * gate * torch.sigmoid(self.alpha * gate)

    def opening(self, kernels: ModuleType) -> Any:
        return kernels.Gate(kernels.GateKind.CLAMPED, self.alpha, self.limit)

"""Gated activations of the MLP: stateless modules over a merged gate and up projection.

All map x [*, 2 d], which holds gate then up, to [*, d] (arXiv 2002.05202).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from sglang.srt.layers.compiled import CompiledLayer, compiled
from sglang.srt.utils.native import device_kernels_for, kernels_for

# Below, the native kernel's call from Python costs more than PyTorch's passes over the memory.
_FEW_ELEMENTS = 1 << 15


class GatedActivation(CompiledLayer, ABC):
    """What the activations share: the native kernel where there is one, else `compute`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.compiles(x):
            made: torch.Tensor = compiled(type(self).compute)(self, *x.chunk(2, dim=-1))
            return made
        kernels = kernels_for(x)
        if kernels is not None and (x.numel() >= _FEW_ELEMENTS or kernels.is_recording()):
            flat = x.reshape(-1, x.shape[-1])
            threads = torch.get_num_threads()
            out: torch.Tensor = kernels.gate_and_mul(
                flat, self.opening(kernels), num_threads=threads
            )
            return out.view(*x.shape[:-1], x.shape[-1] // 2)
        there = device_kernels_for(x)
        if there is not None:
            gated = self.launch(there, x.reshape(-1, x.shape[-1]))
            return gated.view(*x.shape[:-1], x.shape[-1] // 2)
        return self.compute(*x.chunk(2, dim=-1))

    @abstractmethod
    def compute(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """The answer for gate and up [*, d]: [*, d]."""

    @abstractmethod
    def opening(self, kernels: ModuleType) -> Any:
        """The same as `sgl_kernel.Gate`; `kernels` is that package."""

    @abstractmethod
    def launch(self, kernels: ModuleType, x: torch.Tensor) -> torch.Tensor:
        """The answer for x [T, 2 d] by `kernels`, the package sgl_kernel.triton."""


class SiluAndMul(GatedActivation):
    """silu(gate) * up."""

    def compute(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return F.silu(gate) * up

    def opening(self, kernels: ModuleType) -> Any:
        return kernels.Gate(kernels.GateKind.SILU)

    def launch(self, kernels: ModuleType, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = kernels.silu_and_mul(x)
        return out


class GeluTanhAndMul(GatedActivation):
    """gelu(gate) * up, with the tanh approximation of gelu (arXiv 1606.08415)."""

    def compute(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return F.gelu(gate, approximate="tanh") * up

    def opening(self, kernels: ModuleType) -> Any:
        return kernels.Gate(kernels.GateKind.GELU_TANH)

    def launch(self, kernels: ModuleType, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = kernels.gelu_tanh_and_mul(x)
        return out


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

    def launch(self, kernels: ModuleType, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = kernels.clamped_gate(x, self.alpha, self.limit)
        return out

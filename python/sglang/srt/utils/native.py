"""The optional package of native kernels, looked for once."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

import torch

from sglang.srt.environ import Environ

_SERVED = frozenset((torch.float32, torch.bfloat16, torch.float16))


@cache
def native_kernels() -> ModuleType | None:
    """The package sgl_kernel with its library loaded.

    None where it is not installed or built, and where SGLANG_DISABLE_NATIVE_KERNELS is set.
    """
    if Environ.from_os().disable_native_kernels:
        return None
    try:
        kernels = import_module("sgl_kernel")
        kernels.cpu_isa()
    except ImportError:
        return None
    return kernels


@cache
def triton_kernels() -> ModuleType | None:
    """The package sgl_kernel.triton; None where it or Triton is not installed."""
    try:
        return import_module("sgl_kernel.triton")
    except ImportError:
        return None


def device_kernels_for(*tensors: torch.Tensor) -> ModuleType | None:
    """`triton_kernels` where all tensors lie on a GPU in types that they compute, else None.

    None too where SGLANG_DISABLE_NATIVE_KERNELS is set: layers then compute by PyTorch alone.
    """
    for tensor in tensors:
        if tensor.device.type != "cuda" or tensor.dtype not in _SERVED:
            return None
    return _layer_kernels()


@cache
def _layer_kernels() -> ModuleType | None:
    return None if Environ.from_os().disable_native_kernels else triton_kernels()


def codes_kernels(device: str | torch.device) -> ModuleType | None:
    """The package whose `QuantizedWeight` computes on `device`; None where there is none.

    `native_kernels` of a CPU, `triton_kernels` of a GPU, none where
    SGLANG_DISABLE_NATIVE_KERNELS is set.
    """
    kind = torch.device(device).type
    if kind == "cpu":
        return native_kernels()
    return _layer_kernels() if kind == "cuda" else None


def kernels_for(*tensors: torch.Tensor) -> ModuleType | None:
    """`native_kernels` where all tensors lie on the CPU in types that they compute, else None."""
    for tensor in tensors:
        if tensor.device.type != "cpu" or tensor.dtype not in _SERVED:
            return None
    return native_kernels()

"""The optional package of native kernels, looked for once."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType


@cache
def native_kernels() -> ModuleType | None:
    """The package sgl_kernel with its library loaded; None where it is not installed or built."""
    try:
        kernels = import_module("sgl_kernel")
        kernels.cpu_isa()
    except ImportError:
        return None
    return kernels

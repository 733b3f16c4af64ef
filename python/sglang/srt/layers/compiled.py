"""Rows of small steps computed by torch.compile (--enable-torch-compile), where a layer offers it.

Norms, gates and rotations have PyTorch code beside their kernels. `compile_layers` lets torch make
one kernel of each piece of that code, for steps of few rows. A piece is compiled for all layers of
a class together, when it is first computed; rows and widths are variables, a single row aside.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn


class CompiledLayer(nn.Module):
    """A layer of which torch.compile computes steps of at most `compiled_rows` rows; 0: none."""

    compiled_rows = 0

    def compiles(self, x: torch.Tensor) -> bool:
        """Whether torch.compile computes x [T, ...]."""
        return 0 < len(x) <= self.compiled_rows


def compile_layers(model: nn.Module, max_rows: int) -> None:
    """Let every layer of `model` that can compute steps of at most `max_rows` rows compiled."""
    for module in model.modules():
        if isinstance(module, CompiledLayer):
            module.compiled_rows = max_rows


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` through torch.compile; it compiles in this process, which starts no others."""
    from torch._inductor import config

    config.compile_threads = 1
    made: Callable[..., Any] = torch.compile(function, dynamic=True)
    return made

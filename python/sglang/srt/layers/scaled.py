"""Rows times one number, as a native call where a tape is recorded: `scaled`."""

from __future__ import annotations

import torch

from sglang.srt.utils.native import kernels_for


def scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
    """x [R, D] times `factor` rounded to float32: a new tensor of its type, rounded once."""
    kernels = kernels_for(x)
    if kernels is not None and kernels.is_recording():
        made: torch.Tensor = kernels.scale(x, factor, num_threads=torch.get_num_threads())
        return made
    return x * factor

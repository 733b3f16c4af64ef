"""Rows of a product rounded to E4M3, for GPUs whose tensor cores multiply it with a weight of E4M3.

Asked for weight by weight (`QuantizedWeight.rounds_inputs`). See docs/gpu.md, Note [Quantised
weights]. Not yet run on a GPU.

Legend: R rows of x, K inputs, G inputs of a group.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from sgl_kernel.triton.kernels.fp8 import round_rows_kernel
from sgl_kernel.triton.launch import FP_FUSION, is_interpreted, power_of_two

_FIRST_CAPABILITY = (8, 9)  # whose tensor cores multiply FP8
_BLOCK = 1024  # inputs that are looked at together


class RoundedRows(NamedTuple):
    """x = codes * scales: float8_e4m3fn [R, K] and float32 [R, ceil(K / G)]."""

    codes: torch.Tensor
    scales: torch.Tensor


def round_rows(x: torch.Tensor, group: int) -> RoundedRows:
    """x [R, K], whose rows are contiguous, with a scale for each `group` inputs; 0: for a row."""
    rows, width = x.shape
    groups = -(-width // group) if group else 1
    codes = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, groups, dtype=torch.float32, device=x.device)
    if rows:
        round_rows_kernel[(rows, groups)](
            *(x, codes, scales, width, x.stride(0), codes.stride(0), scales.stride(0)),
            GROUP=group,
            BLOCK=min(_BLOCK, power_of_two(group or width)),
            **FP_FUSION,
        )
    return RoundedRows(codes, scales)


@cache
def multiplies_fp8(device: torch.device) -> bool:
    """Whether tensor cores of `device` multiply FP8; where kernels are interpreted, yes."""
    if device.type != "cuda":
        return is_interpreted()
    return torch.cuda.get_device_capability(device) >= _FIRST_CAPABILITY

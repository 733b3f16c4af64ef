"""Products with weights, for devices that multiply 16-bit floats well and CPUs that do not.

A CPU without instructions for bfloat16 or float16 takes their products apart, element by element:
PyTorch then reaches a seventh of what the same processor does in float32. There a tile of the
weight is widened, multiplied in float32 and rounded once, which the fast instructions do as well.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

# Fewer rows than these cost less as they are: widening reads and writes the weight once more.
_FEW_ROWS = 8
_TILE_ELEMENTS = 1 << 20  # of the weight, widened at a time: 4 MiB stay in a CPU's caches
_TILE_ROWS = 512  # of the input, multiplied with a tile at a time


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [*, in] times weight [out, in] transposed, plus bias [out]: [*, out] in the type of x.

    Sums are taken in float32 or wider and rounded once.
    """
    many = x.numel() >= _FEW_ROWS * x.shape[-1]
    if many and x.device.type == "cpu" and not cpu_multiplies(x.dtype):
        return widened_linear(x, weight, bias)
    return F.linear(x, weight, bias)


@cache
def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this processor has matrix or dot instructions for `dtype` that PyTorch uses."""
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


def widened_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`linear` by way of float32, with at most a tile of the weight widened at any time."""
    out_features, in_features = weight.shape
    rows = x.reshape(-1, in_features).float()
    result = x.new_empty(len(rows), out_features)
    width = min(out_features, max(1, _TILE_ELEMENTS // in_features))
    tile_room = rows.new_empty(width, in_features)
    part_room = rows.new_empty(min(len(rows), _TILE_ROWS) * width)
    for first in range(0, out_features, width):
        last = min(first + width, out_features)
        tile = tile_room[: last - first].copy_(weight[first:last])
        for begin in range(0, len(rows), _TILE_ROWS):
            some = rows[begin : begin + _TILE_ROWS]
            part = part_room[: len(some) * len(tile)].view(len(some), len(tile))
            torch.mm(some, tile.t(), out=part)
            if bias is not None:
                part += bias[first:last]
            result[begin : begin + len(some), first:last] = part
    return result.view(*x.shape[:-1], out_features)

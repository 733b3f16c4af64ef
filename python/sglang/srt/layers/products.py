"""Products with weights: PyTorch's, and on a CPU what is faster there.

- *A few rows*, as in a decode step, wait for the weight to be read. Where the native kernels are
  installed they read it once, in its own type. With bfloat16 dot instructions the kernel is faster
  up to more rows, and on matrix tiles (AMX) up to still more. Where PyTorch takes bfloat16 apart
  with AVX-512 it is faster for one row only.
- *Many rows* with AVX2 alone: the kernel is faster there too, in float32 up to some hundred.
- *Many rows of a 16-bit type*, on another CPU without instructions for it: PyTorch takes such
  products apart, element by element, and reaches a seventh of what the same processor does in
  float32. There a tile of the weight is widened, multiplied in float32 and rounded once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F

from sglang.srt.utils.native import kernels_for

# Up to so many rows the native kernel is the faster way, see benchmark/cpu/bench_linear.py.
_NATIVE_ROWS = 32
_ALL_ROWS = sys.maxsize
# The same by what the processor has; first where PyTorch has no instructions for bfloat16.
_NATIVE_ROWS_ALONE = {
    ("AVX2", torch.bfloat16): _ALL_ROWS,
    ("AVX2", torch.float16): _ALL_ROWS,
    ("AVX2", torch.float32): 512,
}
# And where PyTorch multiplies bfloat16 too, by the instructions that the kernel has.
_NATIVE_ROWS_BESIDE = {
    ("AVX512", torch.bfloat16): 1,
    ("AVX512_BF16", torch.bfloat16): 64,
    ("AVX512_BF16", torch.float32): 8,
    ("AMX", torch.bfloat16): 128,
    ("AMX", torch.float32): 8,
}
# Without the kernel, fewer rows than these cost less as they are: widening writes the weight anew.
_FEW_ROWS = 8
_TILE_ELEMENTS = 1 << 20  # of the weight, widened at a time: 4 MiB stay in a CPU's caches
_TILE_ROWS = 512  # of the input, multiplied with a tile at a time


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [*, in] times weight [out, in] transposed, plus bias [out]: [*, out] in the type of x.

    Sums are taken in float32 or wider and rounded once.
    """
    if x.device.type != "cpu":
        return F.linear(x, weight, bias)
    in_features = x.shape[-1]
    rows = x.numel() // in_features
    kernels = kernels_for(x, weight)
    if kernels is not None and not kernels.is_recording():
        most = _most_native_rows(kernels.cpu_isa().name, x.dtype)
        kernels = kernels if rows <= most else None
    if kernels is not None:
        flat = x.reshape(rows, in_features)
        threads = torch.get_num_threads()
        out: torch.Tensor = kernels.linear(flat, weight, bias, num_threads=threads)
        return out.view(*x.shape[:-1], len(weight))
    if rows >= _FEW_ROWS and not cpu_multiplies(x.dtype):
        return widened_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def _most_native_rows(isa: str, dtype: torch.dtype) -> int:
    if not cpu_multiplies(torch.bfloat16):
        return _NATIVE_ROWS_ALONE.get((isa, dtype), _NATIVE_ROWS)
    return _NATIVE_ROWS_BESIDE.get((isa, dtype), 0)


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

    def fill(tile: torch.Tensor, first: int) -> None:
        tile.copy_(weight[first : first + len(tile)])

    out = tiled_linear(x.reshape(-1, weight.shape[1]), weight.shape, fill, bias, torch.float32)
    return out.view(*x.shape[:-1], len(weight))


def tiled_linear(
    x: torch.Tensor,
    shape: Sequence[int],
    fill: Callable[[torch.Tensor, int], None],
    bias: torch.Tensor | None,
    tile_dtype: torch.dtype,
) -> torch.Tensor:
    """x [R, in] times a weight of `shape` [out, in] that exists a tile at a time: [R, out].

    `fill(tile, first)` writes the outputs from `first` on into `tile` [outputs, in], whose type is
    `tile_dtype`; products are taken in that type, the result comes in the type of x.
    """
    out_features, in_features = shape
    rows = x.to(tile_dtype)
    result = x.new_empty(len(rows), out_features)
    width = min(out_features, max(1, _TILE_ELEMENTS // in_features))
    tile_room = rows.new_empty(width, in_features)
    part_room = rows.new_empty(min(len(rows), _TILE_ROWS) * width)
    for first in range(0, out_features, width):
        last = min(first + width, out_features)
        tile = tile_room[: last - first]
        fill(tile, first)
        for begin in range(0, len(rows), _TILE_ROWS):
            some = rows[begin : begin + _TILE_ROWS]
            part = part_room[: len(some) * len(tile)].view(len(some), len(tile))
            torch.mm(some, tile.t(), out=part)
            if bias is not None:
                part += bias[first:last]
            result[begin : begin + len(some), first:last] = part
    return result

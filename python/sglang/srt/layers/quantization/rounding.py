"""Weights of any checkpoint rounded at load: to signed bytes (int8.py), or to FP8 here.

FP8 is E4M3 with a scale for each output: the largest number of an output becomes the largest code.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch

from sglang.srt.layers.quantization.int8 import quantize_int8
from sglang.srt.layers.quantization.matrix import QuantizedWeight

Rounding = Callable[[torch.Tensor], QuantizedWeight]
"""A weight [N, K], K a multiple of 32, to codes that lie where it does."""

_MOST = 448.0  # the largest E4M3
_WEIGHTS_AT_ONCE = 1 << 22  # that are float32 at any time


def rounding_to(name: str, kernels: ModuleType) -> Rounding:
    """`name` is "int8" or "fp8", `kernels` what `codes_kernels` gives."""

    def to_bytes(weight: torch.Tensor) -> QuantizedWeight:
        codes, scales, gain = quantize_int8(weight)
        made: QuantizedWeight = kernels.QuantizedWeight(codes, scales, gain=gain)
        return made

    def to_fp8(weight: torch.Tensor) -> QuantizedWeight:
        made: QuantizedWeight = kernels.QuantizedWeight(*quantize_fp8(weight))
        return made

    return {"int8": to_bytes, "fp8": to_fp8}[name]


def quantize_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round weight [N, K] to float8_e4m3fn codes [N, K] with float32 scales [N, 1].

    Codes are the nearest to a weight over its scale, ties to even, and lie where the weight does.
    """
    rows, width = weight.shape
    codes = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=weight.device)
    scales = torch.ones(rows, 1, device=weight.device)
    step = max(1, _WEIGHTS_AT_ONCE // width)
    for first in range(0, rows, step):
        some = weight[first : first + step].float()
        largest = some.abs().amax(1, keepdim=True)
        scale = torch.where(largest == 0, 1.0, largest / _MOST)
        codes[first : first + step] = (some / scale).to(codes.dtype)
        scales[first : first + step] = scale
    return codes, scales

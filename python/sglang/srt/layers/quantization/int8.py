"""Weights of any checkpoint as signed bytes with a 16-bit scale for each 32 inputs."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

_GROUP = 32
_ROWS_AT_ONCE = 1 << 22  # weights that are float32 at any time


class Int8Codes(NamedTuple):
    """weight = code * scale * gain: codes int8 [N, K], scales float16 [N, K / 32]."""

    codes: torch.Tensor
    scales: torch.Tensor
    gain: float


def quantize_int8(weight: torch.Tensor) -> Int8Codes:
    """Round weight [N, K] to the nearest of 255 steps of each group's largest magnitude.

    K must be a multiple of 32. Codes lie where the weight does. Scales are rounded to 16 bits
    before codes are chosen; `gain`, a power of two, keeps them in the middle of their range.
    """
    rows, width = weight.shape
    codes = torch.empty(rows, width, dtype=torch.int8, device=weight.device)
    scales = torch.empty(rows, width // _GROUP, dtype=torch.float16, device=weight.device)
    largest = float(weight.abs().max()) / 127 if weight.numel() else 0.0
    gain = 2.0 ** math.ceil(math.log2(largest)) if 0.0 < largest < math.inf else 1.0
    step = max(1, _ROWS_AT_ONCE // width)
    for first in range(0, rows, step):
        some = weight[first : first + step].float().div_(gain).view(-1, width // _GROUP, _GROUP)
        scale = (some.abs().amax(-1) / 127).half()
        scales[first : first + step] = scale
        inverse = torch.where(scale > 0, scale.float().reciprocal(), 0.0)
        rounded = (some * inverse.unsqueeze(-1)).round_().clamp_(-127, 127)
        codes[first : first + step] = rounded.view(-1, width).to(torch.int8)
    return Int8Codes(codes, scales, gain)

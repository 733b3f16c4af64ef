"""Quantised weights of any layout, drawn, and what they mean in float64."""

from __future__ import annotations

from typing import Protocol

import torch

E4M3 = 0  # as a layout's bits
# Bits, inputs of a group (0: all), whether there are minima, and the values that codes name.
Layout = tuple[int, int, bool, tuple[int, ...] | None]
Codes = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor | None, float, tuple[int, ...] | None, int | None
]


class Weight(Protocol):
    """What both classes of quantised weights have."""

    codes: torch.Tensor
    scales: torch.Tensor
    mins: torch.Tensor | None
    values: tuple[int, ...] | None
    gain: float
    bits: int
    group: int
    shape: tuple[int, int]


def drawn_codes(layout: Layout, outs: int, width: int, gain: float) -> Codes:
    """What a weight [outs, width] is made of."""
    bits, group, with_mins, values = layout
    generator = torch.Generator().manual_seed(outs * width)
    group = group or width
    groups = (outs, -(-width // group))
    if bits == E4M3:
        # every code but the two of NaN, and those of the smallest numbers more often
        some = torch.randint(0, 127, (outs, width), generator=generator)
        some[:, ::5] %= 9
        some += torch.randint(0, 2, (outs, width), generator=generator) * 128
        scales = torch.rand(groups, generator=generator) + 0.1
        return some.to(torch.uint8).view(torch.float8_e4m3fn), scales, None, gain, None, group
    if bits == 4:
        codes = torch.randint(0, 256, (outs, width // 2), generator=generator).to(torch.uint8)
    else:
        codes = torch.randint(-128, 128, (outs, width), generator=generator).to(torch.int8)
    scales = torch.rand(groups, generator=generator).half() + 0.1
    mins = torch.randn(groups, generator=generator).half() if with_mins else None
    return codes, scales, mins, gain, values, None


def numbers(weight: Weight) -> torch.Tensor:
    """float64 [N, K], written down from what the classes say."""
    codes = weight.codes.double()
    if weight.bits == 4:
        blocks = weight.codes.view(len(codes), -1, 16)
        codes = torch.cat((blocks & 15, blocks >> 4), -1).flatten(1).double()
    if weight.values is not None:
        codes = torch.tensor(weight.values).double()[codes.long()]
    wide = codes * weight.scales.double().repeat_interleave(weight.group, 1)[:, : weight.shape[1]]
    if weight.mins is not None:
        wide += weight.mins.double().repeat_interleave(weight.group, 1)
    return wide * weight.gain

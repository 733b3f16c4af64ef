"""FP8 weights: numbers of eight bits (E4M3), and a scale for each block of them.

A scale for the whole matrix, for each output, for each group of an output's inputs: all are blocks.
The native kernels read codes as they are, and scales of each output for groups of its inputs, so
matrices that are merged, cut over ranks or stacked need no whole blocks of outputs.
Source: arXiv 2209.05433 (the numbers); the documentation of transformers and compressed-tensors
(which scales there are); the published DeepSeek-V3 (blocks of 128 by 128).

Legend: N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang.srt.layers.quantization.coded_matrix import CodedMatrix, StackedMatrix, by_group
from sglang.srt.layers.quantization.gguf_blocks import BlockCodes
from sglang.srt.layers.quantization.matrix import QUANTIZED_BLOCK

_E4M3 = torch.arange(256, dtype=torch.uint8, device="cpu").view(torch.float8_e4m3fn).float()


class ScaledFloats(CodedMatrix):
    """`codes` float8 [N, K] at any strides; weight = code * scale.

    `scales` has a number for each block of `block` (outputs, inputs), [ceil(N / outputs),
    ceil(K / inputs)].
    """

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> None:
        self.shape = (codes.shape[0], codes.shape[1])
        self.codes = codes
        self._scales, self._block = scales.float(), block

    def numbers(self, first: int, last: int) -> torch.Tensor:
        scales = self.scales_of(first, last)
        # Looked up: that is several times faster than PyTorch's conversion.
        codes = self.codes[first:last].view(torch.uint8).flatten().int()
        numbers = _E4M3.index_select(0, codes).view(last - first, self.shape[1])
        view, factors = by_group(numbers, scales, self._block[1])
        view.mul_(factors)
        return numbers

    def block_codes(self) -> BlockCodes | None:
        """See `CodedMatrix`: None where scales or the width cut blocks of 32 inputs."""
        return _block_codes([self])

    @property
    def group(self) -> int | None:
        """Inputs of a scale as the kernels have it; None where it is none that they serve."""
        width = self.shape[1]
        group = min(self._block[1], width)
        return None if width % QUANTIZED_BLOCK or group % QUANTIZED_BLOCK else group

    def scales_of(self, first: int, last: int) -> torch.Tensor:
        """Those of the outputs [first, last), float32 [last - first, ceil(K / inputs)]."""
        return self._scales[torch.arange(first, last, device="cpu") // self._block[0]]


class StackedFloats(StackedMatrix):
    """Several of one width and `group`, one below another, whose codes can be kept."""

    def __init__(self, parts: Sequence[ScaledFloats]) -> None:
        super().__init__(parts)
        self._floats = tuple(parts)

    def block_codes(self) -> BlockCodes | None:
        """See `ScaledFloats.block_codes`."""
        return _block_codes(self._floats)


def stack_floats(parts: Sequence[CodedMatrix]) -> CodedMatrix | None:
    """Matrices of one shape, one below another; None unless all are FP8 with scales alike."""
    floats = [part for part in parts if isinstance(part, ScaledFloats)]
    alike = len(floats) == len(parts) and len({part.group for part in floats}) == 1
    return StackedFloats(floats) if alike else None


def _block_codes(parts: Sequence[ScaledFloats]) -> BlockCodes | None:
    """Copies of all codes and scales, so that what they were read from can go."""
    group, width = parts[0].group, parts[0].shape[1]
    if group is None:
        return None
    rows = sum(part.shape[0] for part in parts)
    codes = torch.empty(rows, width, dtype=torch.uint8)
    scales = torch.empty(rows, -(-width // group))
    first = 0
    for part in parts:
        last = first + part.shape[0]
        codes[first:last] = part.codes.view(torch.uint8)
        scales[first:last] = part.scales_of(0, part.shape[0])
        first = last
    return BlockCodes(codes.numpy(), scales.numpy(), None, 1.0, group=group)

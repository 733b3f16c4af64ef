"""MXFP4 as the gpt-oss checkpoints have it: numbers of four bits, a power of two for each 32.

Of a block's 16 bytes the i-th holds element 2i in its low half and 2i + 1 in its high half. A
number is 1 sign bit, 2 bits of exponent and 1 of mantissa (E2M1), a scale 8 of exponent (E8M0).
Source: the OCP Microscaling Formats specification 1.0; the published model card of gpt-oss.

Legend: N outputs, K inputs.
"""

from __future__ import annotations

import torch

from sglang.srt.layers.quantization.coded_matrix import CodedMatrix
from sglang.srt.layers.quantization.gguf_blocks import BlockCodes, take_apart

BLOCK = 32
_SIZES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device="cpu")
_E2M1 = torch.cat((_SIZES, -_SIZES))
_BIAS = 127


class Mxfp4Matrix(CodedMatrix):
    """`blocks` uint8 [N, K / 32, 16] and `scales` uint8 [N, K / 32], at any strides."""

    def __init__(self, blocks: torch.Tensor, scales: torch.Tensor) -> None:
        self.shape = (blocks.shape[0], blocks.shape[1] * BLOCK)
        self._blocks, self._scales = blocks, scales

    def numbers(self, first: int, last: int) -> torch.Tensor:
        codes = self._elements(first, last)
        values = _E2M1.index_select(0, codes.flatten().int()).view(codes.shape)
        scales = self._scales[first:last]
        powers = torch.ldexp(torch.ones(scales.shape), scales.int() - _BIAS)
        return values.mul_(powers.unsqueeze(-1)).view(last - first, self.shape[1])

    def block_codes(self) -> BlockCodes:
        """By way of GGUF's blocks, which have the same numbers in another order."""
        first, second = self._elements(0, self.shape[0]).chunk(2, -1)
        blocks = torch.cat((self._scales.unsqueeze(-1), first | second << 4), -1)
        return take_apart("MXFP4", blocks.view(self.shape[0], -1).numpy())

    def _elements(self, first: int, last: int) -> torch.Tensor:
        """Codes uint8 [last - first, K / 32, 32] in their order."""
        blocks = self._blocks[first:last]
        return torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2)

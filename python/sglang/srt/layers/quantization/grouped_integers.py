"""Integers of four or eight bits with a scale and a zero for each group of inputs.

GPTQ, AWQ and compressed-tensors pack them in different orders; what they mean is the same:
weight = (code - zero) * scale. Sources: arXiv 2210.17323 and 2306.00978; the orders are those of
the published checkpoints and of the documentation of AutoGPTQ, AutoAWQ and compressed-tensors.

Legend: N outputs, K inputs, G groups of inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from sglang.srt.layers.quantization.coded_matrix import (
    NUMBERS_AT_ONCE,
    CodedMatrix,
    StackedMatrix,
    by_group,
    rows_of_parts,
)
from sglang.srt.layers.quantization.gguf_blocks import BlockCodes
from sglang.srt.layers.quantization.matrix import QUANTIZED_BLOCK

# Scales in this range, and zeros times them, are rounded to 16 bits by at most 2^-11 of themselves.
_SMALLEST, _LARGEST = 2.0**-14, 2.0**7
# Of the eight numbers in 32 bits, the place where AWQ has the i-th.
_AWQ_PLACES = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7], device="cpu")


class GroupedIntegers(CodedMatrix):
    """`codes(first, last)` gives those of the outputs [first, last), uint8 [last - first, K].

    A code has `bits` bits, 4 or 8. `scales` floats [N, G]; `zeros` int16 [N, G], None where all are
    the middle of the codes. Input k is in group k // `group`, or in group `order[k]`, int64 [K].
    """

    def __init__(
        self,
        shape: tuple[int, int],
        bits: int,
        codes: Callable[[int, int], torch.Tensor],
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        group: int,
        order: torch.Tensor | None = None,
    ) -> None:
        self.shape, self.bits, self.codes = shape, bits, codes
        self.scales, self.zeros, self.group, self.order = scales, zeros, group, order

    @property
    def _middle(self) -> int:
        return 1 << self.bits - 1

    def numbers(self, first: int, last: int) -> torch.Tensor:
        numbers = self.codes(first, last).float()
        scales = self.scales[first:last].float()
        zeros = torch.full_like(scales, self._middle)
        if self.zeros is not None:
            zeros.copy_(self.zeros[first:last])
        if self.order is not None:
            return numbers.sub_(zeros[:, self.order]).mul_(scales[:, self.order])
        for values, change in ((zeros, torch.Tensor.sub_), (scales, torch.Tensor.mul_)):
            change(*by_group(numbers, values, self.group))
        return numbers

    def block_codes(self) -> BlockCodes | None:
        """See `CodedMatrix`: None for permuted groups, and for those that cut blocks of 32.

        Codes are kept as they are. Scales, and zeros times scales, are rounded to 16 bits where
        they are none; a power of two for all keeps them in their range.
        """
        rows, width = self.shape
        cuts = self.scales.shape[1] > 1 and self.group % QUANTIZED_BLOCK
        if self.order is not None or cuts or width % QUANTIZED_BLOCK or not rows:
            return None
        gain = _gain(self.scales)
        scales = (self.scales.float() / gain).half()
        mins = self._mins(scales.float())
        packed = torch.empty(
            rows,
            width * self.bits // 8,
            dtype=torch.uint8 if self.bits == 4 else torch.int8,
        )
        step = max(1, NUMBERS_AT_ONCE // width)
        for first in range(0, rows, step):
            last = min(rows, first + step)
            packed[first:last] = self._packed(self.codes(first, last))
        return BlockCodes(
            packed.numpy(),
            self._by_block(scales).numpy(),
            None if mins is None else self._by_block(mins).numpy(),
            gain,
        )

    def _mins(self, scales: torch.Tensor) -> torch.Tensor | None:
        """What the kernels add to a code times its scale: float16 [N, G], None where it is 0.

        Their codes of four bits begin at 0, those of eight at -128.
        """
        if self.bits == 4:
            zeros = self._middle if self.zeros is None else self.zeros.float()
            return (-zeros * scales).half()
        if self.zeros is None or bool((self.zeros == self._middle).all()):
            return None
        return ((self._middle - self.zeros.float()) * scales).half()

    def _packed(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes uint8 [n, K] as the kernels read them."""
        if self.bits == 8:
            return (codes ^ self._middle).view(torch.int8)
        low, high = codes.view(len(codes), -1, 2, QUANTIZED_BLOCK // 2).unbind(2)
        return (low | high << 4).flatten(1)

    def _by_block(self, values: torch.Tensor) -> torch.Tensor:
        """[N, G] repeated for each block of 32 inputs."""
        blocks = self.shape[1] // QUANTIZED_BLOCK
        if values.shape[1] == 1:
            return values.expand(-1, blocks).contiguous()
        return values.repeat_interleave(self.group // QUANTIZED_BLOCK, 1)[:, :blocks].contiguous()


def stack_matrices(parts: Sequence[CodedMatrix]) -> CodedMatrix:
    """Matrices of one shape, one below another; their codes can be kept when they are alike."""
    alike = [part for part in parts if isinstance(part, GroupedIntegers) and part.order is None]
    kinds = {(part.bits, part.group, part.scales.dtype, part.zeros is None) for part in alike}
    if len(alike) < len(parts) or len(kinds) > 1:
        return StackedMatrix(parts)
    rows = sum(part.shape[0] for part in alike)

    def codes(first: int, last: int) -> torch.Tensor:
        pieces = rows_of_parts(alike, first, last)
        return torch.cat([part.codes(*some) for part, some in pieces])

    zeros = [part.zeros for part in alike if part.zeros is not None]
    return GroupedIntegers(
        (rows, alike[0].shape[1]),
        alike[0].bits,
        codes,
        torch.cat([part.scales for part in alike]),
        torch.cat(zeros) if zeros else None,
        alike[0].group,
    )


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Numbers of `bits` bits out of int32 [*, W], the lowest first: uint8 [*, 32 W / bits]."""
    found = words.contiguous().view(torch.uint8)
    if bits == 8:
        return found
    return torch.stack((found & 15, found >> 4), -1).flatten(-2)


def unpack_awq(words: torch.Tensor) -> torch.Tensor:
    """As `unpack` of four bits, in AWQ's order."""
    found = unpack(words, 4)
    return found.view(*words.shape, 8)[..., _AWQ_PLACES].view(found.shape)


def _gain(scales: torch.Tensor) -> float:
    """1 where scales lose little or nothing in 16 bits, else what makes the largest about 1."""
    sizes = scales.float().abs()
    largest = float(sizes.max())
    smallest = float(sizes[sizes > 0].min()) if largest > 0.0 else _SMALLEST
    exact = scales.dtype is torch.float16
    if not math.isfinite(largest) or (largest <= _LARGEST and (exact or smallest >= _SMALLEST)):
        return 1.0
    return 2.0 ** math.ceil(math.log2(largest))

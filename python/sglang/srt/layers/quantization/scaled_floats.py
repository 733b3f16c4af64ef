"""FP8 weights: numbers of eight bits (E4M3), and a scale for each block of them.

A scale for the whole matrix, for each output, for each group of an output's inputs: all are blocks.
Source: arXiv 2209.05433 (the numbers); the documentation of transformers and compressed-tensors
(which scales there are); the published DeepSeek-V3 (blocks of 128 by 128).

Legend: N outputs, K inputs.
"""

from __future__ import annotations

import torch

from sglang.srt.layers.quantization.coded_matrix import CodedMatrix, by_group

_E4M3 = torch.arange(256, dtype=torch.uint8, device="cpu").view(torch.float8_e4m3fn).float()


class ScaledFloats(CodedMatrix):
    """`codes` float8 [N, K] at any strides; weight = code * scale.

    `scales` has a number for each block of `block` (outputs, inputs), [ceil(N / outputs),
    ceil(K / inputs)].
    """

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> None:
        self.shape = (codes.shape[0], codes.shape[1])
        self._codes, self._scales, self._block = codes, scales.float(), block

    def numbers(self, first: int, last: int) -> torch.Tensor:
        outputs, inputs = self._block
        scales = self._scales[torch.arange(first, last, device="cpu") // outputs]
        # Looked up: that is several times faster than PyTorch's conversion.
        codes = self._codes[first:last].view(torch.uint8).flatten().int()
        numbers = _E4M3.index_select(0, codes).view(last - first, self.shape[1])
        view, factors = by_group(numbers, scales, inputs)
        view.mul_(factors)
        return numbers

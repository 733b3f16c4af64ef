"""`CodedMatrix`: a matrix as a checkpoint codes it, whatever the format.

The loader asks it for numbers, a few rows at a time, or for the codes that the native kernels read.
A format is one subclass in a file of its own; tensors are windows on the checkpoint's files, so
nothing is held twice. Pure.

Legend: N outputs, K inputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeVar

import torch

from sglang.srt.layers.quantization.gguf_blocks import BlockCodes

NUMBERS_AT_ONCE = 1 << 22  # what is float32 at any time: about 16 MiB

_Part = TypeVar("_Part", bound="CodedMatrix")


class CodedMatrix(ABC):
    """A weight of `shape` (N, K)."""

    shape: tuple[int, int]

    @abstractmethod
    def numbers(self, first: int, last: int) -> torch.Tensor:
        """The outputs [first, last): float32 [last - first, K]."""

    def block_codes(self) -> BlockCodes | None:
        """All of it as the kernels read it; None where they can't hold it."""
        return None


class PlainMatrix(CodedMatrix):
    """Numbers [N, K] that stand among codes."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.shape = (weight.shape[0], weight.shape[1])
        self._weight = weight

    def numbers(self, first: int, last: int) -> torch.Tensor:
        return self._weight[first:last].float()


class StackedMatrix(CodedMatrix):
    """Matrices of one width, one below another, as numbers."""

    def __init__(self, parts: Sequence[CodedMatrix]) -> None:
        self._parts = tuple(parts)
        self.shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])

    def numbers(self, first: int, last: int) -> torch.Tensor:
        found = [part.numbers(*rows) for part, rows in rows_of_parts(self._parts, first, last)]
        return found[0] if len(found) == 1 else torch.cat(found)


def rows_of_parts(
    parts: Sequence[_Part], first: int, last: int
) -> list[tuple[_Part, tuple[int, int]]]:
    """(part, its rows) of the pieces that make up the outputs [first, last) of a stack."""
    found = []
    start = 0
    for part in parts:
        end = start + part.shape[0]
        if start < last and end > first:
            found.append((part, (max(first, start) - start, min(last, end) - start)))
        start = end
    return found


def by_group(
    numbers: torch.Tensor, values: torch.Tensor, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers [n, K], or a view of them, and values [n, G] that broadcast to it.

    A value is for `group` numbers, the last for what is left.
    """
    width = numbers.shape[1]
    if values.shape[1] == 1:
        return numbers, values
    if width % group:
        return numbers, values.repeat_interleave(group, 1)[:, :width]
    return numbers.view(len(numbers), -1, group), values.unsqueeze(-1)


def as_numbers(matrix: CodedMatrix, dtype: torch.dtype) -> torch.Tensor:
    """The whole matrix [N, K] in `dtype`, which never exists in float32 when large."""
    out = torch.empty(matrix.shape, dtype=dtype)
    step = max(1, NUMBERS_AT_ONCE // max(1, matrix.shape[1]))
    for first in range(0, len(out), step):
        last = min(len(out), first + step)
        out[first:last] = matrix.numbers(first, last)
    return out

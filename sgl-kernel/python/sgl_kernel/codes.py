"""The layout of weights that stay quantised: what a class that multiplies with them shares.

Pure arithmetic on tensors wherever these lie; needs no native library.

Legend: N outputs, K inputs, G inputs of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch

from sgl_kernel.library import KernelError

BLOCK = 32  # inputs whose codes belong together, whatever the group
_VALUES = 16  # that codes of four bits can have
_MOST = 127  # of a value's size


class CodedWeight:
    """A weight [N, K]: (value * scale + min) * gain, with a scale and a min for each G inputs.

    `codes` are uint8 [N, K / 2], of each 32 inputs 16 bytes with input i in the low half and i + 16
    in the high half of byte i; or int8 [N, K]. A code of four bits stands for `values[code]`, 16
    numbers of -127 to 127, or for itself (None). `scales` are float16 [N, K / G]; `mins` alike,
    None where all are 0. G is 32, or 16 of int8 codes. Holds the tensors, whose rows must be
    contiguous. Raises KernelError for what is not served.
    """

    def __init__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        mins: torch.Tensor | None = None,
        gain: float = 1.0,
        values: Sequence[int] | None = None,
    ) -> None:
        self.codes, self.scales, self.mins, self.gain = codes, scales, mins, gain
        self.values = None if values is None else tuple(values)
        self.bits = {torch.uint8: 4, torch.int8: 8}.get(codes.dtype, 0)
        if not self.bits or codes.dim() != 2 or scales.dim() != 2 or not scales.shape[1]:
            raise KernelError(f"codes of {codes.dtype} {list(codes.shape)} are not served")
        self.shape = (len(codes), codes.shape[1] * 8 // self.bits)
        self.group = self.shape[1] // scales.shape[1]
        if self.shape[1] % BLOCK or self.group not in ((32,) if self.bits == 4 else (16, 32)):
            raise KernelError(f"{self.shape[1]} inputs in groups of {self.group} are not served")
        if self.values is not None:
            fits = len(self.values) == _VALUES and max(map(abs, self.values)) <= _MOST
            if self.bits != 4 or not fits:
                what = f"codes of {self.bits} bits with values {self.values}"
                raise KernelError(f"{what} are not served")
        for part in (scales,) if mins is None else (scales, mins):
            if part.dtype != torch.float16 or part.shape != (len(codes), scales.shape[1]):
                raise KernelError(f"scales must be float16 {[len(codes), scales.shape[1]]}")
            if part.stride() != (scales.stride(0), 1):
                raise KernelError("rows of scales must be contiguous, and lie as those of mins")
        if codes.stride(1) != 1:
            raise KernelError("rows of codes must be contiguous")

    @property
    def nbytes(self) -> int:
        """Memory of codes, scales and mins, in bytes."""
        mins = 0 if self.mins is None else self.mins.nbytes
        return self.codes.nbytes + self.scales.nbytes + mins

    @property
    def layout(self) -> tuple[object, ...]:
        """What two weights must share to be joined."""
        return self.bits, self.group, self.mins is None, self.gain, self.values, self.shape[1]

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Weights of one layout, one below another, copied. Raises KernelError for others."""
        first = parts[0]
        if any(part.layout != first.layout for part in parts):
            raise KernelError("weights of different layouts can't be joined")
        mins = [part.mins for part in parts if part.mins is not None]
        return first._like(
            torch.cat([part.codes for part in parts]),
            torch.cat([part.scales for part in parts]),
            torch.cat(mins) if mins else None,
        )

    def columns(self, first: int, last: int) -> Self:
        """The inputs [first, last), copied. Raises KernelError where they cut a block of 32."""
        if first % BLOCK or last % BLOCK:
            raise KernelError(f"inputs [{first}, {last}) cut a block")
        codes = slice(first * self.bits // 8, last * self.bits // 8)
        groups = slice(first // self.group, last // self.group)
        return self._like(
            self.codes[:, codes].contiguous(),
            self.scales[:, groups].contiguous(),
            None if self.mins is None else self.mins[:, groups].contiguous(),
        )

    def rows(self, first: int, last: int) -> Self:
        """The outputs [first, last), without a copy."""
        part = slice(first, last)
        mins = None if self.mins is None else self.mins[part]
        return self._like(self.codes[part], self.scales[part], mins)

    def take(self, rows: torch.Tensor) -> Self:
        """The outputs of int64 `rows` [*], copied in their order."""
        mins = None if self.mins is None else self.mins[rows]
        return self._like(self.codes[rows], self.scales[rows], mins)

    def _like(self, codes: torch.Tensor, scales: torch.Tensor, mins: torch.Tensor | None) -> Self:
        """Others with this gain and these values."""
        return type(self)(codes, scales, mins, self.gain, self.values)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.shape}, bits={self.bits}, group={self.group})"

"""The layout of weights that stay quantised: what a class that multiplies with them shares.

Pure arithmetic on tensors wherever these lie; needs no native library.

Legend: N outputs, K inputs, G inputs of a group.
"""

from __future__ import annotations

import math
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
    None where all are 0. G is 32, or 16 of int8 codes.

    Or `codes` are float8_e4m3fn [N, K], `scales` float32 [N, ceil(K / G)], without `mins`; G is
    `group`, any multiple of 32, K where there is one scale for each output.

    Holds the tensors, whose rows must be contiguous. Raises KernelError for what is not served.
    """

    def __init__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        mins: torch.Tensor | None = None,
        gain: float = 1.0,
        values: Sequence[int] | None = None,
        group: int | None = None,
    ) -> None:
        self.codes, self.scales, self.mins, self.gain = codes, scales, mins, gain
        self.values = None if values is None else tuple(values)
        self.is_fp8 = codes.dtype == torch.float8_e4m3fn
        self.bits = {torch.uint8: 4, torch.int8: 8, torch.float8_e4m3fn: 8}.get(codes.dtype, 0)
        if not self.bits or codes.dim() != 2 or scales.dim() != 2 or not scales.shape[1]:
            raise KernelError(f"codes of {codes.dtype} {list(codes.shape)} are not served")
        self.shape = (len(codes), codes.shape[1] * 8 // self.bits)
        self.group = self._group(scales.shape[1], group)
        if self.values is not None:
            fits = len(self.values) == _VALUES and max(map(abs, self.values)) <= _MOST
            if self.bits != 4 or not fits:
                what = f"codes of {self.bits} bits with values {self.values}"
                raise KernelError(f"{what} are not served")
        for part in (scales,) if mins is None else (scales, mins):
            kind = torch.float32 if self.is_fp8 else torch.float16
            if part.dtype != kind or part.shape != (len(codes), scales.shape[1]):
                raise KernelError(f"scales must be {kind} {[len(codes), scales.shape[1]]}")
            if part.stride() != (scales.stride(0), 1):
                raise KernelError("rows of scales must be contiguous, and lie as those of mins")
        if codes.stride(1) != 1:
            raise KernelError("rows of codes must be contiguous")
        if self.is_fp8 and mins is not None:
            raise KernelError("E4M3 has no mins")

    def _group(self, count: int, group: int | None) -> int:
        """Inputs of a scale, when there are `count` of them for each output."""
        width = self.shape[1]
        if not self.is_fp8 or count == 1 or group is None:
            group = width // count
        served = (32,) if self.bits == 4 else (16, 32)
        fits = group in served
        if self.is_fp8:
            fits = group > 0 and group % BLOCK == 0 and -(-width // group) == count
        if width % BLOCK or not fits:
            raise KernelError(f"{width} inputs in groups of {group} are not served")
        return group

    @property
    def nbytes(self) -> int:
        """Memory of codes, scales and mins, in bytes."""
        mins = 0 if self.mins is None else self.mins.nbytes
        return self.codes.nbytes + self.scales.nbytes + mins

    @property
    def layout(self) -> tuple[object, ...]:
        """What two weights must share to be joined."""
        kind = self.codes.dtype, self.group, self.mins is None
        return *kind, self.gain, self.values, self.shape[1]

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
        """The inputs [first, last), copied. Raises KernelError where they cut a block of 32.

        Of E4M3 a group that is cut becomes several with the same scale.
        """
        if first % BLOCK or last % BLOCK:
            raise KernelError(f"inputs [{first}, {last}) cut a block")
        codes = self.codes[:, first * self.bits // 8 : last * self.bits // 8].contiguous()
        if self.is_fp8:
            group = self.group if self.scales.shape[1] == 1 else math.gcd(self.group, first)
            places = torch.arange(first, last, group, device=self.scales.device) // self.group
            return self._like(codes, self.scales[:, places], None, group)
        groups = slice(first // self.group, last // self.group)
        return self._like(
            codes,
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

    def _like(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        mins: torch.Tensor | None,
        group: int | None = None,
    ) -> Self:
        """Others with this gain, these values and this group (None: that of this one)."""
        group = self.group if group is None else group
        return type(self)(codes, scales, mins, self.gain, self.values, group)

    def __repr__(self) -> str:
        kind = "E4M3" if self.is_fp8 else f"bits={self.bits}"
        return f"{type(self).__name__}({self.shape}, {kind}, group={self.group})"

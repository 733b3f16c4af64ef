"""Products with weights that stay quantised: codes become numbers on the way, never in memory.

The input keeps its precision unless a call asks otherwise, and then the answer is that of the
dequantised weight up to the order of additions. Inputs rounded to bytes meet the codes as integers,
which takes about half as long.

Legend: R rows, N outputs, K inputs, G inputs of a group.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from sgl_kernel.codes import CodedWeight
from sgl_kernel.library import (
    DTYPES,
    Isa,
    KernelError,
    Op,
    QuantizedCall,
    allowed_isa,
    has_byte_dots,
    has_tiles,
)
from sgl_kernel.tape import empty, make

_SHORT = 16  # the largest value whose sums with a block of bytes AVX2 keeps in 16 bits


class QuantizedWeight(CodedWeight):
    """See `CodedWeight`; computes on the CPU."""

    on_device = False

    def __init__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        mins: torch.Tensor | None = None,
        gain: float = 1.0,
        values: Sequence[int] | None = None,
        group: int | None = None,
    ) -> None:
        super().__init__(codes, scales, mins, gain, values, group)
        # whether sums of a block times bytes fit 16 bits, so that AVX2 takes many rows of these
        self.has_short_sums = self.bits == 4 and all(abs(v) <= _SHORT for v in self.values or ())
        # as native calls hold them
        self.named_values = self.values is not None, (ctypes.c_int8 * 16)(*(self.values or ()))

    def multiply(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        num_threads: int = 1,
        isa: Isa | None = None,
        round_inputs: bool = False,
        round_weight: bool = False,
    ) -> torch.Tensor:
        """x [R, K] times the weight transposed, plus bias [N]: [R, N] in the type of x.

        Summed in float32 and rounded once. `isa` lowers the instructions used. `round_inputs`
        multiplies integers: each 32 inputs are rounded to multiples of their largest over 127
        first. `round_weight` multiplies by matrix tiles an x of bfloat16, to which the weight is
        rounded first, before the gain. Raises KernelError for shapes and types that are not served,
        for both roundings, and for one of them without `has_byte_dots` or `has_tiles`; for inputs
        that are to meet E4M3 as integers too.
        """
        rows, width = x.shape
        if x.dtype not in DTYPES or width != self.shape[1] or x.stride(1) != 1:
            raise KernelError(f"a weight of {self.shape} does not serve {x.dtype} {list(x.shape)}")
        if bias is not None and (
            bias.dtype != x.dtype or bias.shape != self.shape[:1] or not bias.is_contiguous()
        ):
            raise KernelError(f"bias must be contiguous {x.dtype} [{self.shape[0]}]")
        if round_inputs and (self.is_fp8 or not has_byte_dots(isa)):
            what = "with E4M3" if self.is_fp8 else "without dot products of bytes"
            raise KernelError(f"rounded inputs are not served {what}")
        if round_weight and (round_inputs or x.dtype != torch.bfloat16 or not has_tiles(isa)):
            raise KernelError(f"a rounded weight is not served for {x.dtype}, or without tiles")
        out = empty((rows, self.shape[0]), x.dtype)
        if rows and self.shape[0]:
            call = self._call(out, num_threads, isa)
            call.x, call.x_row, call.rows = x.data_ptr(), x.stride(0), rows
            call.round_inputs, call.round_weight = round_inputs, round_weight
            call.bias = None if bias is None else bias.data_ptr()
            make(Op.QUANTIZED_LINEAR, call, x, bias, *self._parts)
        return out

    def dequantize(
        self, dtype: torch.dtype, *, num_threads: int = 1, isa: Isa | None = None
    ) -> torch.Tensor:
        """The weight as numbers: [N, K] in `dtype`."""
        out = torch.empty(self.shape, dtype=dtype)
        self.dequantize_into(out, num_threads=num_threads, isa=isa)
        return out

    def dequantize_into(
        self, out: torch.Tensor, *, num_threads: int = 1, isa: Isa | None = None
    ) -> None:
        """Write the weight into out [N, K], whose rows are contiguous.

        Raises KernelError for another shape or a type that is not served.
        """
        if out.dtype not in DTYPES or tuple(out.shape) != self.shape or out.stride(1) != 1:
            raise KernelError(f"a weight of {self.shape} is no {out.dtype} {list(out.shape)}")
        if self.shape[0]:
            call = self._call(out, num_threads, isa)
            make(Op.DEQUANTIZE, call, out, *self._parts)

    def dequantize_rows(
        self, ids: torch.Tensor, dtype: torch.dtype, *, num_threads: int = 1, isa: Isa | None = None
    ) -> torch.Tensor:
        """The outputs of contiguous int64 `ids` [R], each in [0, N), as numbers: [R, K]."""
        if ids.dtype != torch.int64 or ids.dim() != 1 or not ids.is_contiguous():
            raise KernelError("ids must be contiguous int64")
        out = empty((len(ids), self.shape[1]), dtype)
        if dtype not in DTYPES:
            raise KernelError(f"a weight of {self.shape} is not served as {dtype}")
        if len(ids):
            call = self._call(out, num_threads, isa)
            call.ids, call.rows = ids.data_ptr(), len(ids)
            make(Op.DEQUANTIZE, call, ids, *self._parts)
        return out

    @property
    def _parts(self) -> tuple[torch.Tensor | None, ...]:
        return self.codes, self.scales, self.mins

    def _call(self, out: torch.Tensor, num_threads: int, isa: Isa | None) -> QuantizedCall:
        return QuantizedCall(
            None, None, out.data_ptr(), self.codes.data_ptr(), self.scales.data_ptr(),
            None if self.mins is None else self.mins.data_ptr(), None,
            0, out.stride(0), self.codes.stride(0), self.scales.stride(0),
            0, *self.shape, self.group, self.gain, self.bits, DTYPES[out.dtype],
            allowed_isa(isa), num_threads, False, False, *self.named_values, self.is_fp8,
        )  # fmt: skip

"""Weights that stay quantised on a GPU: products with their codes, and rows of them as numbers.

What each computes is what `sgl_kernel.QuantizedWeight` does on a CPU. Nothing waits for the device.
See docs/gpu.md, Note [Quantised weights]. Not yet run on a GPU.

Legend: R rows of x, N outputs, K inputs, G inputs of a group.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Self

import torch

from sgl_kernel.codes import BLOCK, CodedWeight
from sgl_kernel.library import KernelError
from sgl_kernel.triton.kernels.quantized import (
    BYTES,
    E2M1,
    FP8,
    NIBBLES,
    ROUNDED_FP8,
    TABLE,
    dequantize_kernel,
    quantized_linear_kernel,
    quantized_rows_kernel,
    sum_splits_kernel,
)
from sgl_kernel.triton.launch import (
    FP_FUSION,
    TRITON_TYPES,
    GroupedTile,
    check_device,
    is_interpreted,
    power_of_two,
)
from sgl_kernel.triton.rounded import RoundedRows, multiplies_fp8, round_rows

SERVED = (torch.float32, torch.bfloat16, torch.float16)
# Twice the numbers of E2M1, whose bits are those of a float16 that is 2^15 times smaller.
_E2M1_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_E2M1_FACTOR = 2.0**15
_E4M3_FACTOR = 2.0**8  # those of E4M3 likewise
_MOST_SPLITS = 16
_LEAST_STEPS = 4  # of a share of the inputs, in tiles
_PROGRAMS_OF_A_MULTIPROCESSOR = 3
_SUM_OUTPUTS = 1024
_ROW_BYTES = 256  # of the codes of an output, in a turn of a single row's product
_DEQUANTIZED_BYTES = 1024  # of codes, of a row at a time
# Inputs are rounded for tiles of so many rows: fewer wait for codes, not for arithmetic.
_ROUNDED_ROWS = 64
_ROUNDED_COLUMNS, _ROUNDED_DEPTH = 64, 128  # outputs and inputs of such a tile


class QuantizedWeight(CodedWeight):
    """See `CodedWeight`; computes where the tensors lie, which is a GPU or Triton's interpreter.

    The layout's own work (rows, columns, join) is done anywhere, so a loader may cut a weight on
    the host before it moves the tensors. `rounds_inputs`, False unless it is set: many rows are
    rounded to E4M3 for a weight of that, where tensor cores multiply it.
    """

    on_device = True
    rounds_inputs = False

    def multiply(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        tile: GroupedTile | None = None,
        splits: int | None = None,
        num_threads: int = 1,
        round_inputs: bool = False,
        round_weight: bool = True,
    ) -> torch.Tensor:
        """x [R, K] times the weight transposed, plus bias [N]: [R, N] in the type of x.

        Sums are float32 and rounded once. More than one row meet a weight that is rounded to their
        type. `tile` and `splits` of the inputs are chosen when None; one row is not tiled then. The
        rest is what a CPU's class is told, and changes nothing. Raises KernelError for shapes and
        types that are not served.
        """
        del num_threads, round_inputs, round_weight
        out = torch.empty((len(x), self.shape[0]), dtype=x.dtype, device=x.device)
        self.multiply_into(out, x, bias, tile=tile, splits=splits)
        return out

    def multiply_into(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        tile: GroupedTile | None = None,
        splits: int | None = None,
    ) -> None:
        """As `multiply`, into out [R, N] of the type of x, whose rows are contiguous."""
        check_device(x, self.codes)
        rows, width = x.shape
        if x.dtype not in SERVED or width != self.shape[1] or x.stride(1) != 1:
            raise KernelError(f"a weight of {self.shape} does not serve {x.dtype} {list(x.shape)}")
        if bias is not None and (bias.shape != self.shape[:1] or not bias.is_contiguous()):
            raise KernelError(f"bias must be contiguous [{self.shape[0]}]")
        if out.dtype != x.dtype or out.shape != (rows, self.shape[0]) or out.stride(1) != 1:
            raise KernelError(f"{out.dtype} {list(out.shape)} is no place for a product")
        if rows == 1 and tile is None and self.shape[0]:
            self.launch_rows(x, out, bias)
        elif rows and self.shape[0]:
            tile = self.tile_for(rows, x.dtype) if tile is None else tile
            if splits is None:
                splits = default_splits(rows, self.shape, tile, num_programs(x.device))
            self._launch(x, self.rounded(x, tile), bias, out, tile, splits)

    def tile_for(self, rows: int, dtype: torch.dtype) -> GroupedTile:
        """`default_tile`; where rows are rounded one for two sums, of a group and of all."""
        tile = default_tile(rows, self.bits, dtype)
        if self.rounds_inputs and self.is_fp8 and tile.rows >= _ROUNDED_ROWS:
            return GroupedTile(tile.rows, _ROUNDED_COLUMNS, _ROUNDED_DEPTH)
        return tile

    def rounded(self, x: torch.Tensor, tile: GroupedTile) -> RoundedRows | None:
        """x [R, K] as codes, None where products on tiles like `tile` take it as it is."""
        wants = self.rounds_inputs and self.is_fp8 and tile.rows >= _ROUNDED_ROWS
        return round_rows(x, self._launch_group) if wants and multiplies_fp8(x.device) else None

    def _launch(
        self,
        x: torch.Tensor,
        rounded: RoundedRows | None,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        tile: GroupedTile,
        splits: int,
    ) -> None:
        rows, outputs = out.shape
        target = out
        if splits > 1:
            size = (splits * rows, outputs)
            target = torch.empty(size, dtype=torch.float32, device=x.device)
        row_tiles = -(-rows // tile.rows)
        source, x_scales = (x, None) if rounded is None else rounded
        quantized_linear_kernel[(row_tiles * -(-outputs // tile.columns), splits)](
            *(source, x_scales, self.codes_for(rounded), self.scales, self.mins),
            *(bias if splits == 1 else None, target),
            0 if x_scales is None else x_scales.stride(0),
            *(rows, outputs, self.codes.shape[1], source.stride(0), target.stride(0)),
            *self.launch_numbers,
            **self.launch_sizes(tile, x.dtype, rounded is not None),
            TOGETHER=8,
            SPLITS=splits,
            HAS_BIAS=bias is not None and splits == 1,
        )
        if splits > 1:
            block = min(_SUM_OUTPUTS, power_of_two(outputs))
            sum_splits_kernel[(rows, -(-outputs // block))](
                *(target, bias, out, rows, outputs, out.stride(0)),
                SPLITS=splits,
                BLOCK=block,
                HAS_BIAS=bias is not None,
                **FP_FUSION,
            )

    def launch_rows(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        experts: torch.Tensor | None = None,
        stride: int = 0,
        chosen: int = 1,
        scale_inputs: torch.Tensor | None = None,
        scale_outputs: torch.Tensor | None = None,
    ) -> None:
        """Write products of single rows, read anew for each, into out [R, count].

        Row r is that of x[r // chosen] with the first outputs, and where `experts` int64 [R] are
        given with those from experts[r] * `stride` on; `bias` is [E, count] then, rows at any
        stride. Scales float32 [R] multiply inputs or outputs. Shapes are the caller's matter.
        """
        rows, count = out.shape
        outputs, row_bytes = 16, self.codes.shape[1]
        if rows * -(-count // outputs) < num_programs(x.device):
            outputs = 8
        codes_stride, scales_stride, *rest = self.launch_numbers
        quantized_rows_kernel[(-(-count // outputs), rows)](
            *(x, self.code_bytes, self.scales, self.mins, bias, out, experts),
            scale_outputs if scale_inputs is None else scale_inputs,
            *(count, row_bytes, x.stride(0), codes_stride, scales_stride),
            *(0 if bias is None else bias.stride(0), out.stride(0), *rest),
            EXPERT_ROWS=stride,
            CHOSEN=chosen,
            BLOCK_N=outputs,
            BLOCK_B=self._within_group(min(_ROW_BYTES, power_of_two(row_bytes))),
            GROUP=self._launch_group,
            STAGES=4,
            KIND=self._kind,
            HAS_MINS=self.mins is not None,
            HAS_BIAS=bias is not None,
            BY_EXPERT=experts is not None,
            SCALES_INPUTS=scale_inputs is not None,
            SCALES_OUTPUTS=scale_outputs is not None,
            **FP_FUSION,
        )

    def dequantize(self, dtype: torch.dtype, *, num_threads: int = 1) -> torch.Tensor:
        """The weight as numbers: [N, K] in `dtype`, where its codes lie."""
        out = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        self.dequantize_into(out, num_threads=num_threads)
        return out

    def dequantize_into(self, out: torch.Tensor, *, num_threads: int = 1) -> None:
        """Write the weight into out [N, K], whose rows are contiguous.

        Raises KernelError for another shape or a type that is not served.
        """
        del num_threads
        if out.dtype not in SERVED or tuple(out.shape) != self.shape or out.stride(1) != 1:
            raise KernelError(f"a weight of {self.shape} is no {out.dtype} {list(out.shape)}")
        self._write_rows(out, None)

    def dequantize_rows(
        self, ids: torch.Tensor, dtype: torch.dtype, *, num_threads: int = 1
    ) -> torch.Tensor:
        """The outputs of contiguous int64 `ids` [R], each in [0, N), as numbers: [R, K]."""
        del num_threads
        if ids.dtype != torch.int64 or ids.dim() != 1 or not ids.is_contiguous():
            raise KernelError("ids must be contiguous int64")
        if dtype not in SERVED:
            raise KernelError(f"a weight of {self.shape} is not served as {dtype}")
        out = torch.empty((len(ids), self.shape[1]), dtype=dtype, device=self.codes.device)
        self._write_rows(out, ids)
        return out

    def _write_rows(self, out: torch.Tensor, ids: torch.Tensor | None) -> None:
        check_device(out, self.codes)
        if not len(out):
            return
        row_bytes = self.codes.shape[1]
        block = min(_DEQUANTIZED_BYTES, power_of_two(row_bytes))
        codes_stride, scales_stride, *rest = self.launch_numbers
        dequantize_kernel[(len(out), -(-row_bytes // block))](
            *(self.code_bytes, self.scales, self.mins, ids, out),
            *(row_bytes, codes_stride, scales_stride, out.stride(0), *rest),
            BLOCK_B=block,
            GROUP=self._launch_group,
            KIND=self._kind,
            HAS_MINS=self.mins is not None,
            BY_ID=ids is not None,
            **FP_FUSION,
        )

    @property
    def _kind(self) -> int:
        """What codes stand for, as kernels/quantized.py numbers it."""
        if self.bits == 8:
            return int(FP8.value if self.is_fp8 else BYTES.value)
        if self.values is None:
            return int(NIBBLES.value)
        return int(E2M1.value if self.values == _E2M1_VALUES else TABLE.value)

    @property
    def code_bytes(self) -> torch.Tensor:
        """Codes as kernels load them: those of E4M3 as bytes, which every GPU has."""
        return self.codes.view(torch.uint8) if self.is_fp8 else self.codes

    def codes_for(self, rounded: RoundedRows | None) -> torch.Tensor:
        """Codes as a kernel of products loads them: for rows that are E4M3 as what they are."""
        return self.code_bytes if rounded is None else self.codes

    def _like(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        mins: torch.Tensor | None,
        group: int | None = None,
    ) -> Self:
        made = super()._like(codes, scales, mins, group)
        made.rounds_inputs = self.rounds_inputs
        return made

    @property
    def _launch_group(self) -> int:
        """Inputs of a group, 0 where E4M3 has one scale for all."""
        return 0 if self.is_fp8 and self.scales.shape[1] == 1 else self.group

    def _within_group(self, size: int) -> int:
        """At most `size` inputs, a power of two, that have one scale of E4M3."""
        return math.gcd(size, self._launch_group) if self.is_fp8 else size

    @property
    def launch_numbers(self) -> tuple[float, ...]:
        """Strides of codes and scales, gains of scales and minima, and the table in four words."""
        factors = {E2M1.value: _E2M1_FACTOR, FP8.value: _E4M3_FACTOR}
        factor = factors.get(self._kind, 1.0)
        values = (0,) * 16 if self.values is None else self.values
        table = [
            int.from_bytes(bytes(v & 255 for v in values[i : i + 4]), "little", signed=True)
            for i in range(0, 16, 4)
        ]
        strides = self.codes.stride(0), self.scales.stride(0)
        return *strides, float(self.gain) * factor, float(self.gain), *table

    def launch_sizes(
        self, tile: GroupedTile, dtype: torch.dtype, rounded: bool = False
    ) -> dict[str, object]:
        """What a kernel of products is compiled for, with inputs of `dtype`, or `rounded` ones.

        Raises KernelError for a tile that cuts blocks of 32 inputs.
        """
        if tile.depth % BLOCK:
            raise KernelError(f"tiles of {tile.depth} inputs cut a block")
        dot_type = torch.float8_e4m3fn if rounded else dtype
        return {
            "BLOCK_N": tile.columns,
            "BLOCK_M": tile.rows,
            "BLOCK_B": self._within_group(tile.depth * self.bits // 8),
            "GROUP": self._launch_group,
            "KIND": int(ROUNDED_FP8.value) if rounded else self._kind,
            "HAS_MINS": self.mins is not None,
            "X_TYPE": TRITON_TYPES[dtype],
            "DOT_TYPE": TRITON_TYPES[torch.float32 if is_interpreted() else dot_type],
            "PRECISION": "ieee" if dtype is torch.float32 else "tf32",
            "num_warps": 8 if tile.columns >= 128 else 4,
            "num_stages": 3,
            **FP_FUSION,
        }


@cache
def num_programs(device: torch.device) -> int:
    """Programs that `device` runs at a time; of a CPU, where kernels are interpreted, 1."""
    if device.type != "cuda":
        return 1
    found = torch.cuda.get_device_properties(device).multi_processor_count
    return int(found) * _PROGRAMS_OF_A_MULTIPROCESSOR


def default_tile(rows: int, bits: int, dtype: torch.dtype) -> GroupedTile:
    """A tile about as high as there are rows. Chosen by arithmetic, not by measurement.

    64 outputs are what four warps multiply at a time. Codes of 64 bytes are what four threads load;
    high tiles, which wait for arithmetic rather than for codes, take less to leave registers free.
    """
    height = min(128, max(16, power_of_two(rows)))
    depth = (256 // bits if height == 128 else 128) * 2 // dtype.itemsize
    return GroupedTile(height, 128 if height == 128 else 64, max(depth, BLOCK))


def default_splits(rows: int, shape: tuple[int, int], tile: GroupedTile, programs: int) -> int:
    """Shares of the inputs, a power of two: more than one where outputs alone fill no chip.

    Of one tile of rows, whatever their number, so that a row's sums are the same beside others.
    """
    if rows > tile.rows or tile.rows > 64:
        return 1
    tiles = -(-shape[0] // tile.columns)
    most = min(programs // tiles, shape[1] // tile.depth // _LEAST_STEPS, _MOST_SPLITS)
    return 1 << max(0, most.bit_length() - 1)

"""Experts whose weights stay quantised, on a GPU: products of pairs of token and expert.

Few pairs are multiplied one by one, many sorted into tiles of one expert each. Nothing waits for
the device. See docs/gpu.md, Note [Quantised weights]. Not yet run on a GPU.

Legend: E experts, T tokens, K inputs, P pairs of token and expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sgl_kernel.library import KernelError
from sgl_kernel.triton.kernels.quantized import grouped_quantized_kernel
from sgl_kernel.triton.launch import GroupedTile, Pairs, check_device
from sgl_kernel.triton.quantized import SERVED, QuantizedWeight


@dataclass(frozen=True, slots=True)
class ExpertCodes:
    """One quantised matrix of every expert: outputs [e * stride + first, ... + count) are e's."""

    weight: QuantizedWeight
    stride: int
    first: int
    count: int

    def joined(self, other: ExpertCodes) -> ExpertCodes | None:
        """This one's outputs and then `other`'s as one matrix; None where they lie elsewhere."""
        beside = self.weight is other.weight and self.first + self.count == other.first
        if not beside or self.stride != other.stride:
            return None
        return ExpertCodes(self.weight, self.stride, self.first, self.count + other.count)

    def check(
        self,
        x: torch.Tensor,
        num_experts: int,
        num_pairs: int,
        out: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> None:
        """Raises KernelError for what doesn't fit `num_experts` of it, or that many pairs."""
        weight = self.weight
        check_device(x, weight.codes)
        if x.shape[1] != weight.shape[1] or x.stride(1) != 1 or x.dtype not in SERVED:
            raise KernelError(f"x {x.dtype} {tuple(x.shape)} does not fit {weight}")
        if num_experts * self.stride > weight.shape[0] or self.first + self.count > self.stride:
            raise KernelError(f"{weight.shape[0]} outputs are not {num_experts} of {self}")
        if out.shape != (num_pairs, self.count) or out.stride(1) != 1:
            raise KernelError(f"{tuple(out.shape)} is no place for {num_pairs} x {self.count}")
        if bias is not None and (bias.shape != (num_experts, self.count) or bias.stride(1) != 1):
            raise KernelError(f"bias must be {[num_experts, self.count]}")


def grouped_quantized(
    x: torch.Tensor,
    matrix: ExpertCodes,
    pairs: Pairs,
    num_experts: int,
    out: torch.Tensor,
    *,
    tile: GroupedTile | None = None,
    bias: torch.Tensor | None = None,
    scale_inputs: torch.Tensor | None = None,
    scale_outputs: torch.Tensor | None = None,
) -> None:
    """Write x times the transposed matrix of each pair's expert into out [P, count].

    As `grouped_linear`: `x` [T, K] or [P, K], `bias` [E, count] and rows of `out` at any stride,
    scales float32 [T, chosen]. Raises KernelError for shapes that do not fit.
    """
    weight = matrix.weight
    num_pairs = pairs.num_pairs
    if len(x) not in (pairs.num_tokens, num_pairs):
        raise KernelError(f"{len(x)} rows for {pairs.num_tokens} x {pairs.num_chosen} pairs")
    matrix.check(x, num_experts, num_pairs, out, bias)
    if scale_inputs is not None and scale_outputs is not None:
        raise KernelError("weights of the pairs multiply inputs or outputs, not both")
    if tile is None:
        tile = weight.tile_for(pairs.block, x.dtype)
    if tile.rows != pairs.block:
        raise KernelError(f"tiles of {pairs.block} and {tile.rows} rows")
    if not num_pairs:
        return
    own = weight.rows(matrix.first, weight.shape[0])
    rounded = own.rounded(x, tile)
    source, x_scales = (x, None) if rounded is None else rounded
    codes_stride, scales_stride, *rest = own.launch_numbers
    columns = -(-matrix.count // tile.columns)
    grouped_quantized_kernel[(len(pairs.tile_experts) * columns,)](
        *(source, x_scales, own.codes_for(rounded), own.scales, own.mins, bias, out),
        *(pairs.order, pairs.tile_experts),
        scale_outputs if scale_inputs is None else scale_inputs,
        0 if x_scales is None else x_scales.stride(0),
        *(num_pairs, source.stride(0), codes_stride, scales_stride),
        *(0 if bias is None else bias.stride(0), out.stride(0), *rest),
        **own.launch_sizes(tile, x.dtype, rounded is not None),
        OUT=matrix.count,
        ROW_BYTES=own.codes.shape[1],
        EXPERT_ROWS=matrix.stride,
        NUM_EXPERTS=num_experts,
        CHOSEN=pairs.num_chosen,
        TOGETHER=8,
        BY_TOKEN=len(x) != num_pairs,
        HAS_BIAS=bias is not None,
        SCALES_INPUTS=scale_inputs is not None,
        SCALES_OUTPUTS=scale_outputs is not None,
    )


def takes_single_pairs(num_pairs: int, num_experts: int) -> bool:
    """Whether so few pairs are multiplied one by one.

    Sorting takes a dozen small launches, and few pairs share an expert.
    """
    return 2 * num_pairs <= num_experts


def single_pairs(
    x: torch.Tensor,
    matrix: ExpertCodes,
    experts: torch.Tensor,
    num_experts: int,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    scale_inputs: torch.Tensor | None = None,
    scale_outputs: torch.Tensor | None = None,
) -> None:
    """As `grouped_quantized` for `experts` int64 [T, chosen], each pair by itself.

    No weight is rounded.
    """
    num_pairs = experts.numel()
    matrix.check(x, num_experts, num_pairs, out, bias)
    if len(x) not in (len(experts), num_pairs):
        raise KernelError(f"{len(x)} rows for {tuple(experts.shape)} pairs")
    if not experts.is_contiguous():
        raise KernelError("experts must be contiguous")
    if num_pairs:
        matrix.weight.rows(matrix.first, matrix.weight.shape[0]).launch_rows(
            x,
            out,
            bias,
            experts=experts,
            stride=matrix.stride,
            chosen=num_pairs // len(x),
            scale_inputs=scale_inputs,
            scale_outputs=scale_outputs,
        )

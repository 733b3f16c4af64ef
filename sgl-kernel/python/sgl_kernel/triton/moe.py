"""Mixtures of experts on a GPU: pairs sorted by expert, two launches of products, one sum.

Few pairs are not sorted where weights stay quantised (expert_codes.py).

What is computed is what `Experts` in sglang.srt.layers.moe does. Nothing waits for the device:
shapes depend on the number of tokens alone, so a step can be captured in a graph. See docs/gpu.md,
Note [Grouped products]. Not yet run on a GPU.

Legend: T tokens, E experts, K experts of a token, H hidden width, I an expert's width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from sgl_kernel.library import KernelError
from sgl_kernel.triton.expert_codes import (
    ExpertCodes,
    grouped_quantized,
    single_pairs,
    takes_single_pairs,
)
from sgl_kernel.triton.kernels.moe import grouped_linear_kernel, sum_pairs_kernel
from sgl_kernel.triton.launch import (
    FP_FUSION,
    TRITON_TYPES,
    GroupedTile,
    Pairs,
    check_device,
    is_interpreted,
    power_of_two,
)
from sgl_kernel.triton.rows import silu_and_mul

_SUM_COLUMNS = 1024


def default_grouped_tile(num_pairs: int, num_experts: int, dtype: torch.dtype) -> GroupedTile:
    """A tile about as high as an expert has rows. Chosen by arithmetic, not by measurement."""
    rows = min(128, max(16, power_of_two(-(-num_pairs // num_experts))))
    depth = 128 // dtype.itemsize
    return GroupedTile(rows, 128 if rows >= 64 else 64, depth)


def sort_pairs(experts: torch.Tensor, num_experts: int, block: int) -> Pairs:
    """Sort the pairs of experts int64 [T, K] by expert, each expert's rows padded to tiles.

    The number of tiles is the largest that T, K and E allow, whatever was chosen; within an expert
    tokens stay in order.
    """
    flat = experts.flatten()
    num_pairs, device = len(flat), experts.device
    num_tiles = -(-num_pairs // block) + min(num_experts, num_pairs)
    by_expert, order = torch.sort(flat, stable=True)
    ones = torch.ones_like(flat)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=device)
    counts.scatter_add_(0, flat, ones)
    tiles = (counts + block - 1) // block
    ends = torch.cumsum(tiles, 0)
    first_rows = (ends - tiles) * block
    before = torch.cumsum(counts, 0) - counts
    places = first_rows[by_expert] + torch.arange(num_pairs, device=device) - before[by_expert]
    placed = torch.full((num_tiles * block,), num_pairs, dtype=torch.int32, device=device)
    placed.scatter_(0, places, order.to(torch.int32))
    numbers = torch.arange(num_tiles, device=device)
    tile_experts = torch.searchsorted(ends, numbers, right=True).to(torch.int32)
    return Pairs(placed, tile_experts, block, *experts.shape)


def grouped_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    pairs: Pairs,
    tile: GroupedTile,
    *,
    bias: torch.Tensor | None = None,
    scale_inputs: torch.Tensor | None = None,
    scale_outputs: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x times the transposed weight of each pair's expert: [T * K, N] in the order of pairs.

    `x` [T, C], a token's row for all its experts, or [T * K, C], a row a pair; `weight` [E, N, C]
    and `bias` [E, N]. Scales float32 [T, K] multiply a pair's inputs, rounded to x's type, or its
    outputs. Products are summed in float32. Raises KernelError for shapes that do not fit.
    """
    _check(x, weight, pairs, tile)
    if scale_inputs is not None and scale_outputs is not None:
        raise KernelError("weights of the pairs multiply inputs or outputs, not both")
    num_experts, width, depth = weight.shape
    num_pairs = pairs.num_pairs
    out = torch.empty((num_pairs, width), dtype=out_dtype or x.dtype, device=x.device)
    if not num_pairs:
        return out
    columns = -(-width // tile.columns)
    grouped_linear_kernel[(len(pairs.tile_experts) * columns,)](
        *(x, weight, bias, out, pairs.order, pairs.tile_experts),
        scale_outputs if scale_inputs is None else scale_inputs,
        *(num_pairs, x.stride(0)),
        OUT=width,
        IN=depth,
        NUM_EXPERTS=num_experts,
        CHOSEN=pairs.num_chosen,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_C=tile.depth,
        GROUP_M=8,
        BY_TOKEN=len(x) != num_pairs,
        HAS_BIAS=bias is not None,
        SCALES_INPUTS=scale_inputs is not None,
        SCALES_OUTPUTS=scale_outputs is not None,
        X_TYPE=TRITON_TYPES[x.dtype],
        DOT_TYPE=TRITON_TYPES[torch.float32 if is_interpreted() else x.dtype],
        PRECISION="ieee" if x.dtype is torch.float32 else "tf32",
        num_warps=8 if tile.rows >= 128 else 4,
        num_stages=3,
        **FP_FUSION,
    )
    return out


def _check(x: torch.Tensor, weight: torch.Tensor, pairs: Pairs, tile: GroupedTile) -> None:
    """Raises KernelError for shapes and types that are not served."""
    check_device(x)
    if x.shape[1] != weight.shape[2] or x.stride(1) != 1 or not weight.is_contiguous():
        raise KernelError(f"x {tuple(x.shape)} does not fit weights {tuple(weight.shape)}")
    if pairs.block != tile.rows or x.dtype != weight.dtype:
        raise KernelError(f"tiles of {pairs.block} and {tile.rows}, {x.dtype} and {weight.dtype}")
    if len(x) not in (pairs.num_tokens, pairs.num_pairs):
        raise KernelError(f"{len(x)} rows for {pairs.num_tokens} x {pairs.num_chosen} pairs")


def mixture(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor | tuple[ExpertCodes, ExpertCodes],
    down: torch.Tensor | ExpertCodes,
    *,
    num_experts: int | None = None,
    activation: Callable[[torch.Tensor], torch.Tensor] = silu_and_mul,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    scale_inputs: bool = False,
    out_dtype: torch.dtype | None = None,
    tile: GroupedTile | None = None,
) -> torch.Tensor:
    """The weighted sum of each token's experts, down(activation(gate_up(x))): x [T, H] to [T, H].

    `experts` int64 [T, K], different ones for a token, with `weights` float32 [T, K];
    `gate_up` [E, 2 I, H], `down` [E, H, I], biases [E, 2 I] and [E, H]. Quantised weights are
    (gate, up) and down; `num_experts` is needed where both are. `scale_inputs`: weights multiply
    what an expert gets, not what it gives. What experts give is added up in float32, the lowest
    expert first, and comes in `out_dtype` (None: x's).
    """
    if num_experts is None:
        num_experts = len(next(one for one in (gate_up, down) if isinstance(one, torch.Tensor)))
    num_tokens, num_chosen = experts.shape
    work = _Work(experts, weights, num_experts, scale_inputs, tile, None)
    numbers = isinstance(gate_up, torch.Tensor) or isinstance(down, torch.Tensor)
    if numbers or tile is not None or not takes_single_pairs(experts.numel(), num_experts):
        block = default_grouped_tile(experts.numel(), num_experts, x.dtype).rows
        pairs = sort_pairs(experts, num_experts, block if tile is None else tile.rows)
        work = replace(work, pairs=pairs)
    hidden = _gate_up(x, gate_up, work, gate_up_bias)
    parts = _down(activation(hidden), down, work, down_bias)
    width = parts.shape[1]
    out = torch.empty((num_tokens, width), dtype=out_dtype or x.dtype, device=x.device)
    if num_tokens:
        block = min(_SUM_COLUMNS, power_of_two(width))
        sum_pairs_kernel[(num_tokens, -(-width // block))](
            parts,
            experts,
            out,
            WIDTH=width,
            CHOSEN=num_chosen,
            BLOCK=block,
            NUM_EXPERTS=num_experts,
            **FP_FUSION,
        )
    return out


@dataclass(frozen=True, slots=True)
class _Work:
    """What a mixture's products share; `pairs` None: each pair is multiplied by itself."""

    experts: torch.Tensor
    weights: torch.Tensor
    num_experts: int
    scale_inputs: bool
    tile: GroupedTile | None
    pairs: Pairs | None

    def numbers(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        out_dtype: torch.dtype,
        **scales: torch.Tensor | None,
    ) -> torch.Tensor:
        """`grouped_linear` of the sorted pairs."""
        assert self.pairs is not None
        tile = self.tile
        if tile is None:
            tile = default_grouped_tile(self.experts.numel(), self.num_experts, x.dtype)
        return grouped_linear(x, weight, self.pairs, tile, bias=bias, out_dtype=out_dtype, **scales)

    def codes(
        self,
        x: torch.Tensor,
        matrix: ExpertCodes,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        **scales: torch.Tensor | None,
    ) -> None:
        """Write the pairs' products with quantised weights into out [T * K, count]."""
        if self.pairs is None:
            experts, count = self.experts, self.num_experts
            single_pairs(x, matrix, experts, count, out, bias=bias, **scales)
            return
        pairs, tile = self.pairs, self.tile
        grouped_quantized(x, matrix, pairs, self.num_experts, out, tile=tile, bias=bias, **scales)


def _gate_up(
    x: torch.Tensor,
    gate_up: torch.Tensor | tuple[ExpertCodes, ExpertCodes],
    work: _Work,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Gate and up of every pair, [T * K, 2 I]: one launch where they lie together, else two."""
    scales = work.weights if work.scale_inputs else None
    if isinstance(gate_up, torch.Tensor):
        return work.numbers(x, gate_up, bias, out_dtype=x.dtype, scale_inputs=scales)
    gate, up = gate_up
    size = (work.experts.numel(), gate.count + up.count)
    out = torch.empty(size, dtype=x.dtype, device=x.device)
    both = gate.joined(up)
    first = 0
    for matrix in gate_up if both is None else (both,):
        last = first + matrix.count
        own = None if bias is None else bias[:, first:last]
        work.codes(x, matrix, own, out[:, first:last], scale_inputs=scales)
        first = last
    return out


def _down(
    x: torch.Tensor, down: torch.Tensor | ExpertCodes, work: _Work, bias: torch.Tensor | None
) -> torch.Tensor:
    """What every pair's expert gives, float32 [T * K, H]."""
    scales = None if work.scale_inputs else work.weights
    if isinstance(down, torch.Tensor):
        return work.numbers(x, down, bias, out_dtype=torch.float32, scale_outputs=scales)
    size = (work.experts.numel(), down.count)
    out = torch.empty(size, dtype=torch.float32, device=x.device)
    work.codes(x, down, bias, out, scale_outputs=scales)
    return out

"""Products of tokens with the weights of their experts, in Triton: one launch for all experts.

Pairs of token and expert are sorted by expert and padded so that a tile of rows has one expert.
Checked in Triton's interpreter and compiled for sm_90; not yet run on a GPU.

Legend: T tokens, K experts of a token, M rows of a tile, N output features, C input features.
"""

import triton
import triton.language as tl


@triton.jit
def place_of(program, row_tiles, output_tiles, TOGETHER: tl.constexpr):
    """(tile of rows, tile of outputs): TOGETHER tiles of rows share one of outputs in turn."""
    in_group = TOGETHER * output_tiles
    first = program // in_group * TOGETHER
    group_tiles = tl.minimum(row_tiles - first, TOGETHER)
    return first + program % in_group % group_tiles, program % in_group // group_tiles


# Whether the number of pairs is 1 or a multiple of 16 differs from step to step, and helps nothing.
@triton.jit(do_not_specialize=["num_pairs"])
def grouped_linear_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, pairs_ptr, tile_experts_ptr, pair_weights_ptr,
    num_pairs, x_stride,
    OUT: tl.constexpr, IN: tl.constexpr, NUM_EXPERTS: tl.constexpr, CHOSEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, GROUP_M: tl.constexpr,
    BY_TOKEN: tl.constexpr, HAS_BIAS: tl.constexpr,
    SCALES_INPUTS: tl.constexpr, SCALES_OUTPUTS: tl.constexpr,
    X_TYPE: tl.constexpr, DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program p: a tile of M pairs of one expert by N features of its output.

    `pairs` int32 [tiles * M]: pair t * K + i is token t's i-th expert, num_pairs stands for
    padding. `tile_experts` int32 [tiles], NUM_EXPERTS for tiles without pairs. Row `pair` of the
    output is x[pair // K] (BY_TOKEN) or x[pair] times the transposed weight [N, C] of the expert.
    Weights of the pairs multiply the inputs, rounded to their type, or the outputs. Programs beside
    each other share a weight tile: GROUP_M tiles of pairs before the next features.
    """
    output_tiles: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    num_tiles = tl.num_programs(0) // output_tiles
    tile, block = place_of(tl.program_id(0), num_tiles, output_tiles, GROUP_M)
    expert = tl.load(tile_experts_ptr + tile)
    if expert == NUM_EXPERTS:
        return
    pairs = tl.load(pairs_ptr + tile * BLOCK_M + tl.arange(0, BLOCK_M))
    is_pair = pairs < num_pairs
    rows = pairs
    if BY_TOKEN:
        rows = pairs // CHOSEN
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    in_out = columns < OUT
    offs_c = tl.arange(0, BLOCK_C)
    x_at = x_ptr + rows.to(tl.int64)[:, None] * x_stride + offs_c[None, :]
    weight = weight_ptr + expert.to(tl.int64) * (OUT * IN)
    weight_at = weight + columns.to(tl.int64)[None, :] * IN + offs_c[:, None]
    if SCALES_INPUTS:
        scales = tl.load(pair_weights_ptr + pairs, mask=is_pair, other=0.0)[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, IN, BLOCK_C):
        inside = start + offs_c < IN
        x = tl.load(x_at + start, mask=is_pair[:, None] & inside[None, :], other=0.0)
        if SCALES_INPUTS:
            x = (x.to(tl.float32) * scales).to(X_TYPE)
        w = tl.load(weight_at + start, mask=inside[:, None] & in_out[None, :], other=0.0)
        acc = tl.dot(x.to(DOT_TYPE), w.to(DOT_TYPE), acc, input_precision=PRECISION)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + expert * OUT + columns, mask=in_out, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    if SCALES_OUTPUTS:
        acc *= tl.load(pair_weights_ptr + pairs, mask=is_pair, other=0.0)[:, None]
    tl.store(
        out_ptr + pairs.to(tl.int64)[:, None] * OUT + columns[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=is_pair[:, None] & in_out[None, :],
    )


@triton.jit
def sum_pairs_kernel(
    parts_ptr, experts_ptr, out_ptr,
    WIDTH: tl.constexpr, CHOSEN: tl.constexpr, BLOCK: tl.constexpr, NUM_EXPERTS: tl.constexpr,
):  # fmt: skip
    """Program (t, b): the sum of token t's K rows of float32 parts, the lowest expert first."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    total = tl.zeros([BLOCK], tl.float32)
    done = -1
    for _ in tl.static_range(CHOSEN):
        expert = NUM_EXPERTS
        pair = 0
        for i in tl.static_range(CHOSEN):
            other = tl.load(experts_ptr + token * CHOSEN + i).to(tl.int32)
            is_next = (other > done) & (other < expert)
            expert = tl.where(is_next, other, expert)
            pair = tl.where(is_next, i, pair)
        done = expert
        row = parts_ptr + (token * CHOSEN + pair) * WIDTH
        total += tl.load(row + columns, mask=mask, other=0.0)
    tl.store(out_ptr + token * WIDTH + columns, total.to(out_ptr.dtype.element_ty), mask=mask)

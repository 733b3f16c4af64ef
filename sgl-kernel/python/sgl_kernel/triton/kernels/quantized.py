"""Products with weights whose codes become numbers on the way, in Triton.

A tile of the weight is the first operand of a product, so tensor cores of an H100 can take it from
registers, where codes become numbers. Checked in Triton's interpreter and compiled for sm_90; not
yet run on a GPU.

Legend: N outputs, K inputs, R rows of x, B bytes of a row's codes, M rows of a tile.
"""

import triton
import triton.language as tl

from sgl_kernel.triton.kernels.fp8 import (
    fp8_numbers,
    fp8_products,
    fp8_rounded_products,
    fp8_row_products,
)
from sgl_kernel.triton.kernels.moe import place_of

# What codes stand for, see `_kind` of sgl_kernel.triton.quantized.
BYTES = tl.constexpr(0)
NIBBLES = tl.constexpr(1)
E2M1 = tl.constexpr(2)
TABLE = tl.constexpr(3)
FP8 = tl.constexpr(4)
ROUNDED_FP8 = tl.constexpr(5)  # of products of rows that are codes too

_HALF = tl.constexpr(16)  # codes of a block that lie in the low halves of its bytes
_BLOCK = tl.constexpr(32)


@triton.jit
def half_numbers(codes, table_0, table_1, table_2, table_3, KIND: tl.constexpr):
    """float32 numbers of the low and the high halves of bytes, each times a factor of the kind.

    What is right after a multiplication: NIBBLES times 1 and 1/16, E2M1 times 2^15, which gives
    twice its numbers, and TABLE as they are.
    """
    wide = codes.to(tl.int32)
    if KIND == NIBBLES:
        low = (wide & 15).to(tl.float32)
        high = (wide & 240).to(tl.float32)
    elif KIND == E2M1:
        # Sign, exponent and mantissa where a float16 has them, the high half's in the upper one.
        # The smallest numbers of a float16 stand at even distances, as those of E2M1 do.
        both = wide | (wide << 12)
        bits = ((both << 9) & 0x0E000E00) | ((both & 0x00080008) << 12)
        low = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (bits >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        low = table_numbers(wide & 15, table_0, table_1, table_2, table_3)
        high = table_numbers(wide >> 4, table_0, table_1, table_2, table_3)
    return low, high


@triton.jit
def table_numbers(codes, table_0, table_1, table_2, table_3):
    """float32 of the signed byte at place `code` of four words, the first byte lowest."""
    low = tl.where((codes & 4) == 0, table_0, table_1)
    high = tl.where((codes & 4) == 0, table_2, table_3)
    four = tl.where((codes & 8) == 0, low, high)
    return ((four << (24 - ((codes & 3) << 3))) >> 24).to(tl.float32)


@triton.jit
def spread(values, ROWS: tl.constexpr, GROUPS: tl.constexpr, COUNT: tl.constexpr):
    """values [ROWS, GROUPS], each COUNT times: [ROWS, GROUPS * COUNT]."""
    wide = tl.broadcast_to(values[:, :, None], [ROWS, GROUPS, COUNT])
    return tl.reshape(wide, [ROWS, GROUPS * COUNT])


@triton.jit
def products(
    x_at, is_row, codes_ptr, scales_ptr, mins_ptr, outputs, is_output, scale_of_input,
    first, last, codes_stride, scales_stride, scale_gain, gain,
    table_0, table_1, table_2, table_3,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_B: tl.constexpr, GROUP: tl.constexpr,
    KIND: tl.constexpr, HAS_MINS: tl.constexpr, SCALES_INPUTS: tl.constexpr,
    X_TYPE: tl.constexpr, DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """float32 [N, M]: weight rows `outputs` times rows of x, over bytes [first, last) of codes.

    `x_at` are addresses of rows. The weight is rounded to X_TYPE, sums are float32.
    """
    # Bytes of a group's codes; each half of a byte is a product of its own.
    COUNT: tl.constexpr = GROUP if KIND == BYTES else _HALF
    GROUPS: tl.constexpr = BLOCK_B // COUNT
    offs = tl.arange(0, BLOCK_B)
    groups = tl.arange(0, GROUPS)
    last_group = last // COUNT
    codes_at = codes_ptr + outputs.to(tl.int64)[:, None] * codes_stride
    scales_at = outputs.to(tl.int64)[:, None] * scales_stride + groups[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    # Scales are too small to be fetched beside the arithmetic: they are asked for a turn ahead.
    ahead = first // COUNT
    mask = is_output[:, None] & (ahead + groups < last_group)[None, :]
    scales = tl.load(scales_ptr + scales_at + ahead, mask=mask, other=0.0)
    mins = scales
    if HAS_MINS:
        mins = tl.load(mins_ptr + scales_at + ahead, mask=mask, other=0.0)
    for start in range(first, last, BLOCK_B):
        at = start + offs
        inside = at < last
        codes = tl.load(codes_at + at[None, :], mask=is_output[:, None] & inside[None, :], other=0)
        scale_of_group = scales.to(tl.float32) * scale_gain
        min_of_group = mins.to(tl.float32) * gain
        ahead = start // COUNT + GROUPS
        mask = is_output[:, None] & (ahead + groups < last_group)[None, :]
        scales = tl.load(scales_ptr + scales_at + ahead, mask=mask, other=0.0)
        if HAS_MINS:
            mins = tl.load(mins_ptr + scales_at + ahead, mask=mask, other=0.0)
        scale = spread(scale_of_group, BLOCK_N, GROUPS, COUNT)
        if HAS_MINS:
            low_end = spread(min_of_group, BLOCK_N, GROUPS, COUNT)
        if KIND == BYTES:
            some = codes.to(tl.float32)
            inputs = at
        else:
            some, others = half_numbers(codes, table_0, table_1, table_2, table_3, KIND)
            inputs = at // _HALF * _BLOCK + at % _HALF
        for half in tl.static_range(1 if KIND == BYTES else 2):
            if half == 1:
                some = others
                inputs += _HALF
                if KIND == NIBBLES:
                    scale = spread(scale_of_group * 0.0625, BLOCK_N, GROUPS, COUNT)
            x = tl.load(
                x_at[None, :] + inputs[:, None], mask=inside[:, None] & is_row[None, :], other=0.0
            )
            if SCALES_INPUTS:
                x = (x.to(tl.float32) * scale_of_input[None, :]).to(X_TYPE)
            weight = some * scale
            if HAS_MINS:
                weight += low_end
            weight = weight.to(X_TYPE).to(DOT_TYPE)
            acc = tl.dot(weight, x.to(DOT_TYPE), acc, input_precision=PRECISION)
    return acc


@triton.jit
def any_products(
    x_ptr, x_stride, x_scales_ptr, x_scales_stride, rows, is_row,
    codes_ptr, scales_ptr, mins_ptr, outputs, is_output, scale_of_input,
    first, last, codes_stride, scales_stride, scale_gain, gain,
    table_0, table_1, table_2, table_3,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_B: tl.constexpr, GROUP: tl.constexpr,
    KIND: tl.constexpr, HAS_MINS: tl.constexpr, SCALES_INPUTS: tl.constexpr,
    X_TYPE: tl.constexpr, DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`products` of integers, or those of E4M3, with `rows` of x."""
    x_at = x_ptr + rows.to(tl.int64) * x_stride
    if KIND == ROUNDED_FP8:
        acc = fp8_rounded_products(
            x_at, is_row, codes_ptr, scales_ptr, outputs, is_output, scale_of_input,
            x_scales_ptr + rows.to(tl.int64) * x_scales_stride,
            first, last, codes_stride, scales_stride, gain,
            BLOCK_N, BLOCK_M, BLOCK_B, GROUP, SCALES_INPUTS, DOT_TYPE,
        )  # fmt: skip
    elif KIND == FP8:
        acc = fp8_products(
            x_at, is_row, codes_ptr, scales_ptr, outputs, is_output, scale_of_input,
            first, last, codes_stride, scales_stride, scale_gain,
            BLOCK_N, BLOCK_M, BLOCK_B, GROUP, SCALES_INPUTS, X_TYPE, DOT_TYPE, PRECISION,
        )  # fmt: skip
    else:
        acc = products(
            x_at, is_row, codes_ptr, scales_ptr, mins_ptr, outputs, is_output, scale_of_input,
            first, last, codes_stride, scales_stride, scale_gain, gain,
            table_0, table_1, table_2, table_3, BLOCK_N, BLOCK_M, BLOCK_B, GROUP, KIND, HAS_MINS,
            SCALES_INPUTS, X_TYPE, DOT_TYPE, PRECISION,
        )  # fmt: skip
    return acc


# The number of rows differs from step to step, and table and gains from layer to layer.
@triton.jit(do_not_specialize=["num_rows", "table_0", "table_1", "table_2", "table_3"])
def quantized_linear_kernel(
    x_ptr, x_scales_ptr, codes_ptr, scales_ptr, mins_ptr, bias_ptr, out_ptr, x_scales_stride,
    num_rows, num_outputs, row_bytes, x_stride, out_stride, codes_stride, scales_stride,
    scale_gain, gain,
    table_0, table_1, table_2, table_3,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_B: tl.constexpr, GROUP: tl.constexpr,
    TOGETHER: tl.constexpr, SPLITS: tl.constexpr,
    KIND: tl.constexpr, HAS_MINS: tl.constexpr, HAS_BIAS: tl.constexpr,
    X_TYPE: tl.constexpr, DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (p, s): a tile of N outputs of M rows, over share s of the inputs.

    With SPLITS > 1 `out` are float32 parts [SPLITS * R, N], to which no bias is added.
    """
    output_tiles = tl.cdiv(num_outputs, BLOCK_N)
    tile, block = place_of(
        tl.program_id(0), tl.num_programs(0) // output_tiles, output_tiles, TOGETHER
    )
    split = tl.program_id(1)
    share = tl.cdiv(tl.cdiv(row_bytes, BLOCK_B), SPLITS) * BLOCK_B
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < num_rows
    outputs = block * BLOCK_N + tl.arange(0, BLOCK_N)
    is_output = outputs < num_outputs
    acc = any_products(
        x_ptr, x_stride, x_scales_ptr, x_scales_stride, rows, is_row,
        codes_ptr, scales_ptr, mins_ptr, outputs, is_output, None,
        split * share, tl.minimum(row_bytes, (split + 1) * share),
        codes_stride, scales_stride, scale_gain, gain, table_0, table_1, table_2, table_3,
        BLOCK_N, BLOCK_M, BLOCK_B, GROUP, KIND, HAS_MINS, False, X_TYPE, DOT_TYPE, PRECISION,
    )  # fmt: skip
    if HAS_BIAS:
        bias = tl.load(bias_ptr + outputs, mask=is_output, other=0.0)
        acc += bias.to(tl.float32)[:, None]
    places = (split.to(tl.int64) * num_rows + rows)[None, :] * out_stride + outputs[:, None]
    tl.store(
        out_ptr + places,
        acc.to(out_ptr.dtype.element_ty),
        mask=is_output[:, None] & is_row[None, :],
    )


@triton.jit(do_not_specialize=["num_rows"])
def sum_splits_kernel(
    parts_ptr, bias_ptr, out_ptr, num_rows, num_outputs, out_stride,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Program (r, b): the sum of row r's float32 parts [SPLITS * R, N], the first one first."""
    row = tl.program_id(0).to(tl.int64)
    outputs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = outputs < num_outputs
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        at = (split * num_rows + row) * num_outputs
        total += tl.load(parts_ptr + at + outputs, mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + outputs, mask=mask, other=0.0).to(tl.float32)
    at = row * out_stride + outputs
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_pairs", "table_0", "table_1", "table_2", "table_3"])
def grouped_quantized_kernel(
    x_ptr, x_scales_ptr, codes_ptr, scales_ptr, mins_ptr, bias_ptr, out_ptr,
    pairs_ptr, tile_experts_ptr, pair_weights_ptr, x_scales_stride,
    num_pairs, x_stride, codes_stride, scales_stride, bias_stride, out_stride, scale_gain, gain,
    table_0, table_1, table_2, table_3,
    OUT: tl.constexpr, ROW_BYTES: tl.constexpr, EXPERT_ROWS: tl.constexpr,
    NUM_EXPERTS: tl.constexpr, CHOSEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_B: tl.constexpr, GROUP: tl.constexpr,
    TOGETHER: tl.constexpr, BY_TOKEN: tl.constexpr, KIND: tl.constexpr, HAS_MINS: tl.constexpr,
    HAS_BIAS: tl.constexpr, SCALES_INPUTS: tl.constexpr, SCALES_OUTPUTS: tl.constexpr,
    X_TYPE: tl.constexpr, DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program p: a tile of M pairs of one expert by N of its OUT outputs.

    As `grouped_linear_kernel` of kernels/moe.py, over a weight [E * EXPERT_ROWS, K] whose pointers
    stand at expert 0's first output.
    """
    output_tiles: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    tile, block = place_of(
        tl.program_id(0), tl.num_programs(0) // output_tiles, output_tiles, TOGETHER
    )
    expert = tl.load(tile_experts_ptr + tile)
    if expert == NUM_EXPERTS:
        return
    pairs = tl.load(pairs_ptr + tile * BLOCK_M + tl.arange(0, BLOCK_M))
    is_pair = pairs < num_pairs
    rows = pairs
    if BY_TOKEN:
        rows = pairs // CHOSEN
    outputs = block * BLOCK_N + tl.arange(0, BLOCK_N)
    is_output = outputs < OUT
    input_scales = is_pair
    if SCALES_INPUTS:
        input_scales = tl.load(pair_weights_ptr + pairs, mask=is_pair, other=0.0)
    acc = any_products(
        x_ptr, x_stride, x_scales_ptr, x_scales_stride, rows, is_pair,
        codes_ptr, scales_ptr, mins_ptr, expert * EXPERT_ROWS + outputs, is_output, input_scales,
        0, ROW_BYTES,
        codes_stride, scales_stride, scale_gain, gain, table_0, table_1, table_2, table_3,
        BLOCK_N, BLOCK_M, BLOCK_B, GROUP, KIND, HAS_MINS, SCALES_INPUTS,
        X_TYPE, DOT_TYPE, PRECISION,
    )  # fmt: skip
    if HAS_BIAS:
        bias = tl.load(bias_ptr + expert * bias_stride + outputs, mask=is_output, other=0.0)
        acc += bias.to(tl.float32)[:, None]
    if SCALES_OUTPUTS:
        acc *= tl.load(pair_weights_ptr + pairs, mask=is_pair, other=0.0)[None, :]
    tl.store(
        out_ptr + pairs.to(tl.int64)[None, :] * out_stride + outputs[:, None],
        acc.to(out_ptr.dtype.element_ty),
        mask=is_output[:, None] & is_pair[None, :],
    )


@triton.jit
def row_products(
    x_ptr, codes_ptr, scales_ptr, mins_ptr, outputs, is_output,
    row_bytes, codes_stride, scales_stride, scale_gain, gain,
    table_0, table_1, table_2, table_3,
    BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
    KIND: tl.constexpr, HAS_MINS: tl.constexpr,
):  # fmt: skip
    """float32 [N]: weight rows `outputs` times one row of x, all in float32.

    Codes of a group are added up before their scale multiplies the sum.
    """
    COUNT: tl.constexpr = GROUP if KIND == BYTES else _HALF
    WIDTH: tl.constexpr = GROUP if KIND == BYTES else _BLOCK
    GROUPS: tl.constexpr = BLOCK_B // COUNT
    offs = tl.arange(0, BLOCK_B)
    groups = tl.arange(0, GROUPS)
    in_group = tl.arange(0, COUNT)
    codes_at = codes_ptr + outputs.to(tl.int64)[:, None] * codes_stride + offs[None, :]
    scales_at = outputs.to(tl.int64)[:, None] * scales_stride + groups[None, :]
    x_at = x_ptr + groups[:, None] * WIDTH + in_group[None, :]
    last_group = row_bytes // COUNT
    acc = tl.zeros([BLOCK_N, GROUPS], tl.float32)
    mask = is_output[:, None] & (groups < last_group)[None, :]
    scales = tl.load(scales_ptr + scales_at, mask=mask, other=0.0)  # a turn ahead, as above
    mins = scales
    if HAS_MINS:
        mins = tl.load(mins_ptr + scales_at, mask=mask, other=0.0)
    for start in tl.range(0, row_bytes, BLOCK_B, num_stages=STAGES):
        codes = tl.load(
            codes_at + start, mask=is_output[:, None] & (start + offs < row_bytes)[None, :], other=0
        )
        first = start // COUNT
        inside = first + groups < last_group
        scale = scales.to(tl.float32) * scale_gain
        low_end = mins.to(tl.float32) * gain
        ahead = first + GROUPS
        mask = is_output[:, None] & (ahead + groups < last_group)[None, :]
        scales = tl.load(scales_ptr + scales_at + ahead, mask=mask, other=0.0)
        if HAS_MINS:
            mins = tl.load(mins_ptr + scales_at + ahead, mask=mask, other=0.0)
        x = tl.load(x_at + first * WIDTH, mask=inside[:, None], other=0.0).to(tl.float32)
        if KIND == BYTES:
            wide = tl.reshape(codes.to(tl.float32), [BLOCK_N, GROUPS, COUNT])
            part = tl.sum(wide * x[None, :, :], 2)
            x_sum = tl.sum(x, 1)
        else:
            low, high = half_numbers(codes, table_0, table_1, table_2, table_3, KIND)
            others = tl.load(x_at + first * WIDTH + _HALF, mask=inside[:, None], other=0.0)
            others = others.to(tl.float32)
            part = tl.sum(tl.reshape(low, [BLOCK_N, GROUPS, COUNT]) * x[None, :, :], 2)
            rest = tl.sum(tl.reshape(high, [BLOCK_N, GROUPS, COUNT]) * others[None, :, :], 2)
            if KIND == NIBBLES:
                rest *= 0.0625
            part += rest
            x_sum = tl.sum(x, 1) + tl.sum(others, 1)
        acc += part * scale
        if HAS_MINS:
            acc += low_end * x_sum[None, :]
    return tl.sum(acc, 1)


@triton.jit(do_not_specialize=["table_0", "table_1", "table_2", "table_3"])
def quantized_rows_kernel(
    x_ptr, codes_ptr, scales_ptr, mins_ptr, bias_ptr, out_ptr, experts_ptr, pair_weights_ptr,
    num_outputs, row_bytes, x_stride, codes_stride, scales_stride, bias_stride, out_stride,
    scale_gain, gain, table_0, table_1, table_2, table_3,
    EXPERT_ROWS: tl.constexpr, CHOSEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
    KIND: tl.constexpr, HAS_MINS: tl.constexpr, HAS_BIAS: tl.constexpr, BY_EXPERT: tl.constexpr,
    SCALES_INPUTS: tl.constexpr, SCALES_OUTPUTS: tl.constexpr,
):  # fmt: skip
    """Program (b, r): N outputs of row r of x, or of pair r of token and expert.

    Row r of `out` is that of x[r // CHOSEN] and of the matrix of experts[r] (BY_EXPERT), whose
    pointers stand at expert 0's first output. No weight is rounded.
    """
    row = tl.program_id(1).to(tl.int64)
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_output = outputs < num_outputs
    first = 0
    expert = row * 0
    if BY_EXPERT:
        expert = tl.load(experts_ptr + row)
        first = expert * EXPERT_ROWS
    if KIND == FP8:
        out = fp8_row_products(
            x_ptr + row // CHOSEN * x_stride, codes_ptr, scales_ptr, first + outputs, is_output,
            row_bytes, codes_stride, scales_stride, scale_gain, BLOCK_N, BLOCK_B, GROUP, STAGES,
        )  # fmt: skip
    else:
        out = row_products(
            x_ptr + row // CHOSEN * x_stride, codes_ptr, scales_ptr, mins_ptr,
            first + outputs, is_output,
            row_bytes, codes_stride, scales_stride, scale_gain, gain,
            table_0, table_1, table_2, table_3, BLOCK_N, BLOCK_B, GROUP, STAGES, KIND, HAS_MINS,
        )  # fmt: skip
    if SCALES_INPUTS:
        out *= tl.load(pair_weights_ptr + row)
    if HAS_BIAS:
        bias_at = bias_ptr + expert * bias_stride + outputs
        out += tl.load(bias_at, mask=is_output, other=0.0).to(tl.float32)
    if SCALES_OUTPUTS:
        out *= tl.load(pair_weights_ptr + row)
    kind = out_ptr.dtype.element_ty
    tl.store(out_ptr + row * out_stride + outputs, out.to(kind), mask=is_output)


@triton.jit(do_not_specialize=["table_0", "table_1", "table_2", "table_3"])
def dequantize_kernel(
    codes_ptr, scales_ptr, mins_ptr, ids_ptr, out_ptr,
    row_bytes, codes_stride, scales_stride, out_stride, scale_gain, gain,
    table_0, table_1, table_2, table_3,
    BLOCK_B: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, HAS_MINS: tl.constexpr,
    BY_ID: tl.constexpr,
):  # fmt: skip
    """Program (r, b): block b of row r's codes, or of row ids[r], as numbers."""
    COUNT: tl.constexpr = GROUP if KIND == BYTES else _HALF
    row = tl.program_id(0).to(tl.int64)
    source = row
    if BY_ID:
        source = tl.load(ids_ptr + row)
    at = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = at < row_bytes
    codes = tl.load(codes_ptr + source * codes_stride + at, mask=inside, other=0)
    if KIND != FP8:
        group = at // COUNT
    elif GROUP == 0:
        group = at * 0
    else:
        group = at // GROUP
    scales_at = source * scales_stride + group
    scale = tl.load(scales_ptr + scales_at, mask=inside, other=0.0).to(tl.float32) * scale_gain
    low_end = 0.0
    if HAS_MINS:
        low_end = tl.load(mins_ptr + scales_at, mask=inside, other=0.0).to(tl.float32) * gain
    out = out_ptr + row * out_stride
    kind = out_ptr.dtype.element_ty
    if KIND == BYTES:
        tl.store(out + at, (codes.to(tl.float32) * scale + low_end).to(kind), mask=inside)
    elif KIND == FP8:
        tl.store(out + at, (fp8_numbers(codes).to(tl.float32) * scale).to(kind), mask=inside)
    else:
        low, high = half_numbers(codes, table_0, table_1, table_2, table_3, KIND)
        if KIND == NIBBLES:
            high *= 0.0625
        inputs = at // _HALF * _BLOCK + at % _HALF
        tl.store(out + inputs, (low * scale + low_end).to(kind), mask=inside)
        tl.store(out + inputs + _HALF, (high * scale + low_end).to(kind), mask=inside)

"""Products with codes of E4M3, which kernels/quantized.py calls, in Triton.

A code is exact in every type of inputs, so no weight is rounded: what a group of inputs adds up to
meets its scale in float32. Without FP8 tensor cores codes become 16-bit floats by a shift. Checked
in Triton's interpreter and compiled for sm_90; not yet run on a GPU.

Legend: N outputs, B inputs of a tile, M rows of a tile.
"""

import triton
import triton.language as tl

from sgl_kernel.triton.kernels.store import to_fp8

LARGEST = tl.constexpr(448.0)


@triton.jit
def fp8_numbers(codes):
    """float16 numbers over 2^8 of bytes of E4M3, exact; NaN of NaN.

    Sign, exponent and mantissa where a float16 has them, whose exponent has another bias; its
    smallest numbers stand at even distances, as those of E4M3 do.
    """
    wide = codes.to(tl.int32) & 255
    bits = ((wide & 127) << 7) | ((wide & 128) << 8)
    bits = tl.where((wide & 127) == 127, 0x7E00, bits)
    return bits.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def fp8_products(
    x_at, is_row, codes_ptr, scales_ptr, outputs, is_output, scale_of_input,
    first, last, codes_stride, scales_stride, scale_gain,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_B: tl.constexpr, GROUP: tl.constexpr,
    SCALES_INPUTS: tl.constexpr,
    X_TYPE: tl.constexpr, DOT_TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """float32 [N, M]: weight rows `outputs` times rows of x, over inputs [first, last).

    `x_at` are addresses of rows. A scale float32 is for GROUP inputs, a multiple of B; 0: for all.
    """
    offs = tl.arange(0, BLOCK_B)
    codes_at = codes_ptr + outputs.to(tl.int64)[:, None] * codes_stride
    scales_at = scales_ptr + outputs.to(tl.int64) * scales_stride
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(first, last, BLOCK_B):
        at = start + offs
        inside = at < last
        codes = tl.load(codes_at + at[None, :], mask=is_output[:, None] & inside[None, :], other=0)
        x = tl.load(x_at[None, :] + at[:, None], mask=inside[:, None] & is_row[None, :], other=0.0)
        if SCALES_INPUTS:
            x = (x.to(tl.float32) * scale_of_input[None, :]).to(X_TYPE)
        # By way of float32: from float16 to bfloat16 an instruction is of a slower unit.
        weight = fp8_numbers(codes).to(tl.float32).to(X_TYPE).to(DOT_TYPE)
        if GROUP == 0:
            acc = tl.dot(weight, x.to(DOT_TYPE), acc, input_precision=PRECISION)
        else:
            scale = tl.load(scales_at + start // GROUP, mask=is_output, other=0.0)
            acc += tl.dot(weight, x.to(DOT_TYPE), input_precision=PRECISION) * scale[:, None]
    if GROUP == 0:
        acc *= tl.load(scales_at, mask=is_output, other=0.0)[:, None]
    return acc * scale_gain


@triton.jit
def fp8_rounded_products(
    x_at, is_row, codes_ptr, scales_ptr, outputs, is_output, scale_of_input,
    x_scales_at, first, last, codes_stride, scales_stride, gain,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_B: tl.constexpr, GROUP: tl.constexpr,
    SCALES_INPUTS: tl.constexpr, DOT_TYPE: tl.constexpr,
):  # fmt: skip
    """As `fp8_products`, of rows that `round_rows_kernel` has made codes of, by FP8 tensor cores.

    `x_scales_at` are addresses of the rows' scales, float32 [groups] each. Every turn is added in
    float32, since those cores keep fewer bits of a long sum.
    """
    offs = tl.arange(0, BLOCK_B)
    codes_at = codes_ptr + outputs.to(tl.int64)[:, None] * codes_stride
    scales_at = scales_ptr + outputs.to(tl.int64) * scales_stride
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(first, last, BLOCK_B):
        at = start + offs
        inside = at < last
        codes = tl.load(
            codes_at + at[None, :], mask=is_output[:, None] & inside[None, :], other=0.0
        )
        x = tl.load(x_at[None, :] + at[:, None], mask=inside[:, None] & is_row[None, :], other=0.0)
        part = tl.dot(codes.to(DOT_TYPE), x.to(DOT_TYPE))
        if GROUP != 0:
            scale = tl.load(scales_at + start // GROUP, mask=is_output, other=0.0)
            x_scale = tl.load(x_scales_at + start // GROUP, mask=is_row, other=0.0)
            part *= scale[:, None] * x_scale[None, :]
        acc += part
    if GROUP == 0:
        scale = tl.load(scales_at, mask=is_output, other=0.0)
        acc *= scale[:, None] * tl.load(x_scales_at, mask=is_row, other=0.0)[None, :]
    if SCALES_INPUTS:
        acc *= scale_of_input[None, :]
    return acc * gain


@triton.jit
def round_rows_kernel(
    x_ptr, codes_ptr, scales_ptr, width, x_stride, codes_stride, scales_stride,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (r, g): a group of row r's inputs as E4M3, the largest of them the largest code.

    A group are GROUP inputs, 0: all. What is not finite gives codes or a scale that are NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    first = group * GROUP
    last = width
    if GROUP != 0:
        last = tl.minimum(width, first + GROUP)
    offs = tl.arange(0, BLOCK)
    sizes = tl.zeros([BLOCK], tl.float32)
    for start in range(first, last, BLOCK):
        mask = start + offs < last
        x = tl.load(x_ptr + row * x_stride + start + offs, mask=mask, other=0.0)
        sizes = tl.maximum(sizes, tl.abs(x.to(tl.float32)))
    most = tl.max(sizes, 0)
    scale = tl.where(most == 0.0, 1.0, most / LARGEST)
    scale = tl.where(most == float("inf"), float("nan"), scale)
    for start in range(first, last, BLOCK):
        mask = start + offs < last
        x = tl.load(x_ptr + row * x_stride + start + offs, mask=mask, other=0.0)
        codes = to_fp8(x.to(tl.float32) / scale, 3, 7, LARGEST)
        place = codes_ptr + row * codes_stride + start + offs
        tl.store(place, codes.to(tl.float8e4nv, bitcast=True), mask=mask)
    tl.store(scales_ptr + row * scales_stride + group, scale)


@triton.jit
def fp8_row_products(
    x_ptr, codes_ptr, scales_ptr, outputs, is_output,
    width, codes_stride, scales_stride, scale_gain,
    BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """float32 [N]: weight rows `outputs` times one row of x, all in float32."""
    offs = tl.arange(0, BLOCK_B)
    codes_at = codes_ptr + outputs.to(tl.int64)[:, None] * codes_stride + offs[None, :]
    scales_at = scales_ptr + outputs.to(tl.int64) * scales_stride
    acc = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
    for start in tl.range(0, width, BLOCK_B, num_stages=STAGES):
        inside = start + offs < width
        codes = tl.load(codes_at + start, mask=is_output[:, None] & inside[None, :], other=0)
        x = tl.load(x_ptr + start + offs, mask=inside, other=0.0).to(tl.float32)
        part = fp8_numbers(codes).to(tl.float32) * x[None, :]
        if GROUP == 0:
            acc += part
        else:
            scale = tl.load(scales_at + start // GROUP, mask=is_output, other=0.0)
            acc += part * scale[:, None]
    out = tl.sum(acc, 1) * scale_gain
    if GROUP == 0:
        out *= tl.load(scales_at, mask=is_output, other=0.0)
    return out

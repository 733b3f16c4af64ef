"""Row by row in Triton: norms with the residual's addition, gated activations, the experts' choice.

A program takes a row whole, in registers. Checked in Triton's interpreter and compiled for sm_90;
not yet run on a GPU.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)

# What a gate's activation is, see `gate` of sgl_kernel.triton.rows.
SILU = tl.constexpr(0)
GELU_TANH = tl.constexpr(1)
CLAMPED = tl.constexpr(2)


@triton.jit
def rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, total_ptr, x_stride, residual_stride, eps, offset,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADDS: tl.constexpr, KEEPS: tl.constexpr,
):  # fmt: skip
    """Program r: row r of x, and of the residual when ADDS; their sum is stored when KEEPS."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if ADDS:
        x += tl.load(residual_ptr + row * residual_stride + columns, mask=mask, other=0.0).to(
            tl.float32
        )
    if KEEPS:
        tl.store(total_ptr + row * WIDTH + columns, x, mask=mask)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / WIDTH + eps)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32) + offset
    out = x * scale * weight
    tl.store(out_ptr + row * WIDTH + columns, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) that overflows nowhere."""
    decay = tl.exp2(tl.abs(x) * -LOG2E)
    return tl.where(x < 0, decay, 1.0) / (1.0 + decay)


@triton.jit
def gate_kernel(
    x_ptr, out_ptr, x_stride, alpha, limit,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Program (r, b): block b of the columns of row r; x holds gate, then up."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    gate = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
    if KIND == SILU:
        out = gate * sigmoid(gate) * up
    elif KIND == GELU_TANH:
        # 0.5 (1 + tanh(y)) is sigmoid(2 y).
        inner = gate * 1.5957691216057308 * (1.0 + 0.044715 * gate * gate)
        out = gate * sigmoid(inner) * up
    else:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        out = (up + 1.0) * gate * sigmoid(gate * alpha)
    tl.store(out_ptr + row * WIDTH + columns, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def route_kernel(
    logits_ptr, experts_ptr, weights_ptr, stride,
    NUM_EXPERTS: tl.constexpr, BLOCK: tl.constexpr, CHOSEN: tl.constexpr,
    SOFTMAX: tl.constexpr, RENORMALIZE: tl.constexpr, BLOCK_CHOSEN: tl.constexpr,
):  # fmt: skip
    """Program t: the CHOSEN largest logits of token t, the lowest expert first among equals.

    Weights are those of the softmax over all experts, which RENORMALIZE divides by their sum, or
    without SOFTMAX the logits' own sigmoids.
    """
    token = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, BLOCK)
    inside = experts < NUM_EXPERTS
    logits = tl.load(logits_ptr + token * stride + experts, mask=inside, other=0.0).to(tl.float32)
    left = tl.where(inside, logits, float("-inf"))
    places = tl.arange(0, BLOCK_CHOSEN)
    best = tl.zeros([BLOCK_CHOSEN], tl.float32)
    chosen = tl.zeros([BLOCK_CHOSEN], tl.int32)
    highest = tl.max(left, 0)
    powers = tl.exp2((left - highest) * LOG2E)
    for i in tl.static_range(CHOSEN):
        top = tl.max(left, 0)
        expert = tl.min(tl.where((left == top) & inside, experts, BLOCK), 0)
        best = tl.where(places == i, top, best)
        chosen = tl.where(places == i, expert, chosen)
        left = tl.where(experts == expert, float("-inf"), left)
    used = places < CHOSEN
    if SOFTMAX:
        weights = tl.where(used, tl.exp2((best - highest) * LOG2E), 0.0)
        if RENORMALIZE:
            weights = weights / tl.sum(weights, 0)
        else:
            weights = weights / tl.sum(powers, 0)
    else:
        weights = sigmoid(best)
    at = token * CHOSEN + places
    tl.store(experts_ptr + at, chosen.to(tl.int64), mask=used)
    tl.store(weights_ptr + at, weights, mask=used)

"""Rotation of q and k and the store of new K and V, in one launch a layer, in Triton.

A program takes a few heads of one token: of q, which it rotates into a tensor of its own, or of k
or v, which go straight to their slot. Checked in Triton's interpreter and compiled for sm_90; not
yet run on a GPU.

Legend: T tokens, H query heads, G kv heads, D head dim, E value dim.
"""

import triton
import triton.language as tl


@triton.jit
def _slot_pointer(
    base, slot, stride, segment_slots, KV_TYPE: tl.constexpr, SEGMENTED: tl.constexpr
):
    """Where a slot begins: in the plane, or in the segment that the plane's table names."""
    if SEGMENTED:
        segment = slot // segment_slots
        address = tl.multiple_of(tl.load(base + segment), 16)
        plane = tl.multiple_of(address.to(tl.pointer_type(KV_TYPE)), 16)
        return plane + (slot - segment * segment_slots) * stride
    else:
        return base + slot * stride


@triton.jit
def to_fp8(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr):
    """Bits of float32 `x` in fp8: nearest, ties to even; beyond the largest number, that; NaN.

    Conversions differ where it counts (what is too large becomes NaN, infinity or the largest;
    Triton's interpreter cuts off), so the bits are made here. `x` is first rounded by adding a
    number so large that the sum's last place is that of the result.
    """
    size = tl.abs(x)
    size = tl.where(size > LARGEST, LARGEST, size)
    # 2 to the exponent of x, at least that of the smallest normal number.
    power = (size.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    power = tl.maximum(power, 2.0 ** (1 - BIAS))
    shift = power * (1.5 * 2.0 ** (23 - MANTISSA))
    size = (size + shift) - shift
    normal = (size.to(tl.int32, bitcast=True) >> (23 - MANTISSA)) - ((127 - BIAS) << MANTISSA)
    is_tiny = size < 2.0 ** (1 - BIAS)
    tiny = tl.where(is_tiny, size * 2.0 ** (BIAS - 1 + MANTISSA), 0.0).to(tl.int32)
    bits = tl.where(is_tiny, tiny, normal)
    bits = tl.where(x == x, bits, 0x7F)
    negative = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (bits | negative).to(tl.uint8)


@triton.jit
def _stored(x, factor, X_TYPE: tl.constexpr, KV_TYPE: tl.constexpr, LARGEST: tl.constexpr):
    """Float32 numbers as the cache holds them: rounded as the model does, then to its type.

    Those of fp8 are multiplied by `factor` in between.
    """
    x = x.to(X_TYPE)
    if KV_TYPE == tl.float8e4nv:
        return to_fp8(x.to(tl.float32) * factor, 3, 7, LARGEST).to(KV_TYPE, bitcast=True)
    elif KV_TYPE == tl.float8e5:
        return to_fp8(x.to(tl.float32) * factor, 2, 15, LARGEST).to(KV_TYPE, bitcast=True)
    else:
        return x.to(KV_TYPE)


@triton.jit
def rotate_and_store_kernel(
    q_ptr, k_ptr, v_ptr, q_out_ptr, cos_ptr, sin_ptr, slots_ptr, k_plane_ptr, v_plane_ptr,
    q_stride, k_stride, v_stride, segment_slots, k_factor, v_factor,
    NUM_HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    ROTATES: tl.constexpr, INTERLEAVED: tl.constexpr, SEGMENTED: tl.constexpr,
    X_TYPE: tl.constexpr, KV_TYPE: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Program (t, i): the i-th block of heads of token t, those of k first, then v, then q.

    `cos` and `sin` float32 [T, D], the sine signed, as `RotaryEmbedding.cos_sin` gives them.
    Without ROTATES k is stored as it is and there are no programs for q.
    """
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    kv_blocks: tl.constexpr = (KV_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    heads = tl.arange(0, BLOCK_HEADS)
    pairs = tl.arange(0, BLOCK_PAIRS)
    # The two dimensions that turn together.
    if INTERLEAVED:
        first = 2 * pairs
        second = first + 1
    else:
        first = pairs
        second = pairs + HEAD_DIM // 2
    in_dim = pairs < HEAD_DIM // 2
    if (block >= kv_blocks) & (block < 2 * kv_blocks):
        v_head = (block - kv_blocks) * BLOCK_HEADS + heads
        offs_e = tl.arange(0, BLOCK_E)
        v_mask = (v_head < KV_HEADS)[:, None] & (offs_e < VALUE_DIM)[None, :]
        place = v_head[:, None] * VALUE_DIM + offs_e[None, :]
        v = tl.load(v_ptr + token * v_stride + place, mask=v_mask, other=0.0).to(tl.float32)
        v_slot = tl.load(slots_ptr + token)
        v_target = _slot_pointer(
            v_plane_ptr, v_slot, KV_HEADS * VALUE_DIM, segment_slots, KV_TYPE, SEGMENTED
        )
        tl.store(v_target + place, _stored(v, v_factor, X_TYPE, KV_TYPE, LARGEST), mask=v_mask)
    else:
        if ROTATES:
            angle = token * HEAD_DIM
            cos_1 = tl.load(cos_ptr + angle + first, mask=in_dim, other=0.0)[None, :]
            cos_2 = tl.load(cos_ptr + angle + second, mask=in_dim, other=0.0)[None, :]
            sin_1 = tl.load(sin_ptr + angle + first, mask=in_dim, other=0.0)[None, :]
            sin_2 = tl.load(sin_ptr + angle + second, mask=in_dim, other=0.0)[None, :]
        if block < kv_blocks:
            head = block * BLOCK_HEADS + heads
            mask = (head < KV_HEADS)[:, None] & in_dim[None, :]
            row = k_ptr + token * k_stride + head[:, None] * HEAD_DIM
            x_1 = tl.load(row + first[None, :], mask=mask, other=0.0).to(tl.float32)
            x_2 = tl.load(row + second[None, :], mask=mask, other=0.0).to(tl.float32)
            y_1 = x_1
            y_2 = x_2
            if ROTATES:
                y_1 = x_1 * cos_1 + x_2 * sin_1
                y_2 = x_2 * cos_2 + x_1 * sin_2
            slot = tl.load(slots_ptr + token)
            target = _slot_pointer(
                k_plane_ptr, slot, KV_HEADS * HEAD_DIM, segment_slots, KV_TYPE, SEGMENTED
            )
            target += head[:, None] * HEAD_DIM
            kept_1 = _stored(y_1, k_factor, X_TYPE, KV_TYPE, LARGEST)
            kept_2 = _stored(y_2, k_factor, X_TYPE, KV_TYPE, LARGEST)
            tl.store(target + first[None, :], kept_1, mask=mask)
            tl.store(target + second[None, :], kept_2, mask=mask)
        else:
            if ROTATES:
                head = (block - 2 * kv_blocks) * BLOCK_HEADS + heads
                mask = (head < NUM_HEADS)[:, None] & in_dim[None, :]
                row = q_ptr + token * q_stride + head[:, None] * HEAD_DIM
                x_1 = tl.load(row + first[None, :], mask=mask, other=0.0).to(tl.float32)
                x_2 = tl.load(row + second[None, :], mask=mask, other=0.0).to(tl.float32)
                y_1 = x_1 * cos_1 + x_2 * sin_1
                y_2 = x_2 * cos_2 + x_1 * sin_2
                out = q_out_ptr + (token * NUM_HEADS + head[:, None]) * HEAD_DIM
                tl.store(out + first[None, :], y_1.to(X_TYPE), mask=mask)
                tl.store(out + second[None, :], y_2.to(X_TYPE), mask=mask)

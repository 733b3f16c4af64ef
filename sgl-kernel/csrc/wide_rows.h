// K and V of a byte: a block's rows of one kv head widened to the type of q, which the kernels then read
// as if they lay in the planes so. Every number of fp8 is one of the wider types, so nothing is rounded;
// signed bytes times their scale are, to q's 16 bits.
#pragma once

#include "attention.h"
#include "numbers.h"

#if defined(__AVX512BW__)
#include <immintrin.h>
#elif defined(__AVX2__)
#include "wide_avx2.h"
#endif

namespace {

inline void widen_one(float x, float* to) { *to = x; }
inline void widen_one(float x, Bf16* to) { to->bits = static_cast<uint16_t>(to_bits(x) >> 16); }

// An E5m2 is the upper half of an Fp16; of an E4m3 all but zero is normal as an Fp16.
inline void widen(E5m2 x, Fp16* to) { to->bits = static_cast<uint16_t>(x.bits << 8); }
inline void widen(E4m3 x, Fp16* to) {
    const uint32_t bits = to_bits(to_float(x)), sign = bits >> 16 & 0x8000u;
    const uint32_t rest = bits & 0x7fffffffu, half = (rest >> 13) - 0x1c000u;
    to->bits = static_cast<uint16_t>(sign | (rest == 0 ? 0u : rest > 0x7f800000u ? 0x7e00u : half));
}
template <class N, class T>
inline void widen(N x, T* to) {
    widen_one(to_float(x), to);
}

template <class N, class T>
inline void widen_row(const N* from, int count, T* to) {
#if defined(__AVX2__) && !defined(__AVX512BW__)
    widen_fp8(from, count, to);
#else
#pragma omp simd
    for (int d = 0; d < count; ++d) widen(from[d], to + d);
#endif
}

#if defined(__AVX512BW__)
// In 16 bits: a normal one's bits move and its bias is added, the eight subnormal ones are looked up.
inline __m512i widen_lanes(E4m3, __m512i rest) {
    const __m512i small = _mm512_zextsi128_si512(
        _mm_set_epi16(0x3c60, 0x3c40, 0x3c20, 0x3c00, 0x3bc0, 0x3b80, 0x3b00, 0));
    const __m512i normal = _mm512_add_epi16(_mm512_slli_epi16(rest, 4), _mm512_set1_epi16(0x3c00));
    const __mmask32 few = _mm512_cmplt_epu16_mask(rest, _mm512_set1_epi16(8));
    const __mmask32 nan = _mm512_cmpeq_epi16_mask(rest, _mm512_set1_epi16(0x7f));
    const __m512i all = _mm512_mask_permutexvar_epi16(normal, few, rest, small);
    return _mm512_mask_mov_epi16(all, nan, _mm512_set1_epi16(0x7fc0));
}
inline __m512i widen_lanes(E5m2, __m512i rest) {
    const __m512i small =
        _mm512_zextsi128_si512(_mm_set_epi16(0, 0, 0, 0, 0x3840, 0x3800, 0x3780, 0));
    const __m512i normal = _mm512_add_epi16(_mm512_slli_epi16(rest, 5), _mm512_set1_epi16(0x3800));
    const __mmask32 few = _mm512_cmplt_epu16_mask(rest, _mm512_set1_epi16(4));
    const __mmask32 high = _mm512_cmpge_epu16_mask(rest, _mm512_set1_epi16(0x7c));
    const __m512i all = _mm512_mask_permutexvar_epi16(normal, few, rest, small);
    return _mm512_or_si512(all, _mm512_maskz_mov_epi16(high, _mm512_set1_epi16(0x7f80)));
}

template <class N>
inline void widen_row(const N* from, int count, Bf16* to) {
    int d = 0;
    for (; d + 32 <= count; d += 32) {
        const __m512i x = _mm512_cvtepu8_epi16(
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + d)));
        const __m512i sign = _mm512_slli_epi16(_mm512_and_si512(x, _mm512_set1_epi16(0x80)), 8);
        const __m512i rest = _mm512_and_si512(x, _mm512_set1_epi16(0x7f));
        _mm512_storeu_si512(to + d, _mm512_or_si512(widen_lanes(N{}, rest), sign));
    }
    for (; d < count; ++d) widen(from[d], to + d);
}
#endif

// Bytes of a head's row.
template <class N>
inline int64_t row_bytes(N, int dim) { return dim; }
inline int64_t row_bytes(Int8, int dim) { return dim + int64_t{sizeof(float)}; }

// The scale is a NaN of the usual kind, whose bits rounding leaves one, or finite.
inline void store_scaled(float x, float* to) { *to = x; }
inline void store_scaled(float x, Bf16* to) {
    const uint32_t bits = to_bits(x);
    to->bits = static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline void store_scaled(float x, Fp16* to) { store(x, to); }

template <class T>
inline void widen_codes(const Int8* from, int count, float scale, T* to) {
#pragma omp simd
    for (int d = 0; d < count; ++d)
        store_scaled(static_cast<float>(from[d].code) * scale, to + d);
}

#if defined(__AVX512BW__)
inline __m512 scaled_lanes(const Int8* from, __m512 scale) {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)), scale);
}
inline void store_lanes(__m512 x, float* to) { _mm512_storeu_ps(to, x); }
inline void store_lanes(__m512 x, Bf16* to) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
}
inline void store_lanes(__m512 x, Fp16* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(x, 0));
}
#endif

template <class T>
inline void widen_row(const Int8* from, int count, T* to) {
    float scale;
    std::memcpy(&scale, from + count, sizeof scale);
#if defined(__AVX512BW__)
    for (int d = 0; d < count; d += 16)
        store_lanes(scaled_lanes(from + d, _mm512_set1_ps(scale)), to + d);
#elif defined(__AVX2__)
    widen_signed(from, count, scale, to);
#else
    widen_codes(from, count, scale, to);
#endif
}
#if defined(__AVX512BW__)
inline void widen_row(const Int8* from, int count, Bf16* to) {
    widen_row<Bf16>(from, count, to);
}
#endif

// Rows of one plane, and requests for those of the next block, spread over the work on these.
template <class N, class T>
inline void widen_plane(const void* plane, int64_t head, int64_t slot, int dim,
                        const sgl::KeyBlock& block, const sgl::KeyBlock* next, T* to,
                        const T** rows) {
    const N* base = static_cast<const N*>(plane) + head;
    for (int n = 0; n < sgl::kKeys; ++n) {
        rows[n] = n < block.count ? to + int64_t{n} * dim : to;
        if (next && n < next->count)
            sgl::prefetch_row(base + next->slots[n] * slot, row_bytes(N{}, dim));
        if (n < block.count) widen_row(base + block.slots[n] * slot, dim, to + int64_t{n} * dim);
    }
}

template <class N, class T>
inline void widen_group(const SglAttention& call, int g, const sgl::KeyBlock& block,
                        const sgl::KeyBlock* next, T* to, const T** keys, const T** values) {
    const int dim = call.head_dim;
    widen_plane<N>(call.k, g * call.k_head, call.k_slot, dim, block, next, to, keys);
    widen_plane<N>(call.v, g * call.v_head, call.v_slot, dim, block, next,
                   to + int64_t{sgl::kKeys} * dim, values);
}

// Widens kv head g of a block into `memory` (of wide_bytes()) and points at the rows there; those
// beyond the last key repeat the first. `next` may be null.
template <class T>
inline void widen_block(const SglAttention& call, int g, const sgl::KeyBlock& block,
                        const sgl::KeyBlock* next, void* memory, const T** keys,
                        const T** values) {
    T* to = static_cast<T*>(memory);
    if (call.kv_dtype == SGL_FP8_E4M3)
        widen_group<E4m3>(call, g, block, next, to, keys, values);
    else if (call.kv_dtype == SGL_INT8)
        widen_group<Int8>(call, g, block, next, to, keys, values);
    else
        widen_group<E5m2>(call, g, block, next, to, keys, values);
}

}  // namespace

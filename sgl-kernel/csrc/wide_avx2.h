// Rows of bytes widened with AVX2: fp8 by looking up the halves of its bits, 32 numbers at a time, and
// signed bytes times their scale.
//
// A number of 16 bits is put together of two bytes, each looked up by four bits of the code. The few
// codes whose exponent is implied differ from what the others' rule gives them by a second pair of tables.
// An index above 127 finds nothing there, and adding a constant to a code makes all others such.
#pragma once

#include <immintrin.h>

#include "numbers.h"

namespace {

struct HalfBytes {
    __m256i low, high;  // of 16-bit numbers
};

inline __m256i both_lanes(__m128i x) { return _mm256_broadcastsi128_si256(x); }
inline __m256i bytes_of(int x) { return _mm256_set1_epi8(static_cast<char>(x)); }
// The bytes of x shifted to the right, and what of them `mask` leaves.
template <int kBits>
inline __m256i shift_bytes(__m256i x, int mask) {
    return _mm256_and_si256(_mm256_srli_epi16(x, kBits), bytes_of(mask));
}

// As Bf16: code << 4, plus 0x3c00.
inline HalfBytes halves_of(E4m3, Bf16, __m256i x) {
    const __m256i rest = _mm256_and_si256(x, bytes_of(0x7f));
    const __m256i few = _mm256_add_epi8(rest, bytes_of(0x70));  // 0 to 15: below 128
    const __m256i high = both_lanes(_mm_setr_epi8(
        0x3c, 0x3d, 0x3e, 0x3f, 0x40, 0x41, 0x42, 0x43, -0x44, -0x43, -0x42, -0x41, -0x40, -0x3f, -0x3e,
        -0x3d));
    const __m256i low = both_lanes(_mm_setr_epi8(0, 0x10, 0x20, 0x30, 0x40, 0x50, 0x60, 0x70, -0x80,
                                                 -0x70, -0x60, -0x50, -0x40, -0x30, -0x20, -0x10));
    // 0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60 in place of 0x3c00 to 0x3c70
    const __m256i other_high = both_lanes(_mm_setr_epi8(0x3c, 7, 7, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0));
    const __m256i other_low = both_lanes(_mm_setr_epi8(0, 0x10, -0x60, -0x10, 0x40, 0x70, 0x20, 0x10, 0,
                                                       0, 0, 0, 0, 0, 0, 0));
    const __m256i nan = _mm256_cmpeq_epi8(rest, bytes_of(0x7f));
    HalfBytes to;
    to.high = _mm256_xor_si256(_mm256_shuffle_epi8(high, shift_bytes<4>(x, 0x0f)),
                               _mm256_shuffle_epi8(other_high, few));
    to.high = _mm256_or_si256(to.high, nan);
    to.low = _mm256_xor_si256(_mm256_shuffle_epi8(low, rest), _mm256_shuffle_epi8(other_low, few));
    return to;
}

// As Bf16: code << 5, plus 0x3800.
inline HalfBytes halves_of(E5m2, Bf16, __m256i x) {
    const __m256i rest = _mm256_and_si256(x, bytes_of(0x7f));
    const __m256i few = _mm256_add_epi8(rest, bytes_of(0x7c));  // 0 to 3: 0x7c to 0x7f
    const __m256i low = both_lanes(_mm_setr_epi8(0, 0x20, 0x40, 0x60, -0x80, -0x60, -0x40, -0x20, 0, 0x20,
                                                 0x40, 0x60, -0x80, -0x60, -0x40, -0x20));
    // 0, 0x3780, 0x3800, 0x3840 in place of 0x3800, 0x3820, 0x3840, 0x3860
    const __m256i other_high =
        both_lanes(_mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x38, 0x0f, 0, 0));
    const __m256i other_low =
        both_lanes(_mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, -0x60, 0x40, 0x20));
    // infinity and NaN have an exponent of ones
    const __m256i most = _mm256_cmpgt_epi8(rest, bytes_of(0x7b));
    const __m256i sign = _mm256_and_si256(x, bytes_of(0x80));
    HalfBytes to;
    to.high = _mm256_add_epi8(shift_bytes<3>(x, 0x0f), bytes_of(0x38));
    to.high = _mm256_xor_si256(to.high, _mm256_shuffle_epi8(other_high, few));
    to.high = _mm256_or_si256(to.high, _mm256_and_si256(most, bytes_of(0x7f)));
    to.high = _mm256_or_si256(to.high, sign);
    to.low = _mm256_xor_si256(_mm256_shuffle_epi8(low, rest), _mm256_shuffle_epi8(other_low, few));
    return to;
}

// As Fp16: code << 7, plus 0x2000.
inline HalfBytes halves_of(E4m3, Fp16, __m256i x) {
    const __m256i rest = _mm256_and_si256(x, bytes_of(0x7f));
    const __m256i few = _mm256_add_epi8(rest, bytes_of(0x70));
    // 0, 0x1800, 0x1c00, 0x1e00, 0x2000, 0x2100, 0x2200, 0x2300 in place of 0x2000 to 0x2380
    const __m256i other_high = both_lanes(_mm_setr_epi8(0x20, 0x38, 0x3d, 0x3f, 2, 3, 1, 0, 0, 0, 0, 0, 0,
                                                        0, 0, 0));
    const __m256i other_low = both_lanes(
        _mm_setr_epi8(0, -0x80, 0, -0x80, 0, -0x80, 0, -0x80, 0, 0, 0, 0, 0, 0, 0, 0));
    const __m256i nan = _mm256_cmpeq_epi8(rest, bytes_of(0x7f));
    const __m256i sign = _mm256_and_si256(x, bytes_of(0x80));
    HalfBytes to;
    to.high = _mm256_add_epi8(shift_bytes<1>(x, 0x3f), bytes_of(0x20));
    to.high = _mm256_xor_si256(to.high, _mm256_shuffle_epi8(other_high, few));
    to.high = _mm256_or_si256(_mm256_or_si256(to.high, sign), nan);
    to.low = _mm256_and_si256(_mm256_slli_epi16(x, 7), bytes_of(0x80));
    to.low = _mm256_xor_si256(to.low, _mm256_shuffle_epi8(other_low, few));
    return to;
}

// An E5m2 is the upper half of an Fp16.
inline HalfBytes halves_of(E5m2, Fp16, __m256i x) { return {_mm256_setzero_si256(), x}; }

inline void store_half(__m128i x, void* to) { _mm_storeu_si128(static_cast<__m128i*>(to), x); }

// The first lanes of x and of y, of 16 bytes each, and `apart` bytes behind these the second ones.
inline void store_in_order(__m256i x, __m256i y, char* to, int64_t apart) {
    store_half(_mm256_castsi256_si128(x), to);
    store_half(_mm256_castsi256_si128(y), to + 16);
    store_half(_mm256_extracti128_si256(x, 1), to + apart);
    store_half(_mm256_extracti128_si256(y, 1), to + apart + 16);
}

template <class N, class T>
inline void widen_32(N type, __m256i x, T* to) {
    const HalfBytes half = halves_of(type, T{}, x);
    store_in_order(_mm256_unpacklo_epi8(half.low, half.high),
                   _mm256_unpackhi_epi8(half.low, half.high), reinterpret_cast<char*>(to), 32);
}
template <class N>
inline void widen_32(N type, __m256i x, float* to) {
    const HalfBytes half = halves_of(type, Bf16{}, x);
    const __m256i zero = _mm256_setzero_si256();
    const __m256i a = _mm256_unpacklo_epi8(half.low, half.high);
    const __m256i b = _mm256_unpackhi_epi8(half.low, half.high);
    char* at = reinterpret_cast<char*>(to);
    store_in_order(_mm256_unpacklo_epi16(zero, a), _mm256_unpackhi_epi16(zero, a), at, 64);
    store_in_order(_mm256_unpacklo_epi16(zero, b), _mm256_unpackhi_epi16(zero, b), at + 32, 64);
}

// A row of fp8 in 32 numbers at a time; the last 16 of an odd width stand in both lanes.
template <class N, class T>
inline void widen_fp8(const N* from, int count, T* to) {
    int d = 0;
    for (; d + 32 <= count; d += 32)
        widen_32(N{}, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + d)), to + d);
    if (d == count) return;
    T last[32];
    const auto* rest = reinterpret_cast<const __m128i*>(from + d);
    widen_32(N{}, both_lanes(_mm_loadu_si128(rest)), last);
    std::memcpy(to + d, last, 16 * sizeof(T));
}

inline void store_lanes(__m256 x, float* to) { _mm256_storeu_ps(to, x); }
inline void store_lanes(__m256 x, Bf16* to) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i up = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
    store_half(_mm_packus_epi32(_mm256_castsi256_si128(up), _mm256_extracti128_si256(up, 1)), to);
}
inline void store_lanes(__m256 x, Fp16* to) { store_half(_mm256_cvtps_ph(x, 0), to); }

// A row of signed bytes, of a multiple of 16, times their scale.
template <class T>
inline void widen_signed(const Int8* from, int count, float scale, T* to) {
    const __m256 factor = _mm256_set1_ps(scale);
    for (int d = 0; d < count; d += 8) {
        const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + d));
        store_lanes(_mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)), factor), to + d);
    }
}

}  // namespace

// Four sums at a time to outputs of any type: AVX2 and F16C.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "api.h"
#include "numbers.h"

namespace {

inline void round_four(__m128 x, float* to) { _mm_storeu_ps(to, x); }
inline void round_four(__m128 x, Fp16* to) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
// To the nearest, ties to even; NaN stays NaN.
inline void round_four(__m128 x, Bf16* to) {
    const __m128i bits = _mm_castps_si128(x);
    const __m128i odd = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
    const __m128i even = _mm_add_epi32(_mm_add_epi32(bits, _mm_set1_epi32(0x7fff)), odd);
    const __m128i quiet = _mm_or_si128(bits, _mm_set1_epi32(0x400000));
    const __m128i lost = _mm_castps_si128(_mm_cmpunord_ps(x, x));
    const __m128i upper = _mm_srli_epi32(_mm_blendv_epi8(even, quiet, lost), 16);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi32(upper, upper));
}

// Of `outs` outputs from `out` on, up to four.
template <class T>
inline __m128 four_biases(const void* bias, int64_t out, int64_t outs) {
    if (!bias) return _mm_setzero_ps();
    alignas(16) float wide[4] = {};
    for (int64_t n = 0; n < outs; ++n) wide[n] = to_float(static_cast<const T*>(bias)[out + n]);
    return _mm_load_ps(wide);
}

// Stores sums of row `row`, for up to four outputs from `out` on.
template <class T>
inline void finish_row(const SglQuantized& call, __m128 sums, __m128 bias, int64_t row, int64_t out,
                       int64_t outs) {
    const __m128 values = _mm_fmadd_ps(sums, _mm_set1_ps(call.gain), bias);
    T* to = static_cast<T*>(call.out) + row * call.out_row + out;
    if (outs == 4) {
        round_four(values, to);
        return;
    }
    T some[4];
    round_four(values, some);
    for (int64_t n = 0; n < outs; ++n) to[n] = some[n];
}

}  // namespace

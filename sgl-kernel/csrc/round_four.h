// Four floats rounded to the type of a product's answers: AVX2 and F16C.
#pragma once

#include <immintrin.h>

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

}  // namespace

// Sums of the lanes of several AVX-512 vectors at a time.
#pragma once

#include <immintrin.h>

namespace {

// In each quarter of the answer what that quarter of a, b, c and d adds up to.
inline __m512 add_quarters(__m512 a, __m512 b, __m512 c, __m512 d) {
    const __m512d ab = _mm512_castps_pd(_mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b));
    const __m512d cd = _mm512_castps_pd(_mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d));
    return _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)) +
           _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
}

// The quarters of a, of b, of c and of d added up.
inline __m512 add_four(__m512 a, __m512 b, __m512 c, __m512 d) {
    const __m512 ab = _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
    const __m512 cd = _mm512_shuffle_f32x4(c, d, 0x88) + _mm512_shuffle_f32x4(c, d, 0xdd);
    return _mm512_shuffle_f32x4(ab, cd, 0x88) + _mm512_shuffle_f32x4(ab, cd, 0xdd);
}

}  // namespace

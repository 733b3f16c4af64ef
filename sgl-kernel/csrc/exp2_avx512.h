// Powers of two of AVX-512 vectors, for weights of a softmax.
#pragma once

#include <immintrin.h>

namespace {

// 2^x for x <= 0; 0 for -inf, NaN for NaN.
inline __m512 exp2_small(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);
    const __m512 whole = _mm512_roundscale_ps(x, 8), t = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(1.3333558e-3f);
    y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(9.6181291e-3f));
    y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(5.5504109e-2f));
    y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(2.4022651e-1f));
    y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(6.9314718e-1f));
    y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, whole);
}

}  // namespace

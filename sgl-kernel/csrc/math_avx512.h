// What the blocked attention kernel needs of AVX-512 beside loads, sums and products.
#pragma once

// GCC 12 warns of its own undefined vectors where these are inlined.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "isa_avx512.h"

namespace {

struct Math {
    using F = Isa::F;
    static constexpr int kVectors = 4;  // a panel's: with six rows 24 sums, of 32 registers

    static F broadcast(const float* x) { return _mm512_set1_ps(*x); }
    static F max(F a, F b) { return _mm512_max_ps(a, b); }  // b where either is NaN
    static float highest(F x) { return _mm512_reduce_max_ps(x); }
    static bool any_above(F x, F bound) { return _mm512_cmp_ps_mask(x, bound, _CMP_GT_OQ) != 0; }
    static F round(F x) { return _mm512_roundscale_ps(x, 8); }  // to nearest
    // y * 2^whole; 0 of y = 1 and the least power.
    static constexpr float kLeastPower = -200.0f;
    static F times_power(F y, F whole) { return _mm512_scalef_ps(y, whole); }
};

}  // namespace

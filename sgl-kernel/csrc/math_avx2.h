// What the blocked attention kernel needs of AVX2 beside loads, sums and products.
#pragma once

#include "isa_avx2.h"

namespace {

struct Math {
    using F = Isa::F;
    static constexpr int kVectors = 2;  // a panel's: with six rows 12 sums, of 16 registers

    static F broadcast(const float* x) { return _mm256_broadcast_ss(x); }
    static F max(F a, F b) { return _mm256_max_ps(a, b); }  // b where either is NaN
    static float highest(F x) {
        __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        y = _mm_max_ps(y, _mm_movehl_ps(y, y));
        return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
    }
    static bool any_above(F x, F bound) {
        return _mm256_movemask_ps(_mm256_cmp_ps(x, bound, _CMP_GT_OQ)) != 0;
    }
    static F round(F x) { return _mm256_round_ps(x, 8); }  // to nearest
    // y * 2^whole; 0 of y = 1 and the least power.
    static constexpr float kLeastPower = -127.0f;
    static F times_power(F y, F whole) {
        const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23);
        return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), power));
    }
};

}  // namespace

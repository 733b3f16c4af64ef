// Vectors of AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include "numbers.h"

namespace {

struct Isa {
    static constexpr int kLanes = 8;
    using F = __m256;

    static F load(const float* x) { return _mm256_loadu_ps(x); }
    static F load(const Bf16* x) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
    static F load(const Fp16* x) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
    }
    static float sum(F x) {
        __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        y = _mm_add_ps(y, _mm_movehl_ps(y, y));
        return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
    }
};

}  // namespace

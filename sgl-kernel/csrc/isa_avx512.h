// Vectors of AVX-512 (F, BW, DQ, VL).
#pragma once

#include <immintrin.h>

#include "numbers.h"

namespace {

struct Isa {
    static constexpr int kLanes = 16;
    using F = __m512;

    static F load(const float* x) { return _mm512_loadu_ps(x); }
    static F load(const Bf16* x) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    static F load(const Fp16* x) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
    }
    static float sum(F x) { return _mm512_reduce_add_ps(x); }
};

}  // namespace

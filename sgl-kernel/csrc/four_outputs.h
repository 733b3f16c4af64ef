// Four sums at a time to outputs of any type: AVX2 and F16C.
#pragma once

#include <immintrin.h>

#include "api.h"
#include "numbers.h"
#include "round_four.h"

namespace {

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

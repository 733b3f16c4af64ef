// The products of the vector kernel for AVX2, as in vector_products.h: eight sums or twelve in registers,
// whose lanes are added up four together, and a block's scores turned into weights as vectors.
//
// Fused multiplications are called by name: of two additions to one sum in a row the compiler would make a
// product, a fused one and an addition.
#pragma once

#include <cmath>

#include "attention.h"
#include "lanes.h"
#include "numbers.h"

namespace {

using sgl::kKeys;
using sgl::kLog2e;

constexpr int kStep = Isa::kWide * Isa::kLanes;  // elements of a head that are loaded at a time
constexpr int kHeadVectors = sgl::kMaxHeadDim / Isa::kLanes;
constexpr int kLine = 64;  // bytes of a cache line

template <class T>
inline bool begins_line(int d) {
    return d * static_cast<int>(sizeof(T)) % kLine == 0;
}

// An address that the compiler knows nothing of, so that it loads what lies there anew: kept, it would
// take a register from the sums.
template <class T>
inline const T* anew(const T* x) {
    asm volatile("" : "+r"(x));
    return x;
}

// Vector kHalf of the two that Isa::load_some() gives.
template <int kHalf, class T>
inline __m256 load_half(const T* x) {
    return Isa::load(x + kHalf * Isa::kLanes);
}
template <int kHalf>
inline __m256 load_half(const Bf16* x) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    return _mm256_castsi256_ps(kHalf ? _mm256_and_si256(pairs, upper)
                                     : _mm256_slli_epi32(pairs, 16));
}

// Lane i of the result is the sum of all lanes of x[i].
inline __m128 sum_four(const __m256* x) {
    const auto pairs = [](__m256 a, __m256 b) {
        return _mm256_castps_pd(_mm256_unpacklo_ps(a, b) + _mm256_unpackhi_ps(a, b));
    };
    const __m256d ab = pairs(x[0], x[1]), cd = pairs(x[2], x[3]);
    const __m256 sums = _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)) +
                        _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd));
    return _mm256_castps256_ps128(sums) + _mm256_extractf128_ps(sums, 1);
}

template <class T, int kHalf, int kHeads, int kCount>
inline void add_dots(const __m256 (*query)[kHeadVectors], const T* const* keys, int d,
                     __m256 (&total)[kHeads][kCount]) {
    __m256 q[kHeads];
#pragma GCC unroll 4
    for (int j = 0; j < kHeads; ++j) q[j] = query[j][d / Isa::kLanes + kHalf];
#pragma GCC unroll 8
    for (int n = 0; n < kCount; ++n) {
        const __m256 x = load_half<kHalf>(anew(keys[n] + d));
#pragma GCC unroll 4
        for (int j = 0; j < kHeads; ++j) total[j][n] = _mm256_fmadd_ps(q[j], x, total[j][n]);
    }
}

// Scores of kCount keys with kHeads heads. `ahead` (null: nothing) are rows to ask memory for
// meanwhile: asked for all at once, most of the requests would be dropped.
template <class T, int kHeads, int kCount>
inline void dot_some(const __m256 (*query)[kHeadVectors], const T* const* keys,
                     const T* const* ahead, int dim, float* scores) {
    __m256 total[kHeads][kCount] = {};
    const T* rows[kCount];
    for (int n = 0; n < kCount; ++n) rows[n] = keys[n];
    for (int d = 0; d < dim; d += kStep) {
        if (ahead && begins_line<T>(d))
            for (int n = 0; n < kCount; ++n) __builtin_prefetch(ahead[n] + d, 0, 2);
        add_dots<T, 0>(query, rows, d, total);
        add_dots<T, 1>(query, rows, d, total);
    }
    if constexpr (kCount == 2) {  // of two heads together
#pragma GCC unroll 2
        for (int j = 0; j < kHeads; j += 2) {
            const __m128 sums = sum_four(total[j]);
            _mm_storel_pi(reinterpret_cast<__m64*>(scores + j * kKeys), sums);
            _mm_storeh_pi(reinterpret_cast<__m64*>(scores + (j + 1) * kKeys), sums);
        }
    } else {
#pragma GCC unroll 3
        for (int j = 0; j < kHeads; ++j)
#pragma GCC unroll 2
            for (int n = 0; n < kCount; n += 4)
                _mm_storeu_ps(scores + j * kKeys + n, sum_four(total[j] + n));
    }
}

// Whole groups of keys: scores beside [begin, end) are hidden later.
template <class T, int kHeads>
inline void dot_keys(const __m256 (*query)[kHeadVectors], const T* const* keys,
                     const T* const* ahead, int begin, int end, int dim, float* scores) {
    constexpr int kCount = kHeads == 1 ? 8 : kHeads <= 3 ? 4 : 2;  // eight sums, or twelve
    for (int n = begin / kCount * kCount; n < end; n += kCount)
        dot_some<T, kHeads, kCount>(query, keys + n, ahead ? ahead + n : ahead, dim, scores + n);
}

// Adds the weighted values of the head's elements [d, d + kSpan * kStep).
//
// A block is summed on its own first: after millions of keys, one key's share alone is lost in the
// rounding of all that came before.
template <class T, int kHeads, int kSpan>
inline void add_some(const T* const* values, const T* const* ahead, const float* weights, int begin,
                     int end, int dim, int d, float* acc) {
    __m256 total[kHeads][2 * kSpan] = {};
    for (int n = begin; n < end; ++n) {
        if (ahead)
            for (int i = 0; i < kSpan; ++i)
                if (begins_line<T>(d + i * kStep))
                    __builtin_prefetch(ahead[n] + d + i * kStep, 0, 2);
        const T* row = values[n] + d;
#pragma GCC unroll 4
        for (int i = 0; i < kSpan; ++i) {
            __m256 x[2];
            Isa::load_some(row + i * kStep, x);
            const float* own = kHeads > 1 ? anew(weights + n) : weights + n;
#pragma GCC unroll 4
            for (int j = 0; j < kHeads; ++j) {
                const __m256 weight = _mm256_broadcast_ss(own + j * kKeys);
                total[j][2 * i] = _mm256_fmadd_ps(weight, x[0], total[j][2 * i]);
                total[j][2 * i + 1] = _mm256_fmadd_ps(weight, x[1], total[j][2 * i + 1]);
            }
        }
    }
#pragma GCC unroll 4
    for (int j = 0; j < kHeads; ++j)
#pragma GCC unroll 8
        for (int i = 0; i < 2 * kSpan; ++i) {
            float* to = acc + j * dim + d + i * Isa::kLanes;
            store_cells(load_cells(to) + total[j][i], to);
        }
}

template <class T, int kHeads>
inline void add_values(const T* const* values, const T* const* ahead, const float* weights,
                       int begin, int end, int dim, float* acc) {
    constexpr int kSpan = kHeads == 1 ? 4 : kHeads <= 3 ? 2 : 1;  // eight sums, or twelve
    int d = 0;
    for (; d + kSpan * kStep <= dim; d += kSpan * kStep)
        add_some<T, kHeads, kSpan>(values, ahead, weights, begin, end, dim, d, acc);
    for (; d < dim; d += kStep)
        add_some<T, kHeads, 1>(values, ahead, weights, begin, end, dim, d, acc);
}

// Turns scores [begin, end) of a head into weights and moves its state on.
inline void weigh(const SglAttention& call, float* scores, int begin, int end, float* acc,
                  float* top, float* sum) {
    const float cap = call.logit_cap, scale = cap > 0.0f ? call.scale : call.scale * kLog2e;
    if (cap > 0.0f)
        for (int n = begin; n < end; ++n)
            scores[n] = cap * kLog2e * std::tanh(scores[n] * scale / cap);
    const __m256 factor = spread(cap > 0.0f ? 1.0f : scale);
    const int first = begin / Isa::kLanes, last = (end - 1) / Isa::kLanes + 1;
    __m256 x[kKeys / Isa::kLanes], most = spread(*top);
    for (int v = first; v < last; ++v) {
        x[v] = load_cells(scores + v * Isa::kLanes) * factor;
        const int from = begin - v * Isa::kLanes, to = end - v * Isa::kLanes;
        if (from > 0 || to < Isa::kLanes) x[v] = keep_lanes(x[v], from, to);
        most = Math::max(x[v], most);
    }
    const float highest = Math::highest(most);
    __m256 added = _mm256_setzero_ps();
    for (int v = first; v < last; ++v) {
        const __m256 weight = exp2_lanes<false>(x[v] - spread(highest));
        added = added + weight;
        store_cells(weight, scores + v * Isa::kLanes);
    }
    if (highest > *top) {
        const __m256 keep = spread(*top <= sgl::kLowest ? 0.0f : exp2_small(*top - highest));
        for (int d = 0; d < call.head_dim; d += Isa::kLanes)
            store_cells(load_cells(acc + d) * keep, acc + d);
        *sum *= _mm256_cvtss_f32(keep);
        *top = highest;
    }
    *sum += Isa::sum(added);
}

}  // namespace

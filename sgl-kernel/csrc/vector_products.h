// The products of the vector kernel in plain vectors of `Isa`, which the including file defines with `F` (a
// vector of floats), kLanes, and load_some() for float, Bf16 and Fp16, which gives kWide vectors. Keys stand
// in the lanes of scores, head elements in the lanes of products.
//
// products_avx2.h has the same functions for AVX2. Each works on keys [begin, end) of a block, for kHeads
// heads of a group; `scores` and weights are [heads, kKeys].
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention.h"
#include "numbers.h"

namespace {

using sgl::kKeys;
using sgl::kLog2e;

// Sums that grow side by side: each addition waits for the one before it in its own sum only.
constexpr int kSums = 8;
constexpr int kStep = Isa::kWide * Isa::kLanes;  // elements of a head that are loaded at a time
constexpr int kLine = 64;                        // bytes of a cache line

template <class T>
inline bool begins_line(int d) {
    return d * static_cast<int>(sizeof(T)) % kLine == 0;
}

// Scores of kCount keys with kHeads heads. `ahead` (null: nothing) are rows to ask memory for
// meanwhile: asked for all at once, most of the requests would be dropped.
template <class T, int kHeads, int kCount>
inline void dot_some(const Isa::F (*query)[sgl::kMaxHeadDim / Isa::kLanes], const T* const* keys,
                     const T* const* ahead, int dim, float* scores) {
    Isa::F total[kCount][kHeads] = {};
    for (int d = 0; d < dim; d += kStep) {
        if (ahead && begins_line<T>(d))
            for (int n = 0; n < kCount; ++n) __builtin_prefetch(ahead[n] + d, 0, 2);
        for (int n = 0; n < kCount; ++n) {
            Isa::F x[Isa::kWide];
            Isa::load_some(keys[n] + d, x);
            for (int j = 0; j < kHeads; ++j)
                for (int w = 0; w < Isa::kWide; ++w)
                    total[n][j] += query[j][d / Isa::kLanes + w] * x[w];
        }
    }
    for (int n = 0; n < kCount; ++n)
        for (int j = 0; j < kHeads; ++j) scores[j * kKeys + n] = Isa::sum(total[n][j]);
}

template <class T, int kHeads>
inline void dot_keys(const Isa::F (*query)[sgl::kMaxHeadDim / Isa::kLanes], const T* const* keys,
                     const T* const* ahead, int begin, int end, int dim, float* scores) {
    constexpr int kCount = kSums / kHeads;
    int n = begin;
    for (; n + kCount <= end; n += kCount)
        dot_some<T, kHeads, kCount>(query, keys + n, ahead ? ahead + n : ahead, dim, scores + n);
    for (; n < end; ++n)
        dot_some<T, kHeads, 1>(query, keys + n, ahead ? ahead + n : ahead, dim, scores + n);
}

// Adds the weighted values of the head's elements [d, d + kSpan * kStep).
//
// A block is summed on its own first: after millions of keys, one key's share alone is lost in the
// rounding of all that came before.
template <class T, int kHeads, int kSpan>
inline void add_some(const T* const* values, const T* const* ahead, const float* weights, int begin,
                     int end, int dim, int d, float* acc) {
    Isa::F total[kHeads][kSpan * Isa::kWide] = {};
    for (int n = begin; n < end; ++n)
        for (int i = 0; i < kSpan; ++i) {
            if (ahead && begins_line<T>(d + i * kStep)) __builtin_prefetch(ahead[n] + d + i * kStep, 0, 2);
            Isa::F x[Isa::kWide];
            Isa::load_some(values[n] + d + i * kStep, x);
            for (int j = 0; j < kHeads; ++j)
                for (int w = 0; w < Isa::kWide; ++w)
                    total[j][i * Isa::kWide + w] += weights[j * kKeys + n] * x[w];
        }
    for (int j = 0; j < kHeads; ++j)
        for (int i = 0; i < kSpan * Isa::kWide; ++i) {
            float* to = acc + j * dim + d + i * Isa::kLanes;
            Isa::F sum;
            std::memcpy(&sum, to, sizeof sum);
            sum += total[j][i];
            std::memcpy(to, &sum, sizeof sum);
        }
}

template <class T, int kHeads>
inline void add_values(const T* const* values, const T* const* ahead, const float* weights,
                       int begin, int end, int dim, float* acc) {
    constexpr int kSpan = std::max(1, kSums / kHeads / Isa::kWide);
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
    float highest = *top;
    for (int n = begin; n < end; ++n) scores[n] *= scale;
    if (cap > 0.0f)
        for (int n = begin; n < end; ++n) scores[n] = cap * kLog2e * std::tanh(scores[n] / cap);
#pragma omp simd reduction(max : highest)
    for (int n = begin; n < end; ++n) highest = std::max(highest, scores[n]);
    float added = 0.0f;
#pragma omp simd reduction(+ : added)
    for (int n = begin; n < end; ++n) {
        scores[n] = exp2_small(scores[n] - highest);
        added += scores[n];
    }
    if (highest > *top) {
        const float keep = *top <= sgl::kLowest ? 0.0f : exp2_small(*top - highest);
        for (int d = 0; d < call.head_dim; ++d) acc[d] *= keep;
        *sum *= keep;
        *top = highest;
    }
    *sum += added;
}

}  // namespace

// The vector kernel: fp32 arithmetic on K and V of any dtype, compiled once per instruction set.
//
// The including file defines `Isa` with `F` (a vector of floats), kLanes, and load_some() for float,
// Bf16 and Fp16, which gives kWide vectors; where it reorders() a type, the first has the elements of
// even index and the second those of odd index. Queries, K and V go through it alike. Keys stand in the lanes of scores, head elements in the lanes of products. K and V
// of a block are read once for all J heads of a group.
#pragma once

#include <cmath>
#include <cstring>

#include "attention.h"
#include "block_rows.h"
#include "numbers.h"

namespace {

using sgl::kKeys;
using sgl::kLog2e;
using sgl::States;
using sgl::Task;

// 2^x for x <= 0, exact to about 2 ulp: the integer part into the exponent, the rest a polynomial.
inline float exp2_small(float x) {
    x = x < -126.0f ? -126.0f : x;
    const float whole = static_cast<float>(static_cast<int32_t>(x - 0.5f));
    float y = exp2_fraction(x - whole);
    uint32_t bits;
    std::memcpy(&bits, &y, 4);
    bits += static_cast<uint32_t>(static_cast<int32_t>(whole)) << 23;
    std::memcpy(&y, &bits, 4);
    return y;
}

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
                     const T* const* ahead, int count, int dim, float* scores) {
    constexpr int kCount = kSums / kHeads;
    int n = 0;
    for (; n + kCount <= count; n += kCount)
        dot_some<T, kHeads, kCount>(query, keys + n, ahead ? ahead + n : ahead, dim, scores + n);
    for (; n < count; ++n)
        dot_some<T, kHeads, 1>(query, keys + n, ahead ? ahead + n : ahead, dim, scores + n);
}

// Adds the weighted values of the head's elements [d, d + kSpan * kStep).
//
// A block is summed on its own first: after millions of keys, one key's share alone is lost in the
// rounding of all that came before.
template <class T, int kHeads, int kSpan>
inline void add_some(const T* const* values, const T* const* ahead, const float* weights, int count,
                     int dim, int d, float* acc) {
    Isa::F total[kHeads][kSpan * Isa::kWide] = {};
    for (int n = 0; n < count; ++n)
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
                       int count, int dim, float* acc) {
    constexpr int kSpan = std::max(1, kSums / kHeads / Isa::kWide);
    int d = 0;
    for (; d + kSpan * kStep <= dim; d += kSpan * kStep)
        add_some<T, kHeads, kSpan>(values, ahead, weights, count, dim, d, acc);
    for (; d < dim; d += kStep) add_some<T, kHeads, 1>(values, ahead, weights, count, dim, d, acc);
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

template <class T>
struct VectorTask {
    const SglAttention& call;
    const Task& task;
    const States& states;
    BlockRows<T> rows;
    alignas(64) float scores[8 * kKeys];
    alignas(64) Isa::F query[8][sgl::kMaxHeadDim / Isa::kLanes];

    void run() {
        while (rows.step())
            for (int g = task.g0; g < task.g1; ++g) attend_group(g);
        if (Isa::reorders(T{}))
            for (int64_t i = 0; i < sgl::num_states(call, task); ++i)
                restore_order(states.acc + i * call.head_dim);
    }

    // From the order in which vectors are loaded to the order of the head's elements.
    void restore_order(float* acc) const {
        float ordered[kStep];
        for (int d = 0; d < call.head_dim; d += kStep) {
            for (int i = 0; i < kStep; ++i)
                ordered[Isa::kWide * (i % Isa::kLanes) + i / Isa::kLanes] = acc[d + i];
            std::memcpy(acc + d, ordered, sizeof ordered);
        }
    }

    void attend_group(int g) {
        bool asks = rows.list(g);
        const int per_group = call.heads_per_group;
        for (int m = 0; m < task.rows; ++m) {
            const int begin = rows.begin(task.position + m), end = rows.end(task.position + m);
            if (begin >= end) continue;
            const int64_t state = ((g - task.g0) * int64_t{task.rows} + m) * per_group;
            for (int j = 0; j < per_group;) {
                const int heads = per_group - j >= 4 ? 4 : per_group - j;
                const int head = g * per_group + j;
                if (heads == 4) attend<4>(m, head, state + j, begin, end, asks);
                if (heads == 3) attend<3>(m, head, state + j, begin, end, asks);
                if (heads == 2) attend<2>(m, head, state + j, begin, end, asks);
                if (heads == 1) attend<1>(m, head, state + j, begin, end, asks);
                asks = false;
                j += heads;
            }
        }
    }

    template <int kHeads>
    void attend(int m, int head, int64_t state, int begin, int end, bool asks) {
        const int dim = call.head_dim;
        const T* q = static_cast<const T*>(call.q) + (task.row + m) * call.q_row;
        for (int j = 0; j < kHeads; ++j)
            for (int d = 0; d < dim; d += kStep) {
                Isa::F x[Isa::kWide];
                Isa::load_some(q + (head + j) * call.q_head + d, x);
                std::memcpy(query[j] + d / Isa::kLanes, x, sizeof x);
            }
        dot_keys<T, kHeads>(query, rows.keys + begin, asks ? rows.next_keys + begin : nullptr,
                            end - begin, dim, scores + begin);
        float* acc = states.acc + state * dim;
        for (int j = 0; j < kHeads; ++j)
            weigh(call, scores + j * kKeys, begin, end, acc + j * dim, states.top + state + j,
                  states.sum + state + j);
        add_values<T, kHeads>(rows.values + begin, asks ? rows.next_values + begin : nullptr,
                              scores + begin, end - begin, dim, acc);
    }
};

template <class T>
void run_vector(const SglAttention& call, const Task& task, const States& states, void* wide) {
    VectorTask<T> work{call, task, states, {call, task, wide}, {}, {}};
    work.run();
}

inline void run_any(const SglAttention& call, const Task& task, const States& states, void* wide) {
    if (call.dtype == SGL_FLOAT32) run_vector<float>(call, task, states, wide);
    if (call.dtype == SGL_BFLOAT16) run_vector<Bf16>(call, task, states, wide);
    if (call.dtype == SGL_FLOAT16) run_vector<Fp16>(call, task, states, wide);
}

// Merges the parts of a task's queries and writes their rows of out and lse.
template <class T>
void finish_rows(const SglAttention& call, const Task& task, const States* parts, int num_parts) {
    const int dim = call.head_dim, per_group = call.heads_per_group;
    alignas(64) float total[sgl::kMaxHeadDim];
    int64_t state = 0;
    for (int g = task.g0; g < task.g1; ++g)
        for (int64_t row = task.row; row < task.row + task.rows; ++row)
            for (int j = 0; j < per_group; ++j, ++state) {
                const int head = g * per_group + j;
                const float sink = call.sinks ? call.sinks[head] * kLog2e : sgl::kLowest;
                float top = sink, sum = 0.0f;
                for (int i = 0; i < num_parts; ++i) top = std::max(top, parts[i].top[state]);
                if (call.sinks) sum = exp2_small(sink - top);
                for (int d = 0; d < dim; ++d) total[d] = 0.0f;
                for (int i = 0; i < num_parts; ++i) {
                    if (parts[i].top[state] <= sgl::kLowest) continue;  // it saw no key
                    const float weight = exp2_small(parts[i].top[state] - top);
                    const float* acc = parts[i].acc + state * dim;
                    sum += parts[i].sum[state] * weight;
                    for (int d = 0; d < dim; ++d) total[d] += acc[d] * weight;
                }
                T* out = static_cast<T*>(call.out) + row * call.out_row + head * call.out_head;
                const float scale = sum > 0.0f || sum != sum ? 1.0f / sum : 0.0f;
                for (int d = 0; d < dim; ++d) store(total[d] * scale, out + d);
                if (call.lse)
                    call.lse[row * call.num_kv_heads * per_group + head] =
                        top / kLog2e + std::log(sum);
            }
}

inline void finish_any(const SglAttention& call, const Task& task, const States* parts, int n) {
    if (call.dtype == SGL_FLOAT32) finish_rows<float>(call, task, parts, n);
    if (call.dtype == SGL_BFLOAT16) finish_rows<Bf16>(call, task, parts, n);
    if (call.dtype == SGL_FLOAT16) finish_rows<Fp16>(call, task, parts, n);
}

}  // namespace

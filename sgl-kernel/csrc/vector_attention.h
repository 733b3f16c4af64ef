// The vector kernel: fp32 arithmetic on K and V of any dtype, compiled once per instruction set.
//
// The including file defines `Isa` and includes one of the files of products (vector_products.h), which
// dot_keys(), weigh() and add_values() come from. Where `Isa` reorders() a type, the first of two vectors that
// are loaded has the elements of even index and the second those of odd index: queries, K and V go through
// it alike. K and V of a block are read once for all J heads of a group.
#pragma once

#include <cmath>
#include <cstring>

#include "attention.h"
#include "block_rows.h"
#include "numbers.h"

namespace {

using sgl::States;
using sgl::Task;

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
        dot_keys<T, kHeads>(query, rows.keys, asks ? rows.next_keys : nullptr, begin, end, dim,
                            scores);
        float* acc = states.acc + state * dim;
        for (int j = 0; j < kHeads; ++j)
            weigh(call, scores + j * kKeys, begin, end, acc + j * dim, states.top + state + j,
                  states.sum + state + j);
        add_values<T, kHeads>(rows.values, asks ? rows.next_values : nullptr, scores, begin, end, dim,
                              acc);
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

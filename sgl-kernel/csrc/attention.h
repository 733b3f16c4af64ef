// What the attention kernels share: tasks, key blocks and the state of a running softmax.
//
// Legend: J query heads per kv head, G kv heads, D head dim, N keys of a block. A task's states are
// rows: state (query, g, j) of a task with Q queries and kv heads [g0, g1) is number
// ((g - g0) * Q + query) * J + j.
#pragma once

#include <algorithm>
#include <cstdint>

#include "api.h"

namespace sgl {

constexpr int kKeys = 64;          // keys of a block, a common page size
constexpr int kMaxHeadDim = 576;  // rows of latent attention
constexpr float kLowest = -1e30f;  // a finite floor: exp(-inf - floor) is 0, not NaN
constexpr float kLog2e = 1.44269504088896340736f;

// Queries [row, row + rows) at positions from `position` on, against keys [lo, hi).
struct Task {
    int64_t row, position, lo, hi, table;
    int32_t rows, g0, g1;
};

// States as structure of arrays: `acc` [states, D] not normalised, `top` and `sum` of base 2.
struct States {
    float* acc;
    float* top;
    float* sum;
};

// What follows has a body, and each instruction set's file must keep its own copy of that: the
// linker would take any one of several equal ones.
namespace {

// The slots of up to kKeys positions of one table; those from `count` on repeat the first.
struct KeyBlock {
    int64_t slots[kKeys];
    int count;
    bool contiguous;

    void find(const SglAttention& call, int64_t table, int64_t lo, int64_t hi) {
        const auto* pages = reinterpret_cast<const int32_t*>(call.pages[table]);
        const int64_t size = call.page_size, base = lo - call.first_position[table];
        count = static_cast<int>(hi - lo);
        for (int i = 0; i < count;) {
            const int64_t page = (base + i) / size, offset = (base + i) % size;
            const int n = static_cast<int>(std::min<int64_t>(count - i, size - offset));
            const int64_t first = pages[page] * size + offset;
            for (int j = 0; j < n; ++j) slots[i + j] = first + j;
            i += n;
        }
        for (int i = count; i < kKeys; ++i) slots[i] = slots[0];
        contiguous = true;
        for (int i = 1; i < count; ++i) contiguous &= slots[i] == slots[0] + i;
    }
};

// Asks for the lines of one head's row. Blocks are asked for one ahead of their use: a block's
// products would else wait for its own memory.
inline void prefetch_row(const void* row, int64_t bytes) {
    const char* line = static_cast<const char*>(row);
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(line + at, 0, 2);
}

// Bytes of a block's rows of one kv head, K and V, in floats; 0 where they are read in their planes.
inline int64_t wide_bytes(const SglAttention& call) {
    const bool is_byte = call.kv_dtype >= SGL_FP8_E4M3 && call.kv_dtype <= SGL_INT8;
    return is_byte ? 2 * int64_t{kKeys} * call.head_dim * 4 : 0;
}

inline int64_t num_states(const SglAttention& call, const Task& task) {
    return int64_t{task.rows} * (task.g1 - task.g0) * call.heads_per_group;
}

// First position that the query at `position` sees.
inline int64_t first_seen(const SglAttention& call, int64_t position) {
    if (call.chunk) return position - position % call.chunk;
    return call.window ? std::max<int64_t>(0, position - call.window + 1) : 0;
}

// Memory of the blocked kernel (see blocked_attention.h), for M states of one kv head.
struct BlockedScratch {
    static constexpr int kMostLanes = 16;
    float* queries;  // [M, cells of a head]
    float* keys;     // [panels, cells of a head, lanes of a panel]
    float* values;   // [panels, cells of keys, lanes of a panel], the last as narrow as it is
    float* weights;  // [M, cells of keys]
    float* sums;     // [M, lanes]
    float* missing;  // [D] zeros, in place of rows beyond the last key

    // Lays out at `base` and returns the size; a null base only measures.
    int64_t lay_out(int64_t states, int64_t dim, char* base) {
        int64_t at = 0;
        const auto take = [&](int64_t cells) {
            auto* place = reinterpret_cast<float*>(base + at);
            at += (cells * 4 + 63) / 64 * 64;
            return place;
        };
        queries = take(states * dim);
        keys = take(kKeys * dim);
        values = take(kKeys * dim);
        weights = take(states * kKeys);
        sums = take(states * kMostLanes);
        missing = take(dim);
        return at;
    }
};

// Where a block that begins at `lo` ends: at a multiple of kKeys, so that pages are read whole.
inline int64_t block_end(int64_t lo, int64_t hi) { return std::min(hi, lo - lo % kKeys + kKeys); }

}  // namespace

// Attends one task. `states` are the task's own, from 0 on; `scratch` are the thread's own bytes,
// as many as the kernel wants after the wide_bytes() of the call, 64-byte aligned.
using RunTask = void (*)(const SglAttention&, const Task&, const States&, void* scratch);

// Merges the parts of a task's queries (each with the task's states) into out and lse.
using FinishTask = void (*)(const SglAttention&, const Task&, const States* parts, int count);

void run_task_generic(const SglAttention&, const Task&, const States&, void*);
void run_task_avx2(const SglAttention&, const Task&, const States&, void*);
void run_task_avx512(const SglAttention&, const Task&, const States&, void*);
// Tasks of one query or a few in bf16 heads of a multiple of 32.
void run_decode_dots(const SglAttention&, const Task&, const States&, void*);
void run_task_amx(const SglAttention&, const Task&, const States&, void*);
void run_blocked_avx2(const SglAttention&, const Task&, const States&, void*);
void run_blocked_avx512(const SglAttention&, const Task&, const States&, void*);
void run_blocked_dots(const SglAttention&, const Task&, const States&, void*);
void finish_generic(const SglAttention&, const Task&, const States*, int);
void finish_avx2(const SglAttention&, const Task&, const States*, int);
void finish_avx512(const SglAttention&, const Task&, const States*, int);

// Of the AMX kernel, for tasks of up to `states` states in `groups` kv heads.
int64_t amx_scratch_bytes(const SglAttention& call, int64_t max_queries, int64_t groups);
void amx_begin();  // on every thread before its first task
void amx_end();

}  // namespace sgl

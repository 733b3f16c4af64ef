// Cuts an attention call into tasks, runs them on threads and merges what was split over keys.
//
// A decoding query, or a few of a request, is one task over all kv heads, so that K and V are read once
// and in order; a block of more queries becomes tiles, each kv head of a tile a task. The two have
// kernels of their own. When that makes too few tasks for the threads, keys are split, and the parts
// merge in fp32 at the end. Keys are split in any case after some ten thousands, since a longer running sum loses what comes
// late: a decoding query's into parts as well, a tile's within its task, whose states begin anew and are
// added to those of the keys before.
//
// Served: head_dim a multiple of 16 up to kMaxHeadDim, float32, bfloat16 and float16, K and V of the
// same type or of a byte, whose blocks are widened as they are read (wide_rows.h).
#include "attention.h"

#include <cmath>
#include <numeric>
#include <vector>

#include "parallel.h"
#include "scratch.h"

namespace sgl {
namespace {

constexpr int64_t kTileQueries = 64;
constexpr int64_t kTileStates = 384;  // what was packed serves all of them
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kMinDecodeKeys = 256;   // fewer keys are not worth a merge
constexpr int64_t kMinExtendKeys = 2048;
constexpr int64_t kMostDecodeKeys = 1 << 16;  // of a part
constexpr int64_t kMostKeys = 1 << 13;        // of a tile's running sum

// Tasks [first, first + count) share their queries and heads; `state` numbers their first state
// among the partials of all split groups.
struct Group {
    int64_t first, count, state;
};

// Kept by its thread and made anew for each call: vectors that were as long before allocate nothing.
struct Plan {
    std::vector<Task> tiles;  // before keys are split
    std::vector<Task> tasks;
    std::vector<Group> groups;
    std::vector<int64_t> group_of;
    int64_t num_states = 0;   // of split groups, over all their tasks
    bool begins_anew = false;  // whether a task has too many keys for one sum
    int64_t most_states = 0;  // of one task
    int64_t most_queries = 0, most_heads = 0;

    void clear() {
        tiles.clear();
        tasks.clear();
        groups.clear();
        group_of.clear();
        num_states = most_states = most_queries = most_heads = 0;
        begins_anew = false;
    }
};

struct Kernel {
    RunTask run_few, run_many;  // tasks of up to `few` queries, and of more
    FinishTask finish;
    enum { kPlain, kBlocked, kTiles } many;
    int64_t few = 1;  // queries

    bool is_few(const Task& task) const { return task.rows <= few; }
};

// Queries up to which reading K and V as they lie is faster than packing them: what is read by the first
// serves the others from the cache, and memory is asked for ahead. With heads_per_group times as many
// states packing pays. Widened rows are asked for ahead in either kernel, and packed from two queries on.
int64_t few_queries(const SglAttention& call, int64_t states) {
    return wide_bytes(call) ? 1 : std::max<int64_t>(1, states / call.heads_per_group);
}

// Whether beside AMX's tiles the dot products serve a single query faster: they read K and V where they
// lie, but their work grows with the heads of a group, and tiles of 16 rows take up to 16 alike.
bool takes_dots(const SglAttention& call) {
    return call.heads_per_group <= (call.head_dim < 128 ? 6 : 8);
}

Kernel choose_kernel(const SglAttention& call) {
#if defined(__x86_64__)
    const bool pairs = call.dtype == SGL_BFLOAT16 && call.head_dim % 32 == 0;
    if (call.isa == SGL_AMX && pairs)
        return {takes_dots(call) ? run_decode_dots : run_task_amx, run_task_amx, finish_avx512,
                Kernel::kTiles};
    if (call.isa >= SGL_AVX512_BF16 && call.isa != SGL_NEON && pairs)
        return {run_decode_dots, run_blocked_dots, finish_avx512, Kernel::kBlocked,
                few_queries(call, 12)};
    if (call.isa >= SGL_AVX512 && call.isa != SGL_NEON)
        return {run_task_avx512, run_blocked_avx512, finish_avx512, Kernel::kBlocked,
                few_queries(call, 16)};
    if (call.isa == SGL_AVX2)
        return {run_task_avx2, run_blocked_avx2, finish_avx2, Kernel::kBlocked,
                few_queries(call, 24)};
#endif
    return {run_task_generic, run_task_generic, finish_generic, Kernel::kPlain};
}

// Queries whose states a kernel takes at once, or some whole number of times.
int64_t rows_at_once(const SglAttention& call, const Kernel& kernel) {
    return kernel.many == Kernel::kTiles ? 32 / std::gcd(32, call.heads_per_group) : 6;
}

// Queries that a tile should have: many, yet in enough tiles to give each thread some.
int64_t tile_queries(const SglAttention& call, const Kernel& kernel) {
    if (kernel.many == Kernel::kPlain) return kTileQueries;
    int64_t rows = 0;
    for (int64_t b = 0; b < call.num_blocks; ++b) rows += call.block_rows[b];
    const int64_t fair = rows * call.num_kv_heads / (kTasksPerThread * call.num_threads);
    const int64_t most =
        std::max(rows_at_once(call, kernel), kTileStates / call.heads_per_group);
    const int64_t least = std::min(kTileQueries, most);
    return std::clamp(fair, least, most);
}

// Rows of a block's tiles, about as many as wanted and with no small rest.
int64_t even_rows(int64_t rows, int64_t wanted, int64_t at_once) {
    const int64_t tiles = std::max<int64_t>(1, (rows + wanted / 2) / wanted);
    return ((rows + tiles - 1) / tiles + at_once - 1) / at_once * at_once;
}

// Every block's queries in tiles, those of a kv head one after the other: what the first reads of K and
// V lies in the cache for the others.
void make_tiles(const SglAttention& call, const Kernel& kernel, std::vector<Task>& tiles) {
    const int64_t wanted = tile_queries(call, kernel), at_once = rows_at_once(call, kernel);
    for (int64_t b = 0; b < call.num_blocks; ++b) {
        const int64_t rows = call.block_rows[b];
        const int64_t tile_rows =
            kernel.many == Kernel::kPlain ? wanted : even_rows(rows, wanted, at_once);
        for (int32_t g = 0; g < call.num_kv_heads; ++g)
            for (int64_t at = 0; at < rows; at += tile_rows) {
                const int64_t count = std::min(tile_rows, rows - at);
                const int64_t position = call.block_position[b] + at;
                Task tile{call.block_row[b] + at, position, first_seen(call, position),
                          position + count, call.block_table[b], static_cast<int32_t>(count), g,
                          g + 1};
                if (kernel.is_few(tile)) {
                    if (g > 0) continue;
                    tile.g1 = call.num_kv_heads;
                }
                tiles.push_back(tile);
            }
    }
}

void make_plan(const SglAttention& call, const Kernel& kernel, Plan& plan) {
    plan.clear();
    make_tiles(call, kernel, plan.tiles);
    int64_t decode_keys = 0, extend_keys = 0;
    for (const Task& tile : plan.tiles)
        (kernel.is_few(tile) ? decode_keys : extend_keys) += tile.hi - tile.lo;
    const int64_t wanted = kTasksPerThread * call.num_threads;
    const bool alone = call.num_threads == 1;
    const auto part_of = [&](int64_t keys, int64_t least) {
        return std::max(least, (keys / wanted + kKeys - 1) / kKeys * kKeys);
    };
    const int64_t decode_part =
        alone ? kMostDecodeKeys
              : std::min(kMostDecodeKeys, part_of(decode_keys, kMinDecodeKeys));
    const int64_t extend_part =
        alone ? std::max<int64_t>(1, extend_keys) : part_of(extend_keys, kMinExtendKeys);
    for (const Task& tile : plan.tiles) {
        const int64_t keys = tile.hi - tile.lo;
        const int64_t part = kernel.is_few(tile) ? decode_part : extend_part;
        const int64_t parts = (keys + part - 1) / part, states = num_states(call, tile);
        const int64_t number = static_cast<int64_t>(plan.groups.size());
        plan.groups.push_back({static_cast<int64_t>(plan.tasks.size()), parts, plan.num_states});
        for (int64_t i = 0; i < parts; ++i) {
            Task task = tile;
            if (parts > 1) {
                task.lo = tile.lo + i * part;
                task.hi = std::min(tile.hi, task.lo + part);
            }
            plan.tasks.push_back(task);
            plan.begins_anew |= !kernel.is_few(task) && task.hi - task.lo > kMostKeys;
            plan.group_of.push_back(number);
        }
        if (parts > 1) plan.num_states += parts * states;
        plan.most_states = std::max(plan.most_states, states);
        plan.most_queries = std::max<int64_t>(plan.most_queries, tile.rows);
        plan.most_heads = std::max<int64_t>(plan.most_heads, tile.g1 - tile.g0);
    }
}

int64_t state_bytes(const SglAttention& call, int64_t states) {
    return states * (call.head_dim + 2) * int64_t{sizeof(float)};
}

// States [first, first + ...) within memory for `total` of them.
States states_at(const SglAttention& call, void* memory, int64_t total, int64_t first) {
    auto* floats = static_cast<float*>(memory);
    float* top = floats + total * call.head_dim;
    return {floats + first * call.head_dim, top + first, top + total + first};
}

void clear(const SglAttention& call, const States& states, int64_t count) {
    std::fill_n(states.acc, count * call.head_dim, 0.0f);
    std::fill_n(states.top, count, kLowest);
    std::fill_n(states.sum, count, 0.0f);
}

// Adds states of some keys to those of others, both as kernels leave them.
void add_states(const SglAttention& call, const States& more, int64_t count, const States& to) {
    for (int64_t i = 0; i < count; ++i) {
        if (more.top[i] <= kLowest) continue;  // it saw no key
        const float top = std::max(to.top[i], more.top[i]);
        const float keep = std::exp2(to.top[i] - top), weight = std::exp2(more.top[i] - top);
        float* acc = to.acc + i * call.head_dim;
        const float* added = more.acc + i * call.head_dim;
        for (int d = 0; d < call.head_dim; ++d) acc[d] = acc[d] * keep + added[d] * weight;
        to.sum[i] = to.sum[i] * keep + more.sum[i] * weight;
        to.top[i] = top;
    }
}

// Of the kernel, on each thread.
int64_t kernel_bytes(const SglAttention& call, const Plan& plan, const Kernel& kernel) {
#if defined(__x86_64__)
    if (kernel.many == Kernel::kTiles)
        return wide_bytes(call) + amx_scratch_bytes(call, plan.most_queries, plan.most_heads);
    if (kernel.many == Kernel::kBlocked) {
        const int64_t states = plan.most_queries * call.heads_per_group;
        return wide_bytes(call) + BlockedScratch().lay_out(states, call.head_dim, nullptr);
    }
#endif
    return wide_bytes(call);
}

// What one thread needs: a direct task's states, those of its present keys where it has too many for one
// sum, and the kernel's scratch.
struct Worker {
    const SglAttention& call;
    const Plan& plan;
    const Kernel& kernel;
    void *partials, *own, *present, *scratch;

    Worker(const SglAttention& c, const Plan& p, const Kernel& k, void* all)
        : call(c), plan(p), kernel(k), partials(all) {
        thread_local Scratch for_own, for_present, for_kernel;
        own = for_own.take(state_bytes(c, p.most_states));
        present = for_present.take(p.begins_anew ? state_bytes(c, p.most_states) : 0);
        scratch = for_kernel.take(kernel_bytes(c, p, k));
#if defined(__x86_64__)
        if (kernel.many == Kernel::kTiles) amx_begin();
#endif
    }
    Worker(Worker&&) = delete;
    ~Worker() {
#if defined(__x86_64__)
        if (kernel.many == Kernel::kTiles) amx_end();
#endif
    }

    void operator()(int64_t index) {
        const Task& task = plan.tasks[index];
        const Group& group = plan.groups[plan.group_of[index]];
        const int64_t count = num_states(call, task);
        const bool direct = group.count == 1;
        const int64_t first = group.state + (index - group.first) * count;
        const States states = direct ? states_at(call, own, plan.most_states, 0)
                                     : states_at(call, partials, plan.num_states, first);
        clear(call, states, count);
        attend(task, states, count);
        if (direct) kernel.finish(call, task, &states, 1);
    }

    void attend(const Task& task, const States& states, int64_t count) const {
        if (kernel.is_few(task)) return kernel.run_few(call, task, states, scratch);
        if (task.hi - task.lo <= kMostKeys)
            return kernel.run_many(call, task, states, scratch);
        const States some = states_at(call, present, plan.most_states, 0);
        Task part = task;
        for (part.hi = task.lo; part.hi < task.hi;) {
            part.lo = part.hi;
            part.hi = std::min(task.hi, part.lo - part.lo % kKeys + kMostKeys);
            clear(call, some, count);
            kernel.run_many(call, part, some, scratch);
            add_states(call, some, count, states);
        }
    }
};

void merge(const SglAttention& call, const Plan& plan, const Kernel& kernel, void* partials,
           const Group& group) {
    const Task& task = plan.tasks[group.first];
    thread_local std::vector<States> parts;
    parts.clear();
    for (int64_t i = 0; i < group.count; ++i)
        parts.push_back(states_at(call, partials, plan.num_states,
                                  group.state + i * num_states(call, task)));
    kernel.finish(call, task, parts.data(), static_cast<int>(group.count));
}

}  // namespace
}  // namespace sgl

extern "C" int32_t sgl_attention(const SglAttention* arguments) {
    using namespace sgl;
    const SglAttention& call = *arguments;
    if (call.head_dim % 16 || call.head_dim < 16 || call.head_dim > kMaxHeadDim) return -1;
    if (call.dtype < SGL_FLOAT32 || call.dtype > SGL_FLOAT16 || call.num_threads < 1) return -1;
    if (call.kv_dtype != call.dtype && !wide_bytes(call)) return -1;
    const Kernel kernel = choose_kernel(call);
    thread_local Plan plan;
    thread_local Scratch for_partials;
    make_plan(call, kernel, plan);
    const Plan& made = plan;  // a thread_local named by another thread would be that thread's own
    char* const partials = for_partials.take(state_bytes(call, plan.num_states));
    for_each_index(static_cast<int64_t>(made.tasks.size()), call.num_threads,
                   [&] { return Worker(call, made, kernel, partials); });
    if (made.num_states == 0) return 0;
    for_each_index(static_cast<int64_t>(made.groups.size()), call.num_threads, [&] {
        return [&](int64_t g) {
            if (made.groups[g].count > 1) merge(call, made, kernel, partials, made.groups[g]);
        };
    });
    return 0;
}

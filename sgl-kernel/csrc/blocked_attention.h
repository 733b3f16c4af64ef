// Attention of many states at once, for prompts: blocks of keys and of values are packed once for
// all states of a task, and products run over six states and a panel of vectors held in registers.
//
// The including file defines `Isa` and `Math`. Numbers are packed in cells of 4 bytes, as `Cells`
// says: one float, or a pair of bf16 that are neighbours along the sum, which are head elements of
// q and K and keys of weights and V. Scores have keys in their lanes, results the head's elements.
//
// Legend: as in attention.h; M states of a task's one kv head, C cells of a head.
#pragma once

#include <cmath>
#include <cstring>

#include "attention.h"
#include "lanes.h"
#include "numbers.h"
#include "wide_rows.h"

namespace {

constexpr int kRows = 6;  // states in registers at a time
constexpr int kPanel = Math::kVectors * Isa::kLanes;
constexpr int kScoreVectors = sgl::kKeys / Isa::kLanes;
static_assert(sgl::kKeys % kPanel == 0, "a block of keys is whole panels");

// Cells of one float, of numbers of any type.
template <class T>
struct FloatCells {
    using Number = T;
    static constexpr int kPer = 1;
    static constexpr bool kShort = false;  // whether weights lose their last bits anyway

    static Isa::F head(const T* x) { return Isa::load(x); }
    static void values(const T* const* rows, int d, Isa::F* out) {
        out[0] = Isa::load(rows[0] + d);
    }
    static Isa::F weights(const Isa::F* x) { return x[0]; }
    static float weight(const float* cells, int n) { return cells[n]; }  // of key n
    static Isa::F add_product(Isa::F sum, Isa::F a, Isa::F b) { return sum + a * b; }
};

// cap * tanh(x / cap)
inline Isa::F soften(Isa::F x, float cap) {
    const Int32s sign = reinterpret_cast<Int32s>(x) & INT32_MIN;
    const Isa::F size = reinterpret_cast<Isa::F>(reinterpret_cast<Int32s>(x) & INT32_MAX);
    const Isa::F e = exp2_lanes<false>(size * spread(-2.0f * sgl::kLog2e / cap));
    const Isa::F tanh = (spread(1.0f) - e) / (spread(1.0f) + e);
    return spread(cap) * reinterpret_cast<Isa::F>(reinterpret_cast<Int32s>(tanh) | sign);
}

// Swaps ever larger squares about the diagonal.
inline void transpose(Isa::F (&rows)[Isa::kLanes]) {
    Int32s low, high;
#pragma GCC unroll 4
    for (int step = 1; step < Isa::kLanes; step *= 2) {
        for (int l = 0; l < Isa::kLanes; ++l) {
            low[l] = l & step ? Isa::kLanes + l - step : l;
            high[l] = l & step ? Isa::kLanes + l : l + step;
        }
#pragma GCC unroll 16
        for (int i = 0; i < Isa::kLanes; ++i) {
            if (i & step) continue;
            const Isa::F a = rows[i], b = rows[i + step];
            rows[i] = __builtin_shuffle(a, b, low);
            rows[i + step] = __builtin_shuffle(a, b, high);
        }
    }
}

// sums[r] += the sum over c of cell c of row r, in all lanes, times row c of a panel.
template <class Cells, int kCount, int kVectors>
inline void add_products(const float* rows, int64_t row, const float* panel, int64_t begin,
                         int64_t end, Isa::F (&sums)[kCount][kVectors]) {
    for (int64_t c = begin; c < end; ++c) {
        Isa::F x[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v)
            x[v] = load_cells(panel + (c * kVectors + v) * Isa::kLanes);
#pragma GCC unroll 6
        for (int r = 0; r < kCount; ++r) {
            const Isa::F cell = Math::broadcast(rows + r * row + c);
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v)
                sums[r][v] = Cells::add_product(sums[r][v], cell, x[v]);
        }
    }
}

template <class Cells>
class BlockedTask {
  public:
    BlockedTask(const SglAttention& call, const sgl::Task& task, const sgl::States& states,
                void* memory)
        : call_(call), task_(task), states_(states), dim_(call.head_dim),
          cells_(call.head_dim / Cells::kPer), per_group_(call.heads_per_group),
          count_(sgl::num_states(call, task)),
          rewrites_(call.logit_cap > 0.0f || call.scale <= 0.0f),
          scale_(rewrites_ ? 1.0f : call.scale * sgl::kLog2e), wide_(memory) {
        s_.lay_out(count_, dim_, static_cast<char*>(memory) + sgl::wide_bytes(call));
    }

    void run() {
        std::memset(s_.sums, 0, static_cast<size_t>(count_) * sizeof(Isa::F));
        std::memset(s_.missing, 0, static_cast<size_t>(dim_) * 4);
        pack_queries();
        find(task_.lo);
        for (lo_ = task_.lo; lo_ < task_.hi; lo_ += block_.count) {
            block_ = next_;
            find(lo_ + block_.count);
            list_rows();
            pack_keys();
            pack_values();
            all_ = false;
            all_ = see(0, static_cast<int>(count_)).all;
            one_by_one_ = !all_ && !has_finite_values();
            for (int64_t m = 0; m < count_; m += kRows) score(m);
            for (int d = 0; d < dim_; d += kPanel)
                for (int64_t m = 0; m < count_; m += kRows) add(m, d);
        }
        for (int64_t m = 0; m < count_; ++m)
            states_.sum[m] = Isa::sum(load_cells(s_.sums + m * Isa::kLanes));
    }

  private:
    using T = typename Cells::Number;
    static constexpr int kPer = Cells::kPer;
    static constexpr int kKeyCells = sgl::kKeys / kPer;

    const SglAttention& call_;
    const sgl::Task& task_;
    const sgl::States& states_;
    const int dim_, cells_, per_group_;
    const int64_t count_;
    const bool rewrites_;  // scores, before they are multiplied with scale_
    const float scale_;
    void* wide_;  // memory of widened rows, where planes are of fp8
    sgl::BlockedScratch s_;
    sgl::KeyBlock block_, next_;  // the next one's rows are asked for where they are widened
    int64_t lo_ = 0;
    bool all_ = false;         // whether every state sees the whole block
    bool one_by_one_ = false;  // whether values that some states don't see may not be multiplied by 0
    const T* keys_[sgl::kKeys];
    const T* values_[sgl::kKeys];

    void find(int64_t lo) {
        next_.count = 0;
        if (lo < task_.hi) next_.find(call_, task_.table, lo, sgl::block_end(lo, task_.hi));
    }

    void list_rows() {
        const T* k = static_cast<const T*>(call_.k) + task_.g0 * call_.k_head;
        const T* v = static_cast<const T*>(call_.v) + task_.g0 * call_.v_head;
        const bool is_byte = sgl::wide_bytes(call_) != 0;
        if (is_byte) widen_block<T>(call_, task_.g0, block_, &next_, wide_, keys_, values_);
        for (int n = 0; !is_byte && n < block_.count; ++n) {
            keys_[n] = k + block_.slots[n] * call_.k_slot;
            values_[n] = v + block_.slots[n] * call_.v_slot;
        }
        for (int n = block_.count; n < sgl::kKeys; ++n)
            keys_[n] = values_[n] = reinterpret_cast<const T*>(s_.missing);
    }

    void pack_queries() {
        const T* q = static_cast<const T*>(call_.q) + task_.g0 * per_group_ * call_.q_head;
        for (int64_t m = 0; m < count_; ++m) {
            const int64_t row = task_.row + m / per_group_, j = m % per_group_;
            const T* from = q + row * call_.q_row + j * call_.q_head;
            float* to = s_.queries + m * cells_;
            for (int c = 0; c < cells_; c += Isa::kLanes)
                store_cells(Cells::head(from + c * kPer), to + c);
        }
    }

    void pack_keys() {
        for (int n = 0; n < block_.count; n += Isa::kLanes) {
            float* to = s_.keys + int64_t{n / kPanel} * kPanel * cells_ + n % kPanel;
            for (int c = 0; c < cells_; c += Isa::kLanes) {
                Isa::F rows[Isa::kLanes];
                for (int i = 0; i < Isa::kLanes; ++i)
                    rows[i] = Cells::head(keys_[n + i] + c * kPer);
                transpose(rows);
                for (int i = 0; i < Isa::kLanes; ++i)
                    store_cells(rows[i], to + int64_t{c + i} * kPanel);
            }
        }
    }

    void pack_values() {
        for (int n = 0; n < block_.count; n += kPer)
            for (int d = 0; d < dim_; d += kPer * Isa::kLanes) {
                Isa::F parts[kPer];
                Cells::values(values_ + n, d, parts);
                for (int i = 0; i < kPer; ++i) {
                    const int at = d + i * Isa::kLanes, first = at / kPanel * kPanel;
                    const int width = std::min(kPanel, dim_ - first);
                    store_cells(parts[i],
                                s_.values + first * kKeyCells + n / kPer * width + at - first);
                }
            }
    }

    // A NaN or an infinity times 0 is NaN, and times 0 and added up it stays.
    bool has_finite_values() const {
        Isa::F nothing = {};
        for (int n = 0; n < block_.count; ++n)
            for (int d = 0; d < dim_; d += Isa::kLanes)
                nothing = nothing + Isa::load(values_[n] + d) * spread(0.0f);
        return Isa::sum(nothing) == 0.0f;
    }

    // Keys [begin, end) of the block that some of the states [m, m + rows) see; `all` of them see
    // the whole block.
    struct Sight {
        int begin, end;
        bool all;
    };

    int clip(int64_t n) const { return static_cast<int>(std::clamp<int64_t>(n, 0, block_.count)); }
    int64_t position(int64_t m) const { return task_.position + m / per_group_; }
    int begin_of(int64_t m) const { return clip(sgl::first_seen(call_, position(m)) - lo_); }
    int end_of(int64_t m) const { return clip(position(m) + 1 - lo_); }

    Sight see(int64_t m, int rows) const {
        if (all_) return {0, sgl::kKeys, true};
        const int64_t last = m + rows - 1;
        const bool all = begin_of(last) == 0 && end_of(m) == sgl::kKeys;
        return {begin_of(m), end_of(last), all};
    }

    void score(int64_t m) {
        switch (std::min<int64_t>(kRows, count_ - m)) {
            case 1: return score_rows<1>(m);
            case 2: return score_rows<2>(m);
            case 3: return score_rows<3>(m);
            case 4: return score_rows<4>(m);
            case 5: return score_rows<5>(m);
            default: return score_rows<kRows>(m);
        }
    }

    template <int kCount>
    void score_rows(int64_t m) {
        const Sight sight = see(m, kCount);
        if (sight.begin >= sight.end) return;
        Isa::F scores[kCount][kScoreVectors];
        const int first = sight.begin / kPanel, last = (sight.end - 1) / kPanel + 1;
        for (int p = first; p < last; ++p) {
            Isa::F sums[kCount][Math::kVectors] = {};
            add_products<Cells>(s_.queries + m * cells_, cells_,
                                s_.keys + int64_t{p} * kPanel * cells_, 0, cells_, sums);
#pragma GCC unroll 6
            for (int r = 0; r < kCount; ++r)
#pragma GCC unroll 4
                for (int v = 0; v < Math::kVectors; ++v)
                    scores[r][p * Math::kVectors + v] = sums[r][v];
        }
        for (int r = 0; r < kCount; ++r) {
            if (rewrites_) rewrite(scores[r], first * Math::kVectors, last * Math::kVectors);
            if (!sight.all) hide(scores[r], m + r, first * Math::kVectors, last * Math::kVectors);
            weigh(scores[r], m + r, first * Math::kVectors, last * Math::kVectors);
        }
    }

    void rewrite(Isa::F* scores, int first, int last) const {
        for (int v = first; v < last; ++v) {
            const Isa::F x = scores[v] * spread(call_.scale);
            const float cap = call_.logit_cap;
            scores[v] = (cap > 0.0f ? soften(x, cap) : x) * spread(sgl::kLog2e);
        }
    }

    void hide(Isa::F* scores, int64_t m, int first, int last) const {
        const int begin = begin_of(m), end = end_of(m);
        for (int v = first; v < last; ++v)
            scores[v] = keep_lanes(scores[v], begin - v * Isa::kLanes, end - v * Isa::kLanes);
    }

    // Turns a state's scores into weights, and moves the state on.
    void weigh(const Isa::F* scores, int64_t m, int first, int last) {
        const Isa::F scale = spread(scale_);
        Isa::F most = scores[first];
        for (int v = first + 1; v < last; ++v) most = Math::max(scores[v], most);
        most = most * scale;
        if (Math::any_above(most, spread(states_.top[m]))) raise(m, Math::highest(most));
        const Isa::F top = spread(states_.top[m]);
        float* sums = s_.sums + m * Isa::kLanes;
        Isa::F total = load_cells(sums);
        for (int v = first; v < last; v += kPer) {
            Isa::F x[kPer];
            for (int i = 0; i < kPer; ++i) {
                x[i] = exp2_lanes<Cells::kShort>(scores[v + i] * scale - top);
                total = total + x[i];
            }
            store_cells(Cells::weights(x), s_.weights + m * kKeyCells + v / kPer * Isa::kLanes);
        }
        store_cells(total, sums);
    }

    // Few blocks do: what is new rarely passes the highest of all that came before.
    __attribute__((noinline)) void raise(int64_t m, float top) {
        const Isa::F keep = exp2_lanes<false>(spread(states_.top[m] - top));
        float* sums = s_.sums + m * Isa::kLanes;
        store_cells(load_cells(sums) * keep, sums);
        for (float *x = states_.acc + m * dim_, *last = x + dim_; x < last; x += Isa::kLanes)
            store_cells(load_cells(x) * keep, x);
        states_.top[m] = top;
    }

    void add(int64_t m, int d) {
        const int vectors = std::min(kPanel, dim_ - d) / Isa::kLanes;
        switch (std::min<int64_t>(kRows, count_ - m)) {
            case 1: return add_panel<1>(m, d, vectors);
            case 2: return add_panel<2>(m, d, vectors);
            case 3: return add_panel<3>(m, d, vectors);
            case 4: return add_panel<4>(m, d, vectors);
            case 5: return add_panel<5>(m, d, vectors);
            default: return add_panel<kRows>(m, d, vectors);
        }
    }

    template <int kCount>
    void add_panel(int64_t m, int d, int vectors) {
        const Sight sight = see(m, kCount);
        if (sight.begin >= sight.end) return;
        if (one_by_one_ && !sight.all) {
            for (int r = 0; r < kCount; ++r) add_seen(m + r, d, vectors * Isa::kLanes);
            return;
        }
        const int first = sight.begin / kPer, last = (sight.end + kPer - 1) / kPer;
        if (vectors == Math::kVectors) return add_rows<kCount, Math::kVectors>(m, d, first, last);
        if (vectors == 3) return add_rows<kCount, 3>(m, d, first, last);
        if (vectors == 2) return add_rows<kCount, 2>(m, d, first, last);
        add_rows<kCount, 1>(m, d, first, last);
    }

    // Elements [d, d + width) of the values that state m sees, and of no others.
    void add_seen(int64_t m, int d, int width) {
        const int end = end_of(m);
        float* acc = states_.acc + m * dim_ + d;
        for (int n = begin_of(m); n < end; ++n) {
            const float weight = Cells::weight(s_.weights + m * kKeyCells, n);
            for (int i = 0; i < width; ++i) acc[i] += weight * to_float(values_[n][d + i]);
        }
    }

    // A block is summed on its own first, as in the vector kernel. Loops over sums are unrolled everywhere:
    // one that isn't would keep them in memory.
    template <int kCount, int kVectors>
    void add_rows(int64_t m, int d, int first, int last) {
        Isa::F sums[kCount][kVectors] = {};
        add_products<Cells>(s_.weights + m * kKeyCells, kKeyCells, s_.values + d * kKeyCells, first,
                            last, sums);
#pragma GCC unroll 6
        for (int r = 0; r < kCount; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
                float* to = states_.acc + (m + r) * dim_ + d + v * Isa::kLanes;
                store_cells(load_cells(to) + sums[r][v], to);
            }
    }
};

template <class Cells>
void run_blocked(const SglAttention& call, const sgl::Task& task, const sgl::States& states,
                 void* scratch) {
    BlockedTask<Cells>(call, task, states, scratch).run();
}

inline void run_blocked_floats(const SglAttention& call, const sgl::Task& task,
                               const sgl::States& states, void* scratch) {
    if (call.dtype == SGL_FLOAT32) run_blocked<FloatCells<float>>(call, task, states, scratch);
    if (call.dtype == SGL_BFLOAT16) run_blocked<FloatCells<Bf16>>(call, task, states, scratch);
    if (call.dtype == SGL_FLOAT16) run_blocked<FloatCells<Fp16>>(call, task, states, scratch);
}

}  // namespace

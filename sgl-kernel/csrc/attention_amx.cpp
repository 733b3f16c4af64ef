// Attention of many states at once on AMX tiles: bf16 products, fp32 sums and softmax.
//
// A block of keys is packed once for all states of a task: keys transposed in pairs along the head,
// values in pairs of keys, which is how a tile product wants its right side. States are taken 32 at a
// time with 32 keys or 32 elements of the head: four tiles of sums for two of either side, so that
// each tile loaded serves two products. Scores come out as [state, key]; the running softmax is that
// of blocked_attention.h, and its weights go, rounded to bf16, into the next product as they stand.
//
// Legend: as in attention.h; M states of one kv head, padded to multiples of 16.
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "amx_blocks.h"
#include "attention.h"
#include "exp2_avx512.h"
#include "numbers.h"
#include "tiles.h"
#include "wide_rows.h"

namespace {

class AmxTask {
  public:
    AmxTask(const SglAttention& call, const sgl::Task& task, char* memory)
        : call_(call), task_(task), dim_(call.head_dim), per_group_(call.heads_per_group),
          states_(int64_t{task.rows} * per_group_), rows_(padded(states_)),
          rewrites_(call.logit_cap > 0.0f || call.scale <= 0.0f),
          scale_(rewrites_ ? 1.0f : call.scale * kLog2e), wide_(memory) {
        lay_out(call, states_, task.g1 - task.g0, memory + sgl::wide_bytes(call), &s_);
    }

    void run(const sgl::States& states) {
        const int64_t groups = task_.g1 - task_.g0;
        std::fill_n(s_.acc, groups * rows_ * dim_, 0.0f);
        std::fill_n(s_.sums, groups * rows_ * kTile, 0.0f);
        std::fill_n(s_.top, groups * rows_, sgl::kLowest);
        std::memset(s_.missing, 0, static_cast<size_t>(dim_) * 2);
        for (int g = task_.g0; g < task_.g1; ++g) pack_queries(g);
        next_.find(call_, task_, task_.lo);
        while (next_.lo < task_.hi) {
            now_ = next_;
            next_.find(call_, task_, now_.hi);
            for (int g = task_.g0; g < task_.g1; ++g) attend_group(g);
        }
        for (int64_t i = 0; i < groups; ++i) hand_over(i, states);
    }

  private:
    const SglAttention& call_;
    const sgl::Task& task_;
    const int dim_, per_group_;
    const int64_t states_, rows_;
    const bool rewrites_;  // scores, before they are multiplied with scale_
    const float scale_;
    char* wide_;  // memory of widened rows, where planes are of a byte: of floats, or two parts of bf16
    AmxScratch s_;
    Keys now_, next_;
    int64_t row_ = 0;          // of the present group's first state in acc, sums and top
    bool one_by_one_ = false;  // whether values that some states don't see may not be multiplied by 0
    const Bf16* keys_[kMost];
    const Bf16* values_[kMost];

    void hand_over(int64_t group, const sgl::States& states) const {
        const int64_t to = group * states_, from = group * rows_;
        std::memcpy(states.acc + to * dim_, s_.acc + from * dim_,
                    static_cast<size_t>(states_ * dim_) * 4);
        std::memcpy(states.top + to, s_.top + from, static_cast<size_t>(states_) * 4);
        for (int64_t m = 0; m < states_; ++m)
            states.sum[to + m] = _mm512_reduce_add_ps(_mm512_load_ps(s_.sums + (from + m) * kTile));
    }

    void pack_queries(int g) {
        uint32_t* to = s_.queries + (g - task_.g0) * rows_ * dim_ / 2;
        const auto* q = static_cast<const Bf16*>(call_.q) + g * per_group_ * call_.q_head;
        for (int64_t m = 0; m < rows_; ++m) {
            const int64_t row = task_.row + m / per_group_, j = m % per_group_;
            const Bf16* from = q + row * call_.q_row + j * call_.q_head;
            uint32_t* at = to + m / kTile * kTile * dim_ / 2 + m % kTile * kTile;
            for (int d = 0; d < dim_; d += kPair, at += kTileCells)
                _mm512_store_si512(at, m < states_ ? _mm512_loadu_si512(from + d)
                                                   : _mm512_setzero_si512());
        }
    }

    void attend_group(int g) {
        row_ = (g - task_.g0) * rows_;
        for (int i = 0; i < kParts; ++i) {
            list_rows(g, i);
            if (now_.parts[i].count == 0) continue;
            pack_keys(i);
            pack_values(g, i);
        }
        one_by_one_ = !see(0, states_).all && !has_finite_values();
        Work before, now, after;
        int turn = 0;
        for (int64_t m = 0; m < rows_ || now.rows || after.rows; m += kPair, turn ^= 1) {
            before = now;
            now = after;
            after = m < rows_ ? work_on(m, turn) : Work();
            attend(before, now, after);
            if (m < rows_ && rows_ > kPair)
                ask(g, m * kMost / rows_, std::min<int64_t>(kMost, (m + kPair) * kMost / rows_));
        }
    }

    // The rows of part i, and those of the same part to come asked for where they are widened.
    void list_rows(int g, int i) {
        const sgl::KeyBlock& part = now_.parts[i];
        const Bf16 *listed_keys[kKeys], *listed_values[kKeys];
        if (sgl::wide_bytes(call_) && part.count)
            widen_block(call_, g, part, &next_.parts[i], wide_ + i * sgl::wide_bytes(call_) / kParts,
                        listed_keys, listed_values);
        else
            for (int n = 0; n < part.count; ++n) {
                listed_keys[n] = row(call_.k, g * call_.k_head, part.slots[n] * call_.k_slot);
                listed_values[n] = row(call_.v, g * call_.v_head, part.slots[n] * call_.v_slot);
            }
        const int offset = now_.offset(i);
        for (int n = 0; n < kKeys; ++n) {
            const bool is_key = n >= offset && n < offset + part.count;
            keys_[i * kKeys + n] = is_key ? listed_keys[n - offset] : s_.missing;
            values_[i * kKeys + n] = is_key ? listed_values[n - offset] : s_.missing;
        }
    }

    static const Bf16* row(const void* plane, int64_t head, int64_t slot) {
        return static_cast<const Bf16*>(plane) + head + slot;
    }

    // Asks for rows [first, last) of the next block. Spread over a block's work: asked for all at once,
    // they would only queue, and work and memory take turns.
    void ask(int g, int64_t first, int64_t last) const {
        if (sgl::wide_bytes(call_) || next_.lo >= task_.hi) return;
        for (int64_t n = first; n < last; ++n) {
            const sgl::KeyBlock& part = next_.parts[n / kKeys];
            if (n % kKeys >= part.count) continue;
            const int64_t slot = part.slots[n % kKeys];
            sgl::prefetch_row(row(call_.k, g * call_.k_head, slot * call_.k_slot), dim_ * 2);
            sgl::prefetch_row(row(call_.v, g * call_.v_head, slot * call_.v_slot), dim_ * 2);
        }
    }

    void pack_keys(int i) {
        uint32_t* to = s_.keys + i * kKeys * dim_ / 2;
        for (int n = i * kKeys; n < (i + 1) * kKeys; n += kTile)
            for (int d = 0; d < dim_; d += kPair, to += kTileCells) {
                __m512i rows[kTile];
                for (int k = 0; k < kTile; ++k) rows[k] = _mm512_loadu_si512(keys_[n + k] + d);
                transpose(rows);
                for (int k = 0; k < kTile; ++k) _mm512_store_si512(to + k * kTile, rows[k]);
            }
    }

    // With few states packing is most of the work, and rows to come are asked for here.
    void pack_values(int g, int i) {
        const __m512i low = _mm512_set_epi16(
            47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36,
            4, 35, 3, 34, 2, 33, 1, 32, 0);
        const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(kTile));
        for (int n = i * kKeys; n < (i + 1) * kKeys; n += 2) {
            uint32_t* to = s_.values + n / kPair * kTile * dim_ + n % kPair / 2 * kTile;
            if (rows_ <= kPair) ask(g, n, n + 2);
            for (int d = 0; d < dim_; d += kPair, to += 2 * kTileCells) {
                const __m512i a = _mm512_loadu_si512(values_[n] + d);
                const __m512i b = _mm512_loadu_si512(values_[n + 1] + d);
                _mm512_store_si512(to, _mm512_permutex2var_epi16(a, low, b));
                _mm512_store_si512(to + kTileCells, _mm512_permutex2var_epi16(a, high, b));
            }
        }
    }

    bool has_finite_values() const {
        const __m512i exponent = _mm512_set1_epi16(0x7f80);
        __mmask32 found = 0;
        for (int n = 0; n < now_.hi - now_.base; ++n)
            for (int d = 0; d < dim_; d += kPair) {
                const __m512i x = _mm512_and_si512(_mm512_loadu_si512(values_[n] + d), exponent);
                found |= _mm512_cmpeq_epi16_mask(x, exponent);
            }
        return found == 0;
    }

    // Keys [begin, end) of the block that some of the states [m, m + rows) see; `all` of them see
    // the whole block.
    struct Sight {
        int begin, end;
        bool all;
    };

    int64_t position(int64_t m) const {
        return task_.position + std::min(m, states_ - 1) / per_group_;
    }
    int begin_of(int64_t m) const {
        const int64_t first = std::max(sgl::first_seen(call_, position(m)), now_.lo);
        return static_cast<int>(std::min(first, now_.hi) - now_.base);
    }
    int end_of(int64_t m) const {
        const int64_t end = std::clamp(position(m) + 1, now_.lo, now_.hi);
        return static_cast<int>(end - now_.base);
    }
    Sight see(int64_t m, int64_t rows) const {
        const bool all = begin_of(m + rows - 1) == 0 && end_of(m) == kMost;
        return {begin_of(m), end_of(m + rows - 1), all};
    }

    // 32 states or the last 16, and the steps [first, last) of keys that some of them see.
    struct Work {
        int64_t m = 0;
        int rows = 0, first = 0, last = 0;
        bool all = false, is_pair = false;
        float* scores = nullptr;
        uint32_t* weights = nullptr;
    };

    Work work_on(int64_t m, int turn) const {
        Work work;
        const int64_t padded_rows = std::min<int64_t>(kPair, rows_ - m);
        const Sight sight = see(m, padded_rows);
        if (sight.begin >= sight.end) return work;
        work.m = m;
        work.rows = static_cast<int>(std::min(padded_rows, states_ - m));
        work.first = sight.begin / kPair;
        work.last = (sight.end - 1) / kPair + 1;
        work.all = sight.all;
        work.is_pair = padded_rows == kPair;
        work.scores = s_.scores + turn * kMost * kPair;
        work.weights = s_.weights + turn * kMost * kPair / 2;
        return work;
    }

    // The softmax of some states, and between its rows the products of those before and after them:
    // tiles and vectors then work at the same time.
    void attend(const Work& before, const Work& now, const Work& after) {
        const bool careful = one_by_one_ && !before.all;
        const int adds = before.rows && !careful ? dim_ / kPair : 0;
        const int products = adds + after.last - after.first;
        int done = 0;
        for (int r = 0; r < now.rows; ++r) {
            weigh(now, r);
            for (; done < products * (r + 1) / now.rows; ++done) multiply(before, after, adds, done);
        }
        for (; done < products; ++done) multiply(before, after, adds, done);
        for (int r = 0; careful && r < before.rows; ++r) add_seen(before, r);
    }

    void multiply(const Work& before, const Work& after, int adds, int index) {
        if (index >= adds) {
            const int step = after.first + index - adds;
            return after.is_pair ? score<2>(after, step) : score<1>(after, step);
        }
        return before.is_pair ? add_values<2>(before, index * kPair)
                              : add_values<1>(before, index * kPair);
    }

    // Scores of the states with the keys of a step.
    template <int kTiles>
    void score(const Work& work, int step) const {
        const int64_t tile = int64_t{kTile} * dim_ / 2;  // dwords of 16 rows
        const uint32_t *a = s_.queries + (row_ + work.m) * dim_ / 2, *b = s_.keys + 2 * step * tile;
        finish_stores();
        _tile_zero(0);
        _tile_zero(1);
        if (kTiles == 2) _tile_zero(2);
        if (kTiles == 2) _tile_zero(3);
        for (int d = 0; d < dim_; d += kPair, a += kTileCells, b += kTileCells) {
            _tile_loadd(4, a, 64);
            _tile_loadd(6, b, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, b + tile, 64);
            _tile_dpbf16ps(1, 4, 7);
            if (kTiles == 1) continue;
            _tile_loadd(5, a + tile, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        float* to = work.scores + step * 2 * kPair * kTile;
        _tile_stored(0, to, 64);
        _tile_stored(1, to + kPair * kTile, 64);
        if (kTiles == 1) return;
        _tile_stored(2, to + kTileCells, 64);
        _tile_stored(3, to + kPair * kTile + kTileCells, 64);
    }

    // Row r of the scores, of which vectors stand kPair rows apart, to weights.
    void weigh(const Work& work, int r) {
        float* scores = work.scores + r * kTile;
        const int first = 2 * work.first, last = 2 * work.last;
        const int64_t m = work.m + r;
        if (rewrites_) rewrite(scores, first, last);
        if (!work.all) hide(scores, m, first, last);
        uint32_t* weights = work.weights + r * kTile;
        if (first == 0 && last == kVectors) return weigh_whole(scores, m, weights);
        __m512 most = _mm512_set1_ps(-INFINITY);
        for (int v = first; v < last; ++v) most = _mm512_max_ps(scores_at(scores, v), most);
        const __m512 down = settle(m, most), scale = _mm512_set1_ps(scale_);
        __m512 total = _mm512_setzero_ps();
        for (int v = first; v < last; v += 2) {
            const __m512 a = short_exp2(_mm512_fmsub_ps(scores_at(scores, v), scale, down));
            const __m512 b = short_exp2(_mm512_fmsub_ps(scores_at(scores, v + 1), scale, down));
            total = _mm512_add_ps(total, _mm512_add_ps(a, b));
            store_weights(a, b, weights + v / 2 * kPair * kTile);
        }
        add_sum(m, total);
    }

    static __m512 scores_at(const float* scores, int v) {
        return _mm512_load_ps(scores + v * kPair * kTile);
    }
    static void store_weights(__m512 a, __m512 b, uint32_t* to) {
        _mm512_store_si512(to, (__m512i)_mm512_cvtne2ps_pbh(b, a));
    }
    void add_sum(int64_t m, __m512 total) {
        float* sums = s_.sums + (row_ + m) * kTile;
        _mm512_store_ps(sums, _mm512_add_ps(_mm512_load_ps(sums), total));
    }

    // The same of a row of kMost, in registers.
    void weigh_whole(const float* scores, int64_t m, uint32_t* weights) {
        __m512 x[kVectors], most[2];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) x[v] = scores_at(scores, v);
        most[0] = _mm512_max_ps(x[0], _mm512_set1_ps(-INFINITY));
        most[1] = _mm512_max_ps(x[1], _mm512_set1_ps(-INFINITY));
#pragma GCC unroll 8
        for (int v = 2; v < kVectors; ++v) most[v % 2] = _mm512_max_ps(x[v], most[v % 2]);
        const __m512 down = settle(m, _mm512_max_ps(most[0], most[1]));
        const __m512 scale = _mm512_set1_ps(scale_);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) x[v] = short_exp2(_mm512_fmsub_ps(x[v], scale, down));
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v += 2)
            store_weights(x[v], x[v + 1], weights + v / 2 * kPair * kTile);
        add_sum(m, _mm512_add_ps(
                       _mm512_add_ps(_mm512_add_ps(x[0], x[1]), _mm512_add_ps(x[2], x[3])),
                       _mm512_add_ps(_mm512_add_ps(x[4], x[5]), _mm512_add_ps(x[6], x[7]))));
    }

    // What is taken off the scaled scores of a state. It need not be the highest, only near: raising
    // it multiplies all that was added up, and weights of up to 2^kSlack are as exact as those below 1.
    __m512 settle(int64_t m, __m512 most) {
        const float* top = s_.top + row_ + m;
        const __m512 scaled = _mm512_mul_ps(most, _mm512_set1_ps(scale_));
        if (_mm512_cmp_ps_mask(scaled, _mm512_set1_ps(*top + kSlack), _CMP_GT_OQ))
            raise(m, _mm512_reduce_max_ps(scaled));
        return _mm512_set1_ps(*top);
    }

    void rewrite(float* scores, int first, int last) const {
        const __m512 scale = _mm512_set1_ps(call_.scale), base = _mm512_set1_ps(kLog2e);
        for (int v = first; v < last; ++v) {
            __m512 x = _mm512_mul_ps(scores_at(scores, v), scale);
            if (call_.logit_cap > 0.0f) x = soften(x, call_.logit_cap);
            _mm512_store_ps(scores + v * kPair * kTile, _mm512_mul_ps(x, base));
        }
    }

    // Minus infinity in place of the scores of keys that state m does not see.
    void hide(float* scores, int64_t m, int first, int last) const {
        const int begin = begin_of(m), end = end_of(m);
        for (int v = first; v < last; ++v) {
            const int from = std::clamp(begin - v * kTile, 0, kTile);
            const int to = std::clamp(end - v * kTile, 0, kTile);
            const auto seen = static_cast<__mmask16>(((1u << to) - 1) & ~((1u << from) - 1));
            if (seen == 0xffff) continue;
            const __m512 x = scores_at(scores, v);
            _mm512_store_ps(scores + v * kPair * kTile,
                            _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), seen, x));
        }
    }

    // Few blocks do, beside the first.
    __attribute__((noinline)) void raise(int64_t m, float top) {
        const int64_t state = row_ + m;
        if (s_.top[state] <= sgl::kLowest) {  // nothing was added up
            s_.top[state] = top;
            return;
        }
        const __m512 keep = exp2_small(_mm512_set1_ps(s_.top[state] - top));
        float* sums = s_.sums + state * kTile;
        _mm512_store_ps(sums, _mm512_mul_ps(_mm512_load_ps(sums), keep));
        for (float *x = s_.acc + state * dim_, *last = x + dim_; x < last; x += kTile)
            _mm512_store_ps(x, _mm512_mul_ps(_mm512_load_ps(x), keep));
        s_.top[state] = top;
    }

    // acc [states, 32] from element d on += weights x values.
    template <int kTiles>
    void add_values(const Work& work, int d) const {
        const int64_t bytes = int64_t{dim_} * 4, tile = int64_t{kTile} * dim_;
        float* acc = s_.acc + (row_ + work.m) * dim_ + d;
        const uint32_t* a = work.weights + work.first * kPair * kTile;
        const uint32_t* b = s_.values + work.first * tile + int64_t{d} * kTile;
        finish_stores();
        _tile_loadd(0, acc, bytes);
        _tile_loadd(1, acc + kTile, bytes);
        if (kTiles == 2) _tile_loadd(2, acc + tile, bytes);
        if (kTiles == 2) _tile_loadd(3, acc + tile + kTile, bytes);
        for (int step = work.first; step < work.last; ++step, a += kPair * kTile, b += tile) {
            _tile_loadd(4, a, 64);
            _tile_loadd(6, b, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, b + kTileCells, 64);
            _tile_dpbf16ps(1, 4, 7);
            if (kTiles == 1) continue;
            _tile_loadd(5, a + kTileCells, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, acc, bytes);
        _tile_stored(1, acc + kTile, bytes);
        if (kTiles == 1) return;
        _tile_stored(2, acc + tile, bytes);
        _tile_stored(3, acc + tile + kTile, bytes);
    }

    // The values that row r's state sees, and no others.
    void add_seen(const Work& work, int r) const {
        const int end = end_of(work.m + r);
        float* acc = s_.acc + (row_ + work.m + r) * dim_;
        for (int n = begin_of(work.m + r); n < end; ++n) {
            const auto* weights = reinterpret_cast<const Bf16*>(
                work.weights + (n / kPair * kPair + r) * kTile);
            const float weight = to_float(weights[n % kPair]);
            for (int d = 0; d < dim_; ++d) acc[d] += weight * to_float(values_[n][d]);
        }
    }
};

}  // namespace

int64_t sgl::amx_scratch_bytes(const SglAttention& call, int64_t max_queries, int64_t groups) {
    AmxScratch unused;
    return lay_out(call, max_queries * call.heads_per_group, groups, nullptr, &unused);
}

void sgl::amx_begin() { begin_tiles(); }

void sgl::amx_end() { end_tiles(); }

void sgl::run_task_amx(const SglAttention& call, const Task& task, const States& states,
                       void* scratch) {
    AmxTask(call, task, static_cast<char*>(scratch)).run(states);
}

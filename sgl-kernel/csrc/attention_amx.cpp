// Attention on AMX tiles: bf16 products, fp32 sums and softmax.
//
// A tile of 16 keys is read where it lies (its rows are a slot's stride apart) and multiplied with
// 16 packed states, so scores come out as [key, state]: the softmax over keys needs no horizontal
// step. Weights turn into bf16 and are transposed in registers; V is packed in pairs of keys, as
// the tile product wants its right side, once per block for all states.
//
// Legend: as in attention.h; M states of one kv head, padded to multiples of 16.
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "attention.h"
#include "exp2_avx512.h"
#include "tiles.h"

namespace sgl {
namespace {

struct Scratch {
    char* queries;        // [groups, M / 16, D / 32, 16, 16] dwords: pairs of D x states
    uint32_t* value_pairs;  // [kKeys / 2, D]: keys 2i and 2i + 1
    uint16_t* key_copy;   // [kKeys, D], for keys that do not stand in a row
    float* scores;        // [kKeys, 16]
    uint32_t* weights;    // [2, 16, 16]: halves of the keys; states x pairs of keys
    float* acc;           // [groups, M, D]
    float* top;           // [groups, M]
    float* sum;           // [groups, M]
};

int64_t padded(int64_t states) { return (states + kTile - 1) / kTile * kTile; }

// Lays the scratch out at `base` and returns its size; a null base only measures.
int64_t lay_out(const SglAttention& call, int64_t states, int64_t groups, char* base,
                Scratch* scratch) {
    const int64_t dim = call.head_dim, rows = groups * padded(states);
    int64_t at = 0;
    const auto take = [&](int64_t bytes) {
        char* place = base + at;
        at += (bytes + 63) / 64 * 64;
        return place;
    };
    scratch->queries = take(rows * dim * 2);
    scratch->value_pairs = reinterpret_cast<uint32_t*>(take(kKeys / 2 * dim * 4));
    scratch->key_copy = reinterpret_cast<uint16_t*>(take(kKeys * dim * 2));
    scratch->scores = reinterpret_cast<float*>(take(kKeys * kTile * 4));
    scratch->weights = reinterpret_cast<uint32_t*>(take(2 * kTile * kTile * 4));
    scratch->acc = reinterpret_cast<float*>(take(rows * dim * 4));
    scratch->top = reinterpret_cast<float*>(take(rows * 4));
    scratch->sum = reinterpret_cast<float*>(take(rows * 4));
    return at;
}

inline __m512 soften(__m512 scores, float cap) {
    // tanh(y) = sign(y) * (1 - e) / (1 + e) with e = exp(-2 |y|)
    const __m512 y = _mm512_mul_ps(scores, _mm512_set1_ps(1.0f / cap));
    const __m512 size = _mm512_abs_ps(y), one = _mm512_set1_ps(1.0f);
    const __m512 e = exp2_small(_mm512_mul_ps(size, _mm512_set1_ps(-2.0f * kLog2e)));
    const __m512 tanh = _mm512_div_ps(_mm512_sub_ps(one, e), _mm512_add_ps(one, e));
    const __m512i sign = _mm512_and_si512(_mm512_castps_si512(y), _mm512_set1_epi32(INT32_MIN));
    const __m512i bits = _mm512_or_si512(_mm512_castps_si512(tanh), sign);
    return _mm512_mul_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(cap));
}

class AmxTask {
  public:
    AmxTask(const SglAttention& call, const Task& task, char* memory)
        : call_(call), task_(task), dim_(call.head_dim), per_group_(call.heads_per_group),
          states_(int64_t{task.rows} * per_group_), rows_(padded(states_)) {
        lay_out(call, states_, task.g1 - task.g0, memory, &s_);
    }

    void run(const States& states) {
        const int64_t groups = task_.g1 - task_.g0;
        std::fill_n(s_.acc, groups * rows_ * dim_, 0.0f);
        std::fill_n(s_.top, groups * rows_, kLowest);
        std::fill_n(s_.sum, groups * rows_, 0.0f);
        for (int g = task_.g0; g < task_.g1; ++g) pack_queries(g);
        find(task_.lo, &next_);
        for (lo_ = task_.lo; lo_ < task_.hi;) {
            block_ = next_;
            find(lo_ + block_.count, &next_);
            for (int g = task_.g0; g < task_.g1; ++g) attend_group(g);
            lo_ += block_.count;
        }
        for (int64_t i = 0; i < groups; ++i) {
            std::memcpy(states.acc + i * states_ * dim_, s_.acc + i * rows_ * dim_,
                        static_cast<size_t>(states_ * dim_) * 4);
            std::memcpy(states.top + i * states_, s_.top + i * rows_, static_cast<size_t>(states_) * 4);
            std::memcpy(states.sum + i * states_, s_.sum + i * rows_, static_cast<size_t>(states_) * 4);
        }
    }

  private:
    const SglAttention& call_;
    const Task& task_;
    const int dim_, per_group_;
    const int64_t states_, rows_;
    Scratch s_;
    KeyBlock block_, next_;
    int64_t lo_ = 0;

    void find(int64_t lo, KeyBlock* block) const {
        block->count = 0;
        if (lo < task_.hi) block->find(call_, task_.table, lo, block_end(lo, task_.hi));
    }

    // Keys n and n + 1 of the block that follows. Spread over a block's work: asked for all at once,
    // they would only queue, and work and memory would take turns.
    void prefetch_pair(const uint16_t* plane, int64_t stride, int n) const {
        if (n + 1 >= next_.count) return;
        prefetch_row(plane + next_.slots[n] * stride, dim_ * 2);
        prefetch_row(plane + next_.slots[n + 1] * stride, dim_ * 2);
    }

    void pack_queries(int g) {
        auto* packed = reinterpret_cast<__m512i*>(s_.queries) + (g - task_.g0) * rows_ * dim_ / 32;
        const auto* q = static_cast<const uint16_t*>(call_.q) + g * per_group_ * call_.q_head;
        for (int64_t first = 0; first < rows_; first += kTile)
            for (int d = 0; d < dim_; d += 32, packed += kTile) {
                __m512i rows[kTile];
                for (int i = 0; i < kTile; ++i) {
                    const int64_t m = first + i;
                    rows[i] = _mm512_setzero_si512();
                    if (m >= states_) continue;
                    const int64_t row = task_.row + m / per_group_, j = m % per_group_;
                    rows[i] = _mm512_loadu_si512(q + row * call_.q_row + j * call_.q_head + d);
                }
                transpose(rows);
                for (int i = 0; i < kTile; ++i) _mm512_store_si512(packed + i, rows[i]);
            }
    }

    void attend_group(int g) {
        const auto* keys = static_cast<const uint16_t*>(call_.k) + g * call_.k_head;
        const uint16_t* first = keys + block_.slots[0] * call_.k_slot;
        int64_t stride = call_.k_slot;
        if (!block_.contiguous || block_.count < kKeys) {
            copy_keys(keys);
            first = s_.key_copy;
            stride = dim_;
        }
        const auto* values = static_cast<const uint16_t*>(call_.v) + g * call_.v_head;
        pack_values(values, keys);
        const int64_t row = (g - task_.g0) * rows_;
        const char* packed = s_.queries + row * dim_ * 2;
        for (int64_t m = 0; m < rows_; m += kTile, packed += kTile * dim_ * 2) {
            __m512i begin, end;
            const Sight sight = see(m, &begin, &end);
            if (sight == Sight::kNothing) continue;
            score(first, stride, packed);
            weigh(sight, begin, end, s_.top + row + m, s_.sum + row + m,
                  s_.acc + (row + m) * dim_, m == 0 ? values : nullptr);
            add_values(s_.acc + (row + m) * dim_);
        }
    }

    enum class Sight { kNothing, kSome, kAll };

    // The keys of the block [begin, end) that each of 16 states sees.
    Sight see(int64_t m, __m512i* begin, __m512i* end) const {
        alignas(64) int32_t from[kTile], to[kTile];
        bool any = false, all = block_.count == kKeys;
        for (int i = 0; i < kTile; ++i) {
            const int64_t position = task_.position + std::min(m + i, states_ - 1) / per_group_;
            from[i] = clip(first_seen(call_, position) - lo_);
            to[i] = clip(position + 1 - lo_);
            any |= from[i] < to[i];
            all &= from[i] == 0 && to[i] == kKeys;
            if (all && task_.rows == 1) break;  // the states of one query see alike
        }
        if (all) return Sight::kAll;
        *begin = _mm512_load_si512(from);
        *end = _mm512_load_si512(to);
        return any ? Sight::kSome : Sight::kNothing;
    }

    int32_t clip(int64_t n) const {
        return static_cast<int32_t>(std::clamp<int64_t>(n, 0, block_.count));
    }

    void copy_keys(const uint16_t* keys) {
        const size_t bytes = static_cast<size_t>(dim_) * 2;
        for (int n = 0; n < kKeys; ++n) {
            uint16_t* row = s_.key_copy + n * dim_;
            if (n < block_.count) std::memcpy(row, keys + block_.slots[n] * call_.k_slot, bytes);
            else std::memset(row, 0, bytes);
        }
    }

    void pack_values(const uint16_t* values, const uint16_t* keys) {
        const __m512i low = _mm512_set_epi16(
            47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36,
            4, 35, 3, 34, 2, 33, 1, 32, 0);
        const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
        const __m512i zero = _mm512_setzero_si512();
        for (int n = 0; n < kKeys; n += 2) {
            const uint16_t* a = values + block_.slots[n] * call_.v_slot;
            const uint16_t* b = values + block_.slots[n + 1] * call_.v_slot;
            uint32_t* to = s_.value_pairs + n / 2 * dim_;
            prefetch_pair(keys, call_.k_slot, n);
            for (int d = 0; d < dim_; d += 32) {
                const __m512i x = n < block_.count ? _mm512_loadu_si512(a + d) : zero;
                const __m512i y = n + 1 < block_.count ? _mm512_loadu_si512(b + d) : zero;
                _mm512_store_si512(to + d, _mm512_permutex2var_epi16(x, low, y));
                _mm512_store_si512(to + d + 16, _mm512_permutex2var_epi16(x, high, y));
            }
        }
    }

    // Scores [kKeys, 16] of the block's keys with 16 packed states.
    void score(const uint16_t* keys, int64_t stride, const char* packed) {
        const int64_t bytes = stride * 2, tile = kTile * stride;
        finish_stores();
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int d = 0; d < dim_; d += 32, packed += kTile * 64) {
            _tile_loadd(7, packed, 64);
            _tile_loadd(4, keys + d, bytes);
            _tile_dpbf16ps(0, 4, 7);
            _tile_loadd(5, keys + tile + d, bytes);
            _tile_dpbf16ps(1, 5, 7);
            _tile_loadd(6, keys + 2 * tile + d, bytes);
            _tile_dpbf16ps(2, 6, 7);
            _tile_loadd(4, keys + 3 * tile + d, bytes);
            _tile_dpbf16ps(3, 4, 7);
        }
        _tile_stored(0, s_.scores, 64);
        _tile_stored(1, s_.scores + 256, 64);
        _tile_stored(2, s_.scores + 512, 64);
        _tile_stored(3, s_.scores + 768, 64);
    }

    // Scores to weights in bf16, and the states moved on. Prefetches the next rows of `ahead`.
    void weigh(Sight sight, __m512i begin, __m512i end, float* top, float* sum, float* acc,
               const uint16_t* ahead) {
        const float cap = call_.logit_cap;
        const __m512 scale = _mm512_set1_ps(cap > 0.0f ? call_.scale : call_.scale * kLog2e);
        const __m512 old = _mm512_load_ps(top);
        __m512 highest = old;
        for (int n = 0; n < kKeys; ++n) {
            float* at = s_.scores + n * kTile;
            __m512 x = _mm512_mul_ps(_mm512_load_ps(at), scale);
            if (cap > 0.0f) x = _mm512_mul_ps(soften(x, cap), _mm512_set1_ps(kLog2e));
            if (sight == Sight::kSome) {
                const __m512i key = _mm512_set1_epi32(n);
                const __mmask16 seen = _mm512_cmpge_epi32_mask(key, begin) &
                                       _mm512_cmplt_epi32_mask(key, end);
                x = _mm512_mask_blend_ps(seen, _mm512_set1_ps(-INFINITY), x);
            }
            highest = _mm512_max_ps(x, highest);
            _mm512_store_ps(at, x);
        }
        __m512 added = _mm512_setzero_ps();
        for (int half = 0; half < 2; ++half) {
            __m512i pairs[kTile];
            const float* at = s_.scores + half * 32 * kTile;
            for (int i = 0; i < kTile; ++i, at += 2 * kTile) {
                const __m512 a = exp2_small(_mm512_sub_ps(_mm512_load_ps(at), highest));
                const __m512 b = exp2_small(_mm512_sub_ps(_mm512_load_ps(at + kTile), highest));
                added = _mm512_add_ps(added, _mm512_add_ps(a, b));
                pairs[i] = pair_up(a, b);
                if (ahead) prefetch_pair(ahead, call_.v_slot, half * 32 + 2 * i);
            }
            transpose(pairs);
            auto* to = reinterpret_cast<__m512i*>(s_.weights) + half * kTile;
            for (int i = 0; i < kTile; ++i) _mm512_store_si512(to + i, pairs[i]);
        }
        const __mmask16 moved = _mm512_cmp_ps_mask(highest, old, _CMP_GT_OQ);
        const __m512 keep = exp2_small(_mm512_sub_ps(old, highest));
        if (moved) rescale(acc, keep, moved);
        _mm512_store_ps(sum, _mm512_fmadd_ps(_mm512_load_ps(sum), keep, added));
        _mm512_store_ps(top, highest);
    }

    // Dwords of two bf16 each: a below, b above.
    static __m512i pair_up(__m512 a, __m512 b) {
        const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(a));
        const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(b));
        return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    }

    void rescale(float* acc, __m512 keep, __mmask16 moved) const {
        alignas(64) float factors[kTile];
        _mm512_store_ps(factors, keep);
        for (int i = 0; i < kTile; ++i) {
            if (!(moved >> i & 1)) continue;
            const __m512 factor = _mm512_set1_ps(factors[i]);
            for (float *x = acc + i * dim_, *last = x + dim_; x < last; x += 16)
                _mm512_store_ps(x, _mm512_mul_ps(_mm512_load_ps(x), factor));
        }
    }

    // acc [16, D] += weights [16, kKeys] x V [kKeys, D].
    void add_values(float* acc) {
        const int64_t bytes = int64_t{dim_} * 4;
        const uint32_t *low = s_.value_pairs, *high = low + 16 * dim_;
        finish_stores();
        _tile_loadd(4, s_.weights, 64);
        _tile_loadd(5, s_.weights + 256, 64);
        for (int d = 0; d < dim_; d += 32) {
            _tile_loadd(0, acc + d, bytes);
            _tile_loadd(1, acc + d + 16, bytes);
            _tile_loadd(6, low + d, bytes);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, low + d + 16, bytes);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(6, high + d, bytes);
            _tile_dpbf16ps(0, 5, 6);
            _tile_loadd(7, high + d + 16, bytes);
            _tile_dpbf16ps(1, 5, 7);
            _tile_stored(0, acc + d, bytes);
            _tile_stored(1, acc + d + 16, bytes);
        }
    }
};

}  // namespace

int64_t amx_scratch_bytes(const SglAttention& call, int64_t max_queries, int64_t groups) {
    Scratch unused;
    const int64_t states = max_queries * call.heads_per_group;
    return lay_out(call, states, groups, nullptr, &unused);
}

void amx_begin() { begin_tiles(); }

void amx_end() { end_tiles(); }

void run_task_amx(const SglAttention& call, const Task& task, const States& states, void* scratch) {
    AmxTask(call, task, static_cast<char*>(scratch)).run(states);
}

}  // namespace sgl

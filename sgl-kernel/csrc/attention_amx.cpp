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

#include "attention.h"
#include "exp2_avx512.h"
#include "numbers.h"
#include "tiles.h"
#include "wide_rows.h"

namespace {

using sgl::kKeys;
using sgl::kLog2e;

constexpr int kParts = 2;                // blocks of kKeys that are packed at a time
constexpr int kMost = kParts * kKeys;    // keys
constexpr int kPair = 2 * kTile;         // states, keys or elements that four tiles of sums cover
constexpr int kTileCells = kTile * kTile;  // dwords of a tile
constexpr int kVectors = kMost / kTile;  // of a state's scores

struct Scratch {
    uint32_t* queries;  // [groups, M / 16, D / 32] tiles of states x pairs of elements
    uint32_t* keys;     // [kMost / 16, D / 32] tiles of pairs of elements x keys
    uint32_t* values;   // [kMost / 32, D / 16] tiles of pairs of keys x elements
    float* scores;      // [kMost / 16, 32, 16]: tiles of keys, states, keys
    uint32_t* weights;  // [kMost / 32, 32, 16]: steps of keys, states, pairs of keys
    float* acc;         // [groups, M, D]
    float* sums;        // [groups, M, 16]: lanes
    float* top;         // [groups, M]
    Bf16* missing;      // [D] zeros, in place of rows that are no key
};

int64_t padded(int64_t states) { return (states + kTile - 1) / kTile * kTile; }

// Lays the scratch out at `base` and returns its size; a null base only measures.
int64_t lay_out(const SglAttention& call, int64_t states, int64_t groups, char* base,
                Scratch* scratch) {
    const int64_t dim = call.head_dim, rows = groups * padded(states);
    int64_t at = 0;
    const auto take = [&](auto** place, int64_t bytes) {
        *place = reinterpret_cast<std::remove_reference_t<decltype(*place)>>(base + at);
        at += (bytes + 63) / 64 * 64;
    };
    take(&scratch->queries, rows * dim * 2);
    take(&scratch->keys, kMost * dim * 2);
    take(&scratch->values, kMost * dim * 2);
    take(&scratch->scores, kMost * kPair * 4);
    take(&scratch->weights, kMost * kPair * 2);
    take(&scratch->acc, rows * dim * 4);
    take(&scratch->sums, rows * kTile * 4);
    take(&scratch->top, rows * 4);
    take(&scratch->missing, dim * 2);
    return at;
}

// 2^x for x <= 0, off by 9e-5 of it: a weight loses more when it is rounded to bf16. 0 for minus
// infinity, NaN for NaN. Scaling is by the whole number below x, which the vector unit finds itself.
inline __m512 short_exp2(__m512 x) {
    const __m512 t = _mm512_reduce_ps(x, 0x09);  // x - floor(x)
    __m512 y = _mm512_set1_ps(7.7067051e-2f);
    y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(2.2764498e-1f));
    y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(6.9511679e-1f));
    y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, x);
}

// cap * tanh(x / cap), where tanh(y) = sign(y) * (1 - e) / (1 + e) with e = exp(-2 |y|)
inline __m512 soften(__m512 x, float cap) {
    const __m512 y = _mm512_mul_ps(x, _mm512_set1_ps(1.0f / cap)), one = _mm512_set1_ps(1.0f);
    const __m512 e = exp2_small(_mm512_mul_ps(_mm512_abs_ps(y), _mm512_set1_ps(-2.0f * kLog2e)));
    const __m512 tanh = _mm512_div_ps(_mm512_sub_ps(one, e), _mm512_add_ps(one, e));
    const __m512 sign = _mm512_and_ps(y, _mm512_set1_ps(-0.0f));
    return _mm512_mul_ps(_mm512_or_ps(tanh, sign), _mm512_set1_ps(cap));
}

// Keys of a task from position `base` on, a multiple of kKeys: those in [lo, hi) are the task's.
struct Keys {
    int64_t base, lo, hi;
    sgl::KeyBlock parts[kParts];  // part i begins at base + i * kKeys, or at lo within it

    void find(const SglAttention& call, const sgl::Task& task, int64_t from) {
        lo = from;
        base = from - from % kKeys;
        hi = std::min(task.hi, base + kMost);
        for (int i = 0; i < kParts; ++i) {
            const int64_t first = std::max(lo, base + i * kKeys);
            parts[i].count = 0;
            if (first < hi) parts[i].find(call, task.table, first, sgl::block_end(first, hi));
        }
    }
    // Rows of part i before its first key.
    int offset(int i) const { return static_cast<int>(std::max<int64_t>(0, lo - base - i * kKeys)); }
};

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
    Scratch s_;
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
            pack_values(i);
        }
        one_by_one_ = !see(0, states_).all && !has_finite_values();
        for (int64_t m = 0; m < rows_; m += kPair) {
            ask(g, m);
            if (rows_ - m == kTile) attend<1>(m);
            else attend<2>(m);
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

    // Asks for the share of the next block's rows that is due before states from m on. Spread over a
    // block's work: asked for all at once, they would only queue, and work and memory take turns.
    void ask(int g, int64_t m) const {
        if (sgl::wide_bytes(call_) || next_.lo >= task_.hi) return;
        const int64_t last = std::min<int64_t>(kMost, (m + kPair) * kMost / rows_);
        for (int64_t n = m * kMost / rows_; n < last; ++n) {
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

    void pack_values(int i) {
        const __m512i low = _mm512_set_epi16(
            47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36,
            4, 35, 3, 34, 2, 33, 1, 32, 0);
        const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(kTile));
        for (int n = i * kKeys; n < (i + 1) * kKeys; n += 2) {
            uint32_t* to = s_.values + n / kPair * kTile * dim_ + n % kPair / 2 * kTile;
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

    template <int kTiles>
    void attend(int64_t m) {
        const Sight sight = see(m, kTiles * kTile);
        if (sight.begin >= sight.end) return;
        const int first = sight.begin / kPair, last = (sight.end - 1) / kPair + 1;
        for (int step = first; step < last; ++step) score<kTiles>(m, step);
        const int64_t rows = std::min<int64_t>(kTiles * kTile, states_ - m);
        for (int r = 0; r < rows; ++r) {
            if (rewrites_) rewrite(r, 2 * first, 2 * last);
            if (!sight.all) hide(r, m + r, 2 * first, 2 * last);
            weigh(r, m + r, 2 * first, 2 * last);
        }
        if (one_by_one_ && !sight.all)
            for (int r = 0; r < rows; ++r) add_seen(r, m + r);
        else
            for (int d = 0; d < dim_; d += kPair) add_values<kTiles>(m, d, first, last);
    }

    // Scores of states [m, m + kTiles * 16) with the keys of a step.
    template <int kTiles>
    void score(int64_t m, int step) {
        const int64_t tile = int64_t{kTile} * dim_ / 2;  // dwords of 16 rows
        const uint32_t *a = s_.queries + (row_ + m) * dim_ / 2, *b = s_.keys + 2 * step * tile;
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
        float* to = s_.scores + step * 2 * kPair * kTile;
        _tile_stored(0, to, 64);
        _tile_stored(1, to + kPair * kTile, 64);
        if (kTiles == 1) return;
        _tile_stored(2, to + kTileCells, 64);
        _tile_stored(3, to + kPair * kTile + kTileCells, 64);
    }

    float* score_at(int r, int v) const { return s_.scores + (v * kPair + r) * kTile; }

    void rewrite(int r, int first, int last) const {
        for (int v = first; v < last; ++v) {
            const float cap = call_.logit_cap;
            const __m512 x = _mm512_mul_ps(_mm512_load_ps(score_at(r, v)), _mm512_set1_ps(call_.scale));
            _mm512_store_ps(score_at(r, v),
                            _mm512_mul_ps(cap > 0.0f ? soften(x, cap) : x, _mm512_set1_ps(kLog2e)));
        }
    }

    // Minus infinity in place of the scores of keys that state m does not see.
    void hide(int r, int64_t m, int first, int last) const {
        const int begin = begin_of(m), end = end_of(m);
        for (int v = first; v < last; ++v) {
            const int from = std::clamp(begin - v * kTile, 0, kTile);
            const int to = std::clamp(end - v * kTile, 0, kTile);
            const auto seen = static_cast<__mmask16>(((1u << to) - 1) & ~((1u << from) - 1));
            if (seen == 0xffff) continue;
            const __m512 x = _mm512_load_ps(score_at(r, v));
            _mm512_store_ps(score_at(r, v),
                            _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), seen, x));
        }
    }

    // Turns a state's scores into weights, and moves the state on.
    void weigh(int r, int64_t m, int first, int last) {
        const __m512 scale = _mm512_set1_ps(scale_);
        const __m512 lowest = _mm512_set1_ps(-INFINITY);
        __m512 even = lowest, odd = lowest;
        for (int v = first; v < last; v += 2) {
            even = _mm512_max_ps(_mm512_load_ps(score_at(r, v)), even);
            odd = _mm512_max_ps(_mm512_load_ps(score_at(r, v + 1)), odd);
        }
        const __m512 most = _mm512_mul_ps(_mm512_max_ps(even, odd), scale);
        float* top = s_.top + row_ + m;
        if (_mm512_cmp_ps_mask(most, _mm512_set1_ps(*top), _CMP_GT_OQ))
            raise(m, _mm512_reduce_max_ps(most));
        const __m512 down = _mm512_set1_ps(*top);
        float* sums = s_.sums + (row_ + m) * kTile;
        __m512 total = _mm512_load_ps(sums), other = _mm512_setzero_ps();
        for (int v = first; v < last; v += 2) {
            const __m512 a = short_exp2(_mm512_fmsub_ps(_mm512_load_ps(score_at(r, v)), scale, down));
            const __m512 b =
                short_exp2(_mm512_fmsub_ps(_mm512_load_ps(score_at(r, v + 1)), scale, down));
            total = _mm512_add_ps(total, a);
            other = _mm512_add_ps(other, b);
            _mm512_store_si512(s_.weights + (v / 2 * kPair + r) * kTile,
                               (__m512i)_mm512_cvtne2ps_pbh(b, a));
        }
        _mm512_store_ps(sums, _mm512_add_ps(total, other));
    }

    // Few blocks do: what is new rarely passes the highest of all that came before.
    __attribute__((noinline)) void raise(int64_t m, float top) {
        const int64_t state = row_ + m;
        const __m512 keep = exp2_small(_mm512_set1_ps(s_.top[state] - top));
        float* sums = s_.sums + state * kTile;
        _mm512_store_ps(sums, _mm512_mul_ps(_mm512_load_ps(sums), keep));
        for (float *x = s_.acc + state * dim_, *last = x + dim_; x < last; x += kTile)
            _mm512_store_ps(x, _mm512_mul_ps(_mm512_load_ps(x), keep));
        s_.top[state] = top;
    }

    // acc [states, 32] from element d on += weights of the steps [first, last) x values.
    template <int kTiles>
    void add_values(int64_t m, int d, int first, int last) {
        const int64_t bytes = int64_t{dim_} * 4, tile = int64_t{kTile} * dim_;
        float* acc = s_.acc + (row_ + m) * dim_ + d;
        const uint32_t *a = s_.weights + first * kPair * kTile;
        const uint32_t *b = s_.values + first * tile + int64_t{d} * kTile;
        finish_stores();
        _tile_loadd(0, acc, bytes);
        _tile_loadd(1, acc + kTile, bytes);
        if (kTiles == 2) _tile_loadd(2, acc + tile, bytes);
        if (kTiles == 2) _tile_loadd(3, acc + tile + kTile, bytes);
        for (int step = first; step < last; ++step, a += kPair * kTile, b += tile) {
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

    // The values that state m sees, and no others.
    void add_seen(int r, int64_t m) {
        const int end = end_of(m);
        float* acc = s_.acc + (row_ + m) * dim_;
        for (int n = begin_of(m); n < end; ++n) {
            const auto* weights =
                reinterpret_cast<const Bf16*>(s_.weights + (n / kPair * kPair + r) * kTile);
            const float weight = to_float(weights[n % kPair]);
            for (int d = 0; d < dim_; ++d) acc[d] += weight * to_float(values_[n][d]);
        }
    }
};

}  // namespace

int64_t sgl::amx_scratch_bytes(const SglAttention& call, int64_t max_queries, int64_t groups) {
    ::Scratch unused;
    return lay_out(call, max_queries * call.heads_per_group, groups, nullptr, &unused);
}

void sgl::amx_begin() { begin_tiles(); }

void sgl::amx_end() { end_tiles(); }

void sgl::run_task_amx(const SglAttention& call, const Task& task, const States& states,
                       void* scratch) {
    AmxTask(call, task, static_cast<char*>(scratch)).run(states);
}

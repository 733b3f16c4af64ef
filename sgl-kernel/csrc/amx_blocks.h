// What the attention kernel on AMX tiles packs, and where; and its powers of two.
//
// Legend: as in attention.h; M states of one kv head, padded to multiples of 16.
#pragma once

#include <immintrin.h>

#include <type_traits>

#include "attention.h"
#include "exp2_avx512.h"
#include "numbers.h"
#include "tiles.h"

namespace {

using sgl::kKeys;
using sgl::kLog2e;

constexpr int kParts = 2;                // blocks of kKeys that are packed at a time
constexpr int kMost = kParts * kKeys;    // keys
constexpr int kPair = 2 * kTile;         // states, keys or elements that four tiles of sums cover
constexpr int kTileCells = kTile * kTile;  // dwords of a tile
constexpr int kVectors = kMost / kTile;  // of a state's scores
constexpr float kSlack = 8.0f;           // powers of two

struct AmxScratch {
    uint32_t* queries;  // [groups, M / 16, D / 32] tiles of states x pairs of elements
    uint32_t* keys;     // [kMost / 16, D / 32] tiles of pairs of elements x keys
    uint32_t* values;   // [kMost / 32, D / 16] tiles of pairs of keys x elements
    float* scores;      // [2, kMost / 16, 32, 16]: turns, tiles of keys, states, keys
    uint32_t* weights;  // [2, kMost / 32, 32, 16]: turns, steps of keys, states, pairs of keys
    float* acc;         // [groups, M, D]
    float* sums;        // [groups, M, 16]: lanes
    float* top;         // [groups, M]
    Bf16* missing;      // [D] zeros, in place of rows that are no key
};

inline int64_t padded(int64_t states) { return (states + kTile - 1) / kTile * kTile; }

// Lays the scratch out at `base` and returns its size; a null base only measures.
inline int64_t lay_out(const SglAttention& call, int64_t states, int64_t groups, char* base,
                       AmxScratch* scratch) {
    const int64_t dim = call.head_dim, rows = groups * padded(states);
    int64_t at = 0;
    const auto take = [&](auto** place, int64_t bytes) {
        *place = reinterpret_cast<std::remove_reference_t<decltype(*place)>>(base + at);
        at += (bytes + 63) / 64 * 64;
    };
    take(&scratch->queries, rows * dim * 2);
    take(&scratch->keys, kMost * dim * 2);
    take(&scratch->values, kMost * dim * 2);
    take(&scratch->scores, 2 * kMost * kPair * 4);
    take(&scratch->weights, 2 * kMost * kPair * 2);
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

}  // namespace

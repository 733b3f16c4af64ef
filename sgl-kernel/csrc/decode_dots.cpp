// One query or a few per task with AVX-512's dot products of bf16: K and V are multiplied as they lie.
//
// A score is a dot product along the head; sixteen keys' sums are added up across lanes together, which
// takes a third of the work of adding up each. Values are taken two keys at a time, interleaved so that
// a pair of weights in bf16 meets a pair of elements. A block is summed on its own first, as in
// vector_attention.h.
#include <immintrin.h>

#include <cmath>

#include "add_lanes.h"
#include "attention.h"
#include "block_rows.h"
#include "exp2_avx512.h"

namespace {

using sgl::kKeys;
using sgl::kLog2e;
using sgl::States;
using sgl::Task;

constexpr int kLanes = 16;
constexpr int kPair = 2 * kLanes;  // elements of a vector of bf16
constexpr int kSpan = 2 * kPair;   // elements of a head whose values are summed at a time
constexpr int kMostHeads = 4;      // of a group, at a time

inline __m512bh load_pairs(const Bf16* x) {
    return reinterpret_cast<__m512bh>(_mm512_loadu_si512(x));
}

// Lane i of the result is the sum of all lanes of x[i].
inline __m512 sum_each(const __m512* x) {
    return add_four(add_quarters(x[0], x[1], x[2], x[3]), add_quarters(x[4], x[5], x[6], x[7]),
                    add_quarters(x[8], x[9], x[10], x[11]),
                    add_quarters(x[12], x[13], x[14], x[15]));
}

class DotTask {
  public:
    DotTask(const SglAttention& call, const Task& task, const States& states, void* wide)
        : call_(call), task_(task), states_(states), dim_(call.head_dim), rows_(call, task, wide) {}

    void run() {
        while (rows_.step())
            for (int g = task_.g0; g < task_.g1; ++g) attend_group(g);
    }

  private:
    const SglAttention& call_;
    const Task& task_;
    const States& states_;
    const int dim_;
    BlockRows<Bf16> rows_;
    alignas(64) float scores_[kMostHeads][kKeys];
    alignas(64) uint32_t weights_[kMostHeads][kKeys / 2];  // pairs of bf16

    // Queries one after the other: what the first has read lies in the cache for the others.
    void attend_group(int g) {
        bool asks = rows_.list(g);
        for (int m = 0; m < task_.rows; ++m) {
            const int64_t position = task_.position + m;
            const int begin = rows_.begin(position), end = rows_.end(position);
            if (begin >= end) continue;
            attend(g, m, begin, end, asks);
            asks = false;
        }
    }

    void attend(int g, int m, int begin, int end, bool asks) {
        const int per_group = call_.heads_per_group;
        const int64_t first = (int64_t{g - task_.g0} * task_.rows + m) * per_group;
        const auto* q = static_cast<const Bf16*>(call_.q) + (task_.row + m) * call_.q_row +
                        g * per_group * call_.q_head;
        for (int j = 0; j < per_group; asks = false) {
            const int count = std::min(kMostHeads, per_group - j);
            for (int i = 0; i < count; ++i) {
                score(q + (j + i) * call_.q_head, end, asks && i == 0, scores_[i]);
                weigh(i, begin, end, first + j + i);
            }
            float* acc = states_.acc + (first + j) * dim_;
            if (count == 4) add_values<4>(begin, end, asks, acc);
            if (count == 3) add_values<3>(begin, end, asks, acc);
            if (count == 2) add_values<2>(begin, end, asks, acc);
            if (count == 1) add_values<1>(begin, end, asks, acc);
            j += count;
        }
    }

    // Scores of the keys below `end`, sixteen at a time. Rows to come are asked for meanwhile.
    void score(const Bf16* q, int end, bool asks, float* scores) const {
        for (int first = 0; first < end; first += kLanes) {
            __m512 total[kLanes];
            for (int n = 0; n < kLanes; ++n) total[n] = _mm512_setzero_ps();
            for (int d = 0; d < dim_; d += kPair) {
                const __m512bh query = load_pairs(q + d);
#pragma GCC unroll 16
                for (int n = 0; n < kLanes; ++n) {
                    if (asks) __builtin_prefetch(rows_.next_keys[first + n] + d, 0, 2);
                    total[n] = _mm512_dpbf16_ps(total[n], query, load_pairs(rows_.keys[first + n] + d));
                }
            }
            _mm512_store_ps(scores + first, sum_each(total));
        }
    }

    // Scores of a head to weights, and its state moved on.
    void weigh(int head, int begin, int end, int64_t state) {
        const float cap = call_.logit_cap, scale = cap > 0.0f ? call_.scale : call_.scale * kLog2e;
        float* scores = scores_[head];
        if (cap > 0.0f)
            for (int n = begin; n < end; ++n)
                scores[n] = cap * kLog2e * std::tanh(scores[n] * scale / cap);
        const __m512 factor = _mm512_set1_ps(cap > 0.0f ? 1.0f : scale);
        __m512 x[kKeys / kLanes], highest = _mm512_set1_ps(states_.top[state]);
        for (int i = 0; i < kKeys / kLanes; ++i) {
            const __m512 value = _mm512_mul_ps(_mm512_load_ps(scores + i * kLanes), factor);
            x[i] = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), seen(i, begin, end), value);
            highest = _mm512_max_ps(x[i], highest);
        }
        const float old = states_.top[state], top = _mm512_reduce_max_ps(highest);
        __m512 added = _mm512_setzero_ps();
        for (int i = 0; i < kKeys / kLanes; ++i) {
            x[i] = exp2_small(_mm512_sub_ps(x[i], _mm512_set1_ps(top)));
            x[i] = _mm512_maskz_mov_ps(seen(i, begin, end), x[i]);
            added = _mm512_add_ps(added, x[i]);
        }
        for (int i = 0; i < kKeys / kLanes; i += 2)
            _mm512_store_si512(weights_[head] + i * kLanes / 2,
                               (__m512i)_mm512_cvtne2ps_pbh(x[i + 1], x[i]));
        if (top > old) {
            const float keep = old <= sgl::kLowest ? 0.0f : std::exp2(old - top);
            float* acc = states_.acc + state * dim_;
            for (int d = 0; d < dim_; d += kLanes)
                _mm512_storeu_ps(acc + d,
                                 _mm512_mul_ps(_mm512_loadu_ps(acc + d), _mm512_set1_ps(keep)));
            states_.sum[state] *= keep;
            states_.top[state] = top;
        }
        states_.sum[state] += _mm512_reduce_add_ps(added);
    }

    // Of lanes [16 i, 16 i + 16): those of the keys [begin, end).
    static __mmask16 seen(int i, int begin, int end) {
        const int from = std::clamp(begin - i * kLanes, 0, kLanes);
        const int to = std::clamp(end - i * kLanes, 0, kLanes);
        return static_cast<__mmask16>(((1u << to) - 1) & ~((1u << from) - 1));
    }

    template <int kHeads>
    void add_values(int begin, int end, bool asks, float* acc) const {
        for (int d = 0; d < dim_; d += kSpan) {
            if (d + kSpan <= dim_) add_span<kHeads, kSpan / kPair>(begin, end, asks, d, acc);
            else add_span<kHeads, 1>(begin, end, asks, d, acc);
        }
    }

    // Adds the weighted values of the head's elements [d, d + kVectors * kPair).
    template <int kHeads, int kVectors>
    void add_span(int begin, int end, bool asks, int d, float* acc) const {
        const __m512i low = _mm512_set_epi16(
            47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4,
            35, 3, 34, 2, 33, 1, 32, 0);
        const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(kLanes));
        __m512 total[kHeads][2 * kVectors];
        for (int j = 0; j < kHeads; ++j)
            for (int i = 0; i < 2 * kVectors; ++i) total[j][i] = _mm512_setzero_ps();
        for (int n = begin & ~1; n < end; n += 2) {
            // A key that is not seen has weight 0, but its row may hold anything.
            const Bf16* a = rows_.values[n < begin ? n + 1 : n] + d;
            const Bf16* b = rows_.values[n + 1 < end ? n + 1 : n] + d;
            __m512bh pairs[2 * kVectors];
            for (int i = 0; i < kVectors; ++i) {
                if (asks) {
                    __builtin_prefetch(rows_.next_values[n] + d + i * kPair, 0, 2);
                    __builtin_prefetch(rows_.next_values[n + 1] + d + i * kPair, 0, 2);
                }
                const __m512i x = _mm512_loadu_si512(a + i * kPair);
                const __m512i y = _mm512_loadu_si512(b + i * kPair);
                pairs[2 * i] = (__m512bh)_mm512_permutex2var_epi16(x, low, y);
                pairs[2 * i + 1] = (__m512bh)_mm512_permutex2var_epi16(x, high, y);
            }
            for (int j = 0; j < kHeads; ++j) {
                const __m512i weight = _mm512_set1_epi32(static_cast<int>(weights_[j][n / 2]));
                for (int i = 0; i < 2 * kVectors; ++i)
                    total[j][i] = _mm512_dpbf16_ps(total[j][i], (__m512bh)weight, pairs[i]);
            }
        }
        for (int j = 0; j < kHeads; ++j)
            for (int i = 0; i < 2 * kVectors; ++i) {
                float* to = acc + j * dim_ + d + i * kLanes;
                _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), total[j][i]));
            }
    }
};

}  // namespace

void sgl::run_decode_dots(const SglAttention& call, const Task& task, const States& states,
                          void* scratch) {
    DotTask(call, task, states, scratch).run();
}

// The blocked kernel with AVX-512's dot products of bf16: a cell is a pair, summed in fp32.
#include "math_avx512.h"

#include "blocked_attention.h"

namespace {

struct PairCells {
    using Number = Bf16;
    static constexpr int kPer = 2;
    static constexpr bool kShort = true;

    static __m512bh pairs(__m512 x) { return reinterpret_cast<__m512bh>(x); }
    static __m512 head(const Bf16* x) { return _mm512_loadu_ps(x); }
    // Elements d + i of two rows come to stand in one cell.
    static void values(const Bf16* const* rows, int d, __m512* out) {
        const __m512i a = _mm512_loadu_si512(rows[0] + d), b = _mm512_loadu_si512(rows[1] + d);
        const __m512i first = _mm512_set_epi16(
            47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4,
            35, 3, 34, 2, 33, 1, 32, 0);
        const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
        out[0] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, first, b));
        out[1] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, second, b));
    }
    static __m512 weights(const __m512* x) {
        return reinterpret_cast<__m512>(_mm512_cvtne2ps_pbh(x[1], x[0]));
    }
    static float weight(const float* cells, int n) {
        return to_float(reinterpret_cast<const Bf16*>(cells)[n]);
    }
    static __m512 add_product(__m512 sum, __m512 a, __m512 b) {
        return _mm512_dpbf16_ps(sum, pairs(a), pairs(b));
    }
};

}  // namespace

void sgl::run_blocked_dots(const SglAttention& call, const Task& task, const States& states,
                           void* scratch) {
    run_blocked<PairCells>(call, task, states, scratch);
}

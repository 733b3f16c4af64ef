// Products of a few bfloat16 rows by dot instructions: AVX-512-BF16.
//
// Vectors run along the inputs, so that a weight's row is multiplied as it lies in memory. Up to kRows
// rows wait for the weight to be read, and go through it in order; more are multiplied in blocks of
// sums that stay in registers, while the next block's weights are asked for. Both add a row up in the
// same way, whatever stands beside it: lane by lane over the inputs, then the lanes.
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "add_lanes.h"
#include "linear.h"
#include "numbers.h"

namespace {

constexpr int kStep = 32;                        // inputs of a vector
constexpr int kRows = 4, kOuts = sgl::kDotOuts;  // 24 sums, 4 inputs, a weight: of 32 registers
constexpr int kRoom = 8;                         // sums of a row, two rows a vector
constexpr int64_t kLine = 64;                    // bytes of a vector, and of the cache's line
constexpr int64_t kInputBytes = 8 << 10;         // of x at a time: a quarter of the first cache
constexpr int64_t kStreamAhead = 8 << 10;        // bytes of the weight asked for ahead
constexpr int64_t kBlockAhead = 13 << 10;        // the same at least, for blocks

inline __m512bh load(const char* from) { return (__m512bh)_mm512_loadu_si512(from); }

// Rows of x and of the weight as bytes, so that both step by a line; `inputs` of each.
struct Operands {
    const char* x;
    const char* weight;
    int64_t x_row, weight_row, inputs;
};

// The lanes of M x N sums added up, into `sums` [M rounded up to 2, kRoom].
template <int M, int N>
inline void add_lanes(const __m512 (&total)[M][N], float* sums) {
#pragma GCC unroll 4
    for (int m = 0; m < M; m += 2) {
        __m512 quarters[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const auto& row = total[m + i / 2 < M ? m + i / 2 : m];
            const int n = i % 2 * 4, end = N - 1;
            quarters[i] = add_quarters(row[n < N ? n : end], row[n + 1 < N ? n + 1 : end],
                                       row[n + 2 < N ? n + 2 : end], row[n + 3 < N ? n + 3 : end]);
        }
        _mm512_storeu_ps(sums + m * kRoom,
                         add_four(quarters[0], quarters[1], quarters[2], quarters[3]));
    }
}

// Adds to `total` the products of a vector of each row, `at` bytes from its start.
template <int M, int N, class Load>
inline void multiply_step(const Operands& rows, int64_t at, const Load& load,
                          __m512 (&total)[M][N]) {
    __m512bh input[M];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) input[m] = load(rows.x + m * rows.x_row + at);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
        const __m512bh part = load(rows.weight + n * rows.weight_row + at);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) total[m][n] = _mm512_dpbf16_ps(total[m][n], input[m], part);
    }
}

// The inputs beyond whole vectors, and the lanes of all.
template <int M, int N>
inline void finish_rows(const Operands& rows, __m512 (&total)[M][N], float* sums) {
    if (const int64_t rest = rows.inputs % kStep) {
        const int64_t done = (rows.inputs - rest) * 2;
        const __mmask32 some = (1u << rest) - 1;
        multiply_step(rows, done, [some](const char* from) {
            return (__m512bh)_mm512_maskz_loadu_epi16(some, from);
        }, total);
    }
    add_lanes(total, sums);
}

// The products of M rows of x with N rows of the weight, into `sums` as add_lanes has them. `ahead` are
// lines that are wanted later, `lines` of them asked for with each vector.
template <int M, int N>
void multiply_block(const Operands& rows, const char* ahead, int64_t lines, float* sums) {
    __m512 total[M][N];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) total[m][n] = _mm512_setzero_ps();
    Operands at = rows;
    for (int64_t steps = rows.inputs / kStep; steps; --steps) {
        for (int64_t i = 0; i < lines; ++i, ahead += kLine) _mm_prefetch(ahead, _MM_HINT_T1);
        multiply_step(at, 0, load, total);
        at.x += kLine;
        at.weight += kLine;
    }
    finish_rows(rows, total, sums);
}

// Half a vector, or a quarter.
struct Half {
    __m256 sum;
    void add(const char* a, const char* b) {
        sum = _mm256_dpbf16_ps(sum, (__m256bh)_mm256_loadu_ps(reinterpret_cast<const float*>(a)),
                               (__m256bh)_mm256_loadu_ps(reinterpret_cast<const float*>(b)));
    }
};
struct Quarter {
    __m128 sum;
    void add(const char* a, const char* b) {
        sum = _mm_dpbf16_ps(sum, (__m128bh)_mm_loadu_ps(reinterpret_cast<const float*>(a)),
                            (__m128bh)_mm_loadu_ps(reinterpret_cast<const float*>(b)));
    }
};

// The same where the weight comes from memory: its rows are read one after the other, as far as those
// of x stay in the first cache. Vectors are loaded in pieces, since a processor runs ahead by so many
// loads: with two to a line it wants more lines at a time than it can wait for, and reads slower.
template <int M, int N>
void multiply_stream(const Operands& rows, float* sums) {
    using Piece = std::conditional_t<M == 1, Quarter, Half>;
    constexpr int kPieces = sizeof(__m512) / sizeof(Piece);
    constexpr int64_t kPart = kInputBytes / M / kLine * kLine;
    const int64_t bytes = rows.inputs / kStep * kLine;
    const int64_t ahead = (kStreamAhead / std::min(kPart, bytes + kLine) + 1) * rows.weight_row;
    Piece total[M][N][kPieces] = {};
    for (int64_t part = 0; part < bytes; part += kPart)
        for (int n = 0; n < N; ++n) {
            const int64_t end = std::min(part + kPart, bytes);
            const char* weight = rows.weight + n * rows.weight_row;
            Piece sum[M][kPieces];
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
                for (int i = 0; i < kPieces; ++i) sum[m][i] = total[m][n][i];
            for (int64_t d = part; d < end; d += kLine) {
                _mm_prefetch(weight + d + ahead, _MM_HINT_T1);
#pragma GCC unroll 4
                for (int i = 0; i < kPieces; ++i) {
                    const int64_t at = d + i * sizeof(Piece);
#pragma GCC unroll 4
                    for (int m = 0; m < M; ++m)
                        sum[m][i].add(rows.x + m * rows.x_row + at, weight + at);
                }
            }
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
                for (int i = 0; i < kPieces; ++i) total[m][n][i] = sum[m][i];
        }
    __m512 whole[M][N];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) whole[m][n] = _mm512_loadu_ps(total[m][n]);
    finish_rows(rows, whole, sums);
}

// Rounds N sums of each row, with their bias, to the outputs from `out` on.
template <int N>
inline void finish(const SglLinear& call, const float* sums, int64_t row, int64_t rows,
                   int64_t out) {
    float bias[2 * kRoom] = {};
    if (call.bias)
        for (int n = 0; n < N; ++n)
            bias[n] = bias[n + kRoom] = to_float(static_cast<const Bf16*>(call.bias)[out + n]);
    Bf16* to = static_cast<Bf16*>(call.out) + row * call.out_row + out;
    for (int64_t m = 0; m < rows; m += 2) {
        const __m512 two = _mm512_loadu_ps(sums + m * kRoom) + _mm512_loadu_ps(bias);
        const __m256bh rounded = _mm512_cvtneps_pbh(two);
        Bf16 both[2 * kRoom];
        std::memcpy(both, &rounded, sizeof both);
        std::memcpy(to + m * call.out_row, both, N * sizeof(Bf16));
        if (m + 1 < rows) std::memcpy(to + (m + 1) * call.out_row, both + kRoom, N * sizeof(Bf16));
    }
}

// Outputs [out, out + N) of all rows.
template <int N>
inline void multiply_outs(const SglLinear& call, int64_t out) {
    const int64_t rows = call.rows, x_row = call.x_row * 2, weight_row = call.weight_row * 2;
    const Operands all{static_cast<const char*>(call.x),
                       static_cast<const char*>(call.weight) + out * weight_row, x_row, weight_row,
                       call.in_features};
    float sums[kRows * kRoom];
    if (rows <= kRows) {
        const auto multiply = rows == 4   ? multiply_stream<4, N>
                              : rows == 3 ? multiply_stream<3, N>
                              : rows == 2 ? multiply_stream<2, N>
                                          : multiply_stream<1, N>;
        multiply(all, sums);
        finish<N>(call, sums, 0, rows, out);
        return;
    }
    const int64_t groups = (rows + kRows - 1) / kRows;
    const int64_t blocks_ahead = kBlockAhead / (N * 2 * all.inputs) + 1;
    const char* next = all.weight + blocks_ahead * N * all.weight_row;
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = rows * g / groups, count = rows * (g + 1) / groups - first;
        const int64_t begin = N * g / groups, lines = N * (g + 1) / groups - begin;
        const auto multiply = count == 4   ? multiply_block<4, N>
                              : count == 3 ? multiply_block<3, N>
                                           : multiply_block<2, N>;
        Operands some = all;
        some.x += first * x_row;
        multiply(some, next + begin * weight_row, lines, sums);
        finish<N>(call, sums, first, count, out);
    }
}

template <int N>
inline void multiply_range(const SglLinear& call, int64_t first, int64_t last) {
    for (int64_t out = first; out < last; out += N)
        // The last block may begin in the one before it, and gives the same numbers again.
        multiply_outs<N>(call, std::min(out, last - N));
}

}  // namespace

void sgl::linear_dots(const SglLinear& call, int64_t first, int64_t last) {
    if (last - first < kOuts)
        multiply_range<1>(call, first, last);
    else
        multiply_range<kOuts>(call, first, last);
}

// Products of rounded inputs with a quantised weight, by dot products of bytes: AVX-512-VNNI.
//
// Four blocks of 32 codes are taken at a time, so that each quarter of a vector belongs to one block
// and its sums meet their scale before anything crosses lanes. Codes are the unsigned side: those of
// 4 bits are so, signed bytes and values become so by adding 128, which the inputs' `offset` takes away
// again.
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "add_lanes.h"
#include "numbers.h"
#include "quantized.h"
#include "quantized_halves.h"
#include "quantized_lines.h"

namespace {

constexpr int kOuts = 4, kRows = 4;      // sums that are added up at a time
constexpr int64_t kMostRows = 8;         // more are multiplied lane by lane
constexpr int64_t kAhead = 8 << 10;      // bytes of the codes asked for ahead

// The lowest scale of each block, or the one after it, in the lanes of its quarter.
template <int kScales, int kWhich>
inline __m512 spread(__m128i halves) {
    constexpr auto pair = [](int block) {
        const int at = 2 * (block * kScales + kWhich);
        return static_cast<short>((at + 1) << 8 | at);
    };
    constexpr short a = pair(0), b = pair(1), c = pair(2), d = pair(3);
    const __m256i order = _mm256_setr_epi16(a, a, a, a, b, b, b, b, c, c, c, c, d, d, d, d);
    return _mm512_cvtph_ps(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(halves), order));
}

// Four blocks of an output: codes as Lines has the inputs, scales and minima for each lane. `kWhole`: all
// four are there.
template <Code kCode, int kScales, bool kMins, bool kWhole>
struct Codes {
    static constexpr int kBits = bits_of(kCode);
    static constexpr bool kSigned = is_signed(kCode);
    static constexpr Lines kLines{kScales, kSigned, kMins};
    __m512i bytes[2];
    __m512 scale[kScales], least[kScales];

    // `some` blocks from `first` on.
    Codes(const SglQuantized& call, const Halves<kCode>& halves, int64_t out, int64_t first,
          int64_t some) {
        const char* codes = static_cast<const char*>(call.codes) + out * call.code_row;
        const char* from = codes + first * kBlock * kBits / 8;
        const uint32_t words = kWhole ? ~0u : (1u << some * kBits) - 1;
        if (kBits == 4) {
            halves.spread(load_words(words, from), bytes[0], bytes[1]);
        } else {
            const __m512i a = load_words(words, from);
            const __m512i b = load_words(words >> 16, from + 64);
            const __m512i sign = _mm512_set1_epi8(-128);
            bytes[0] = _mm512_xor_si512(_mm512_shuffle_i32x4(a, b, 0x88), sign);
            bytes[1] = _mm512_xor_si512(_mm512_shuffle_i32x4(a, b, 0xdd), sign);
        }
        const int64_t at = out * call.scale_row + first * kScales;
        take(some, static_cast<const Fp16*>(call.scales) + at, scale);
        if (kMins) take(some, static_cast<const Fp16*>(call.mins) + at, least);
    }

    static void take(int64_t some, const Fp16* from, __m512 (&to)[kScales]) {
        const auto* all = reinterpret_cast<const __m128i*>(from);
        const __mmask8 which = (1u << some * kScales) - 1;
        const __m128i halves = !kWhole        ? _mm_maskz_loadu_epi16(which, from)
                               : kScales == 1 ? _mm_loadl_epi64(all)
                                              : _mm_loadu_si128(all);
        to[0] = spread<kScales, 0>(halves);
        if (kScales == 2) to[kScales - 1] = spread<kScales, kScales - 1>(halves);
    }

    // The sum that grew so far, and what `x` adds to it.
    __m512 add(__m512 sum, const char* x) const {
        __m512i dots = _mm512_setzero_si512();
        const __m512 scale_x = _mm512_loadu_ps(x + 2 * 64);
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            const bool starts = i == 0 || kScales == 2, ends = i == 1 || kScales == 2;
            const int s = kScales == 2 ? i : 0;
            if (starts)
                dots = kSigned ? _mm512_loadu_si512(x + kLines.offset(s) * 64)
                               : _mm512_setzero_si512();
            dots = _mm512_dpbusd_epi32(dots, bytes[i], _mm512_loadu_si512(x + i * 64));
            if (!ends) continue;
            sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), scale[s] * scale_x, sum);
            if (kMins) sum = _mm512_fmadd_ps(least[s], _mm512_loadu_ps(x + kLines.sum(s) * 64), sum);
        }
        return sum;
    }
};

// Adds what four blocks of output `out` give: `part` counts them. `kWhole`: all four are there.
template <Code kCode, int kScales, bool kMins, bool kWhole, int M>
inline void add_part(const SglQuantized& call, const Halves<kCode>& halves, const char* x,
                     int64_t parts, int64_t part, int64_t out, __m512 (&sum)[M]) {
    constexpr int kBits = bits_of(kCode);
    const int64_t first = part * kBlocks;
    const char* ahead = static_cast<const char*>(call.codes) + out * call.code_row +
                        first * kBlock * kBits / 8 + kAhead;
    for (int line = 0; line < kBits / 4; ++line) _mm_prefetch(ahead + 64 * line, _MM_HINT_T1);
    const int64_t some = kWhole ? kBlocks : call.in_features / kBlock - first;
    const Codes<kCode, kScales, kMins, kWhole> codes(call, halves, out, first, some);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
        sum[m] = codes.add(sum[m], x + (m * parts + part) * codes.kLines.count() * 64);
}

// M rows times the kOuts outputs from `out` on, or those below `last`: [kRows, kOuts]. One row waits
// for the codes, so it reads an output's one after the other; more stay near while outputs change.
template <Code kCode, int kScales, bool kMins, int M>
void multiply_block(const SglQuantized& call, const char* x, int64_t out, int64_t last,
                    float* result) {
    const int64_t parts = parts_of(call), whole = call.in_features / kBlock / kBlocks;
    const Halves<kCode> halves(call);
    __m512 total[kOuts][M];
#pragma GCC unroll 4
    for (int n = 0; n < kOuts; ++n)
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) total[n][m] = _mm512_setzero_ps();
    const auto which = [&](int n) { return std::min<int64_t>(out + n, last - 1); };
    const auto add = [&](int n, int64_t part) __attribute__((always_inline)) {
        add_part<kCode, kScales, kMins, true>(call, halves, x, parts, part, which(n), total[n]);
    };
    if (M == 1) {
#pragma GCC unroll 4
        for (int n = 0; n < kOuts; ++n)
            for (int64_t part = 0; part < whole; ++part) add(n, part);
    } else {
        for (int64_t part = 0; part < whole; ++part)
#pragma GCC unroll 4
            for (int n = 0; n < kOuts; ++n) add(n, part);
    }
    if (whole < parts)
#pragma GCC unroll 4
        for (int n = 0; n < kOuts; ++n)
            add_part<kCode, kScales, kMins, false>(call, halves, x, parts, whole, which(n), total[n]);
    __m512 quarters[kRows];
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m) {
        const int row = m < M ? m : M - 1;
        quarters[m] = add_quarters(total[0][row], total[1][row], total[2][row], total[3][row]);
    }
    _mm512_storeu_ps(result, add_four(quarters[0], quarters[1], quarters[2], quarters[3]));
}

// Rounds kOuts sums of each row, of `result` [kRows, kOuts], to bfloat16.
inline void finish_whole(const SglQuantized& call, const float* result, int64_t row, int64_t rows,
                         int64_t out) {
    alignas(64) float bias[kRows * kOuts] = {};
    if (call.bias)
        for (int64_t i = 0; i < kRows * kOuts; ++i)
            bias[i] = to_float(static_cast<const Bf16*>(call.bias)[out + i % kOuts]);
    const __m512 sums = _mm512_fmadd_ps(_mm512_loadu_ps(result), _mm512_set1_ps(call.gain),
                                        _mm512_load_ps(bias));
    const __m256bh rounded = _mm512_cvtneps_pbh(sums);
    Bf16 all[kRows * kOuts];
    std::memcpy(all, &rounded, sizeof all);
    Bf16* to = static_cast<Bf16*>(call.out) + row * call.out_row + out;
    for (int64_t m = 0; m < rows; ++m)
        std::memcpy(to + m * call.out_row, all + m * kOuts, kOuts * sizeof(Bf16));
}

template <class T>
inline void finish(const SglQuantized& call, const float* result, int64_t row, int64_t rows,
                   int64_t out, int64_t last) {
    const T* bias = static_cast<const T*>(call.bias);
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t n = 0; n < kOuts && out + n < last; ++n)
            store(result[m * kOuts + n] * call.gain + (bias ? to_float(bias[out + n]) : 0.0f),
                  static_cast<T*>(call.out) + (row + m) * call.out_row + out + n);
}

template <Code kCode, int kScales, bool kMins>
void multiply_range(const SglQuantized& call, const char* x, int64_t first, int64_t last) {
    const int64_t row_bytes = parts_of(call) * lines_of(call).count() * 64;
    for (int64_t out = first; out < last; out += kOuts)
        for (int64_t row = 0; row < call.rows; row += kRows) {
            const int64_t rows = std::min<int64_t>(kRows, call.rows - row);
            const auto multiply = rows == 4   ? multiply_block<kCode, kScales, kMins, 4>
                                  : rows == 3 ? multiply_block<kCode, kScales, kMins, 3>
                                  : rows == 2 ? multiply_block<kCode, kScales, kMins, 2>
                                              : multiply_block<kCode, kScales, kMins, 1>;
            float result[kRows * kOuts];
            multiply(call, x + row * row_bytes, out, last, result);
            if (call.dtype == SGL_BFLOAT16 && out + kOuts <= last) {
                finish_whole(call, result, row, rows, out);
                continue;
            }
            if (call.dtype == SGL_FLOAT32) finish<float>(call, result, row, rows, out, last);
            if (call.dtype == SGL_BFLOAT16) finish<Bf16>(call, result, row, rows, out, last);
            if (call.dtype == SGL_FLOAT16) finish<Fp16>(call, result, row, rows, out, last);
        }
}

template <Code kCode, int kScales>
void multiply_layout(const SglQuantized& call, const char* x, int64_t first, int64_t last) {
    if (call.mins)
        multiply_range<kCode, kScales, true>(call, x, first, last);
    else
        multiply_range<kCode, kScales, false>(call, x, first, last);
}

// 32 inputs into quarter `at` of `to`; its scale.
inline float round_block(const float* x, int64_t at, char* to) {
    const __m512 halves[2] = {_mm512_loadu_ps(x), _mm512_loadu_ps(x + 16)};
    const __m512 top = _mm512_max_ps(_mm512_abs_ps(halves[0]), _mm512_abs_ps(halves[1]));
    const float largest = _mm512_reduce_max_ps(top);
    // NaN is no less than anything: the comparison finds it where the maximum may not.
    const __m512 infinity = _mm512_set1_ps(__builtin_inff());
    const bool finite = !(_mm512_cmp_ps_mask(_mm512_abs_ps(halves[0]), infinity, _CMP_NLT_UQ) |
                          _mm512_cmp_ps_mask(_mm512_abs_ps(halves[1]), infinity, _CMP_NLT_UQ));
    const float inverse = finite && largest > 1e-36f ? 127.0f / largest : 0.0f;
    for (int i = 0; i < 2; ++i) {
        const __m512i rounded = _mm512_cvtps_epi32(halves[i] * _mm512_set1_ps(inverse));
        const __m128i bytes = inverse ? _mm512_cvtepi32_epi8(rounded) : _mm_setzero_si128();
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 64 * i + 16 * at), bytes);
    }
    if (!finite) return __builtin_nanf("");
    return inverse ? largest / 127.0f : 0.0f;
}

// What the lanes of the bytes at `to` add up to, as `lines` has it.
inline void sum_lanes(const Lines& lines, char* to) {
    const __m512i ones = _mm512_set1_epi8(1), zero = _mm512_setzero_si512();
    const __m512 scale = _mm512_loadu_ps(to + 2 * 64);
    __m512i sum[2];
    for (int i = 0; i < 2; ++i)
        sum[i] = _mm512_dpbusd_epi32(zero, ones, _mm512_loadu_si512(to + 64 * i));
    if (lines.scales == 1) sum[0] = _mm512_add_epi32(sum[0], sum[1]);
    for (int s = 0; s < lines.scales; ++s) {
        if (lines.offsets)
            _mm512_storeu_si512(to + 64 * lines.offset(s),
                                _mm512_sub_epi32(zero, _mm512_slli_epi32(sum[s], 7)));
        if (lines.minima)
            _mm512_storeu_ps(to + 64 * lines.sum(s), _mm512_cvtepi32_ps(sum[s]) * scale);
    }
}

int64_t rounded_bytes(const SglQuantized& call) {
    return call.rows * parts_of(call) * lines_of(call).count() * 64;
}

void round_inputs(const SglQuantized& call, const float* x, char* to) {
    const Lines lines = lines_of(call);
    const int64_t blocks = call.in_features / kBlock;
    for (int64_t row = 0; row < call.rows; ++row)
        for (int64_t first = 0; first < blocks; first += kBlocks, to += lines.count() * 64) {
            std::memset(to, 0, 3 * 64);
            const float* from = x + row * call.in_features + first * kBlock;
            for (int64_t b = 0; b < kBlocks && first + b < blocks; ++b) {
                const __m128 scale = _mm_set1_ps(round_block(from + b * kBlock, b, to));
                _mm_storeu_ps(reinterpret_cast<float*>(to + 2 * 64) + 4 * b, scale);
            }
            sum_lanes(lines, to);
        }
}

void multiply_rounded(const SglQuantized& call, const char* x, int64_t first, int64_t last) {
    if (call.rows > kMostRows) {
        sgl::multiply_lanes(call, x, first, last);
        return;
    }
    const Code code = code_of(call);
    if (code == Code::kHalf) multiply_layout<Code::kHalf, 1>(call, x, first, last);
    if (code == Code::kNamed) multiply_layout<Code::kNamed, 1>(call, x, first, last);
    if (code != Code::kByte) return;
    if (call.group == 32) multiply_layout<Code::kByte, 1>(call, x, first, last);
    if (call.group == 16) multiply_layout<Code::kByte, 2>(call, x, first, last);
}

}  // namespace

const sgl::RoundedProduct sgl::rounded_dots{rounded_bytes, round_inputs, multiply_rounded};

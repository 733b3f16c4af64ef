// Products of a few rounded rows with a quantised weight by sums of bytes, in AVX2's vectors.
//
// A vector runs along the inputs of one output, and each half of it belongs to one scale, so that sums
// of four meet their scale before anything crosses lanes. The including file brings the `Sums` of
// byte_sums.h.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "byte_sums.h"
#include "four_outputs.h"
#include "numbers.h"
#include "quantized.h"
#include "rounded_parts.h"

namespace {

constexpr int kFew = 4;               // rows, or rows times outputs, whose sums grow at a time
constexpr int64_t kAhead = 4 << 10;   // bytes of the codes asked for ahead

// How the scales of a part are read: all 8, or those that a row's last part has. These end with the
// row, so they are read with some before them, and moved down.
class Scales {
  public:
    Scales(int64_t some, int64_t of_row) : some_(some), back_(kPartScales - some) {
        copied_ = of_row < kPartScales;
        const int64_t back = copied_ ? 0 : back_;
        int8_t split[16], plain[16];
        for (int s = 0; s < kPartScales; ++s)
            for (int i = 0; i < 2; ++i) {
                const int64_t at = s < some ? 2 * (s + back) + i : -1;
                plain[2 * s + i] = split[2 * scale_place(s) + i] = static_cast<int8_t>(at);
            }
        split_ = _mm_loadu_si128(reinterpret_cast<const __m128i*>(split));
        plain_ = _mm_loadu_si128(reinterpret_cast<const __m128i*>(plain));
    }

    // As a row has them in its parts: those of lower halves first. `kWhole`: all 8.
    template <bool kWhole>
    __m256 split(const Fp16* from) const { return read<kWhole>(from, split_); }
    template <bool kWhole>
    __m256 plain(const Fp16* from) const {
        return kWhole ? _mm256_cvtph_ps(load(from)) : read<false>(from, plain_);
    }

  private:
    int64_t some_, back_;
    bool copied_;
    __m128i split_, plain_;

    static __m128i load(const Fp16* from) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    }
    template <bool kWhole>
    __m256 read(const Fp16* from, __m128i order) const {
        Fp16 copy[kPartScales];
        if (kWhole) {
            // all there
        } else if (copied_) {
            std::memset(copy, 0, sizeof copy);
            for (int64_t s = 0; s < some_; ++s) copy[s] = from[s];
            from = copy;
        } else {
            from -= back_;
        }
        return _mm256_cvtph_ps(_mm_shuffle_epi8(load(from), order));
    }
};

// The codes of step `step` of a part that begins at `from`, as Part has the inputs, or what they name of
// `values`. `half`: there is no second block.
template <Code kCode, int kScales>
inline void take_codes(const char* from, int step, bool half, __m256i values,
                       __m256i (&to)[Part<kScales>::kVectors]) {
    const auto load = [&](int64_t at) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + at));
    };
    const auto load_both = [&](int64_t low, int64_t high) {
        const __m256i first = _mm256_castsi128_si256(load(low));
        return _mm256_inserti128_si256(first, half ? _mm_setzero_si128() : load(high), 1);
    };
    if (kCode != Code::kByte) {
        const __m256i both = half ? load_both(32 * step, 0)
                                  : _mm256_loadu_si256(
                                        reinterpret_cast<const __m256i*>(from + 32 * step));
        const __m256i low = _mm256_set1_epi8(15);
        to[0] = _mm256_and_si256(both, low);
        to[Part<kScales>::kVectors - 1] = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
        if (kCode != Code::kHalf)
            for (__m256i& some : to) some = _mm256_shuffle_epi8(values, some);
    } else if (kScales == 2) {
        to[0] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32 * step));
    } else {
        to[0] = load_both(64 * step, 64 * step + 32);
        to[Part<kScales>::kVectors - 1] = load_both(64 * step + 16, 64 * step + 48);
    }
}

// Sums of four products of a step's codes, and of their `sizes` where they are signed, with a row's inputs
// at `x`. `shift`: its lanes for small values.
template <class Sums, Code kCode, int kVectors>
inline __m256i add_step(const __m256i (&codes)[kVectors], const __m256i (&sizes)[kVectors],
                        const char* x, const char* shift) {
    constexpr bool kSigned = kCode == Code::kNamed || kCode == Code::kByte;
    __m256i values[kVectors];
#pragma GCC unroll 2
    for (int i = 0; i < kVectors; ++i) {
        values[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 32 * i));
        if (kSigned) values[i] = _mm256_sign_epi8(values[i], codes[i]);
    }
    if (kCode == Code::kSmall)
        return Sums::add_halves(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(shift)), codes,
                                values);
    return kSigned ? Sums::of_bytes(sizes, values) : Sums::of_halves(codes, values);
}

// An output's codes, scales and minima.
struct Output {
    const char* codes;
    const Fp16 *scales, *mins;

    Output(const SglQuantized& call, int64_t out)
        : codes(static_cast<const char*>(call.codes) + out * call.code_row),
          scales(static_cast<const Fp16*>(call.scales) + out * call.scale_row),
          mins(static_cast<const Fp16*>(call.mins) + out * call.scale_row) {}
};

// Adds what part `part` of one output gives with M rows, `row` bytes apart. `blocks`: of the part.
template <class Sums, Code kCode, int kScales, bool kMins, bool kWhole, int M>
inline __attribute__((always_inline)) void add_part(const Output& output, __m256i values,
                                                    const Scales& scales, int64_t part,
                                                    int64_t blocks, const char* x, int64_t row,
                                                    __m256 (&total)[M]) {
    using P = Part<kScales>;
    constexpr int kBits = bits_of(kCode);
    const char* codes = output.codes + part * P::kBlocks * kBlock * kBits / 8;
    constexpr int kBytes = P::kBlocks * kBlock * kBits / 8;
#pragma GCC unroll 4
    for (int at = 0; at < kBytes; at += 64) _mm_prefetch(codes + kAhead + at, _MM_HINT_T1);
    const __m256 scale = scales.template split<kWhole>(output.scales + part * kPartScales);
    __m256 both[M];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
        both[m] = _mm256_mul_ps(scale, _mm256_loadu_ps(reinterpret_cast<const float*>(
                                           x + m * row + P::kScaleAt)));
#pragma GCC unroll 4
    for (int step = 0; step < kSteps; ++step) {
        const int64_t first = step * (2 / kScales);
        if (!kWhole && first >= blocks) break;
        __m256i code[P::kVectors], size[P::kVectors];
        take_codes<kCode, kScales>(codes, step, !kWhole && kScales == 1 && first + 1 == blocks,
                                   values, code);
        for (int i = 0; i < P::kVectors; ++i) size[i] = _mm256_abs_epi8(code[i]);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
            const char* from = x + m * row;
            const __m256i sum =
                add_step<Sums, kCode>(code, size, from + step * P::kVectors * 32,
                                      from + P::shift_at(kMins) + step * 32);
            const __m256 spread = step == 0   ? _mm256_permute_ps(both[m], 0x00)
                                  : step == 1 ? _mm256_permute_ps(both[m], 0x55)
                                  : step == 2 ? _mm256_permute_ps(both[m], 0xaa)
                                              : _mm256_permute_ps(both[m], 0xff);
            total[m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), spread, total[m]);
        }
    }
    if (!kMins) return;
    const __m256 least = scales.template plain<kWhole>(output.mins + part * kPartScales);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
        total[m] = _mm256_fmadd_ps(
            least, _mm256_loadu_ps(reinterpret_cast<const float*>(x + m * row + P::kSumAt)),
            total[m]);
}

// The lanes of each of four vectors added up.
inline __m128 add_lanes(__m256 a, __m256 b, __m256 c, __m256 d) {
    const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

// How scales of whole parts are read, and of a last one that is none.
struct Ends {
    Scales whole, rest;
};

// M rows times the N outputs from `out` on, or those below `last`: [M, N].
template <class Sums, Code kCode, int kScales, bool kMins, int M, int N>
inline __m128 multiply_block(const SglQuantized& call, const Ends& ends, const char* x, int64_t row,
                             int64_t out, int64_t last) {
    using P = Part<kScales>;
    const int64_t blocks = call.in_features / kBlock, whole = blocks / P::kBlocks;
    const int64_t rest = blocks % P::kBlocks, bytes = P::bytes(kMins, kCode == Code::kSmall);
    const __m256i named = values_of<kCode>(call);
    __m256 total[N][M];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
        const Output output(call, std::min<int64_t>(out + n, last - 1));
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) total[n][m] = _mm256_setzero_ps();
        const char* values = x;
        for (int64_t part = 0; part < whole; ++part, values += bytes)
            add_part<Sums, kCode, kScales, kMins, true>(output, named, ends.whole, part, P::kBlocks,
                                                        values, row, total[n]);
        if (rest)
            add_part<Sums, kCode, kScales, kMins, false>(output, named, ends.rest, whole, rest,
                                                         values, row, total[n]);
    }
    const auto sum = [&](int i) { return total[i % N][std::min(i / N, M - 1)]; };
    return add_lanes(sum(0), sum(1), sum(2), sum(3));
}

// Stores sums [rows, outs] of the rows from `row` on, for those outputs from `out` on that are below
// `last`.
template <class T>
inline void finish_sums(const SglQuantized& call, __m128 sums, int64_t row, int64_t rows, int64_t out,
                        int64_t outs, int64_t last) {
    if (rows == 1) {
        const int64_t some = std::min(outs, last - out);
        finish_row<T>(call, sums, four_biases<T>(call.bias, out, some), row, out, some);
        return;
    }
    alignas(16) float bias[kFew] = {};
    T all[kFew];
    if (call.bias)
        for (int64_t i = 0; i < rows * outs; ++i)
            bias[i] = to_float(static_cast<const T*>(call.bias)[std::min(out + i % outs, last - 1)]);
    round_four(_mm_fmadd_ps(sums, _mm_set1_ps(call.gain), _mm_load_ps(bias)), all);
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t n = 0; n < outs && out + n < last; ++n)
            static_cast<T*>(call.out)[(row + m) * call.out_row + out + n] = all[m * outs + n];
}

template <class Sums, Code kCode, int kScales, bool kMins>
void multiply_few(const SglQuantized& call, const char* x, int64_t first, int64_t last) {
    const int64_t bytes = row_bytes(call), blocks = call.in_features / kBlock;
    const Ends ends{{kPartScales, kPartScales},
                    {blocks % Part<kScales>::kBlocks * kScales, blocks * kScales}};
    const int64_t most = std::min<int64_t>(kFew, call.rows);
    const int64_t outs = most == 1 ? 4 : most == 2 ? 2 : 1;
    for (int64_t out = first; out < last; out += outs)
        for (int64_t row = 0; row < call.rows; row += most) {
            const int64_t rows = std::min<int64_t>(most, call.rows - row);
            const auto multiply = rows == 4   ? multiply_block<Sums, kCode, kScales, kMins, 4, 1>
                                  : rows == 3 ? multiply_block<Sums, kCode, kScales, kMins, 3, 1>
                                  : outs == 2 ? multiply_block<Sums, kCode, kScales, kMins, 2, 2>
                                  : rows == 2 ? multiply_block<Sums, kCode, kScales, kMins, 2, 1>
                                  : outs == 4 ? multiply_block<Sums, kCode, kScales, kMins, 1, 4>
                                              : multiply_block<Sums, kCode, kScales, kMins, 1, 1>;
            const __m128 sums = multiply(call, ends, x + row * bytes, bytes, out, last);
            if (call.dtype == SGL_FLOAT32) finish_sums<float>(call, sums, row, rows, out, outs, last);
            if (call.dtype == SGL_BFLOAT16) finish_sums<Bf16>(call, sums, row, rows, out, outs, last);
            if (call.dtype == SGL_FLOAT16) finish_sums<Fp16>(call, sums, row, rows, out, outs, last);
        }
}

}  // namespace

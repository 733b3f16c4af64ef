// Products of more than a few rounded rows with codes of 4 bits by sums of bytes, in AVX2's vectors.
//
// A lane is a row. It holds four of the row's inputs and meets four codes of an output, which are the
// same in all lanes, so that a block's sum stands whole in its lane and meets its scale once. Codes
// become bytes once for all rows, a part of a few outputs at a time: those that name small values become
// these, shifted.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "byte_sums.h"
#include "four_outputs.h"
#include "numbers.h"
#include "quantized.h"
#include "rounded_parts.h"
#include "scratch.h"

namespace {

constexpr int kLanes = 8, kOuts = 4;         // rows of a vector, outputs at a time
constexpr int64_t kPackedBytes = 192 << 10;  // of packed rows at a time, so that they stay near

// Transposes 8 x 8 dwords.
inline void transpose(__m256i (&rows)[8]) {
    __m256i t[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        rows[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
        rows[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
        rows[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
        rows[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm256_permute2x128_si256(rows[i], rows[i + 4], 0x20);
        t[i + 4] = _mm256_permute2x128_si256(rows[i], rows[i + 4], 0x31);
    }
    for (int i = 0; i < 8; ++i) rows[i] = t[i];
}

// How 8 rows lie: block by block 8 vectors of inputs, the rows' scales, for minima their sums and for
// small values what PairSums takes their shift away with.
template <Code kCode, bool kMins>
struct Packed {
    using P = Part<1>;
    static constexpr int kScaleAt = kBlock * kLanes, kSumAt = kScaleAt + 32;
    static constexpr int kShiftAt = kSumAt + kMins * 32;
    static constexpr bool kSmall = kCode == Code::kSmall;
    static constexpr int64_t kBlockBytes = kShiftAt + kSmall * 32;
    static constexpr int64_t kPartBytes = P::kBlocks * kBlockBytes;

    // Part `part` of rows from `row` on, of which those that there are count, from lines into lanes.
    static void pack(const SglQuantized& call, const char* x, int64_t row, int64_t part, char* to) {
        const int64_t bytes = row_bytes(call), rows = std::min<int64_t>(kLanes, call.rows - row);
        const char* from = x + row * bytes + part * P::bytes(kMins, kSmall);
        for (int64_t b = 0; b < P::kBlocks; ++b) {
            __m256i inputs[kLanes];
            for (int m = 0; m < kLanes; ++m)
                inputs[m] = m < rows ? _mm256_set_m128i(half(from + P::half(b, 1) + m * bytes),
                                                        half(from + P::half(b, 0) + m * bytes))
                                     : _mm256_setzero_si256();
            transpose(inputs);
            for (int i = 0; i < kLanes; ++i) store(inputs[i], to + b * kBlockBytes + i * 32);
            if (kSmall) store(shift_of(inputs), to + b * kBlockBytes + kShiftAt);
        }
        __m256i floats[kLanes];
        take(from + P::kScaleAt, bytes, rows, floats);
        for (int b = 0; b < P::kBlocks; ++b)
            store(floats[scale_place(b)], to + b * kBlockBytes + kScaleAt);
        if (!kMins) return;
        take(from + P::kSumAt, bytes, rows, floats);
        for (int b = 0; b < P::kBlocks; ++b) store(floats[b], to + b * kBlockBytes + kSumAt);
    }

  private:
    static __m128i half(const char* from) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    }
    static void store(__m256i x, char* to) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(to), x);
    }
    static __m256i shift_of(const __m256i (&inputs)[kLanes]) {
        __m256i shift = _mm256_setzero_si256();
        for (const __m256i& four : inputs)
            shift = _mm256_sub_epi16(shift, _mm256_maddubs_epi16(_mm256_set1_epi8(kShift), four));
        return shift;
    }
    static void take(const char* from, int64_t bytes, int64_t rows, __m256i (&to)[kLanes]) {
        for (int m = 0; m < kLanes; ++m)
            to[m] = m < rows ? _mm256_loadu_si256(
                                   reinterpret_cast<const __m256i*>(from + m * bytes))
                             : _mm256_setzero_si256();
        transpose(to);
    }
};

// Codes of kOuts outputs as bytes, a part at a time, and their scales as floats.
template <Code kCode, bool kMins>
struct Codes {
    using P = Part<1>;
    alignas(32) char codes[kOuts][P::kBlocks * kBlock];
    float scale[kOuts][kPartScales], least[kOuts][kPartScales];

    // Blocks [first, first + blocks) of the outputs from `out` on; those at `last` and beyond are as
    // the one before.
    void take(const SglQuantized& call, int64_t out, int64_t last, int64_t first, int64_t blocks) {
        const __m256i shifted = values_of<kCode>(call);
        for (int n = 0; n < kOuts; ++n) {
            const int64_t which = std::min(out + n, last - 1);
            const char* from = static_cast<const char*>(call.codes) + which * call.code_row +
                               first * (kBlock / 2);
            for (int64_t b = 0; b < blocks; ++b)
                spread(from + b * (kBlock / 2), shifted, codes[n] + b * kBlock);
            const int64_t at = which * call.scale_row + first;
            widen(static_cast<const Fp16*>(call.scales) + at, blocks, scale[n]);
            if (kMins) widen(static_cast<const Fp16*>(call.mins) + at, blocks, least[n]);
        }
    }

  private:
    static void spread(const char* from, __m256i shifted, char* to) {
        const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        __m256i both = _mm256_set_m128i(_mm_srli_epi16(a, 4), a);
        both = _mm256_and_si256(both, _mm256_set1_epi8(15));
        if (kCode == Code::kSmall) both = _mm256_shuffle_epi8(shifted, both);
        _mm256_store_si256(reinterpret_cast<__m256i*>(to), both);
    }
    static void widen(const Fp16* from, int64_t count, float* to) {
        if (count == kPartScales) {
            const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
            _mm256_storeu_ps(to, _mm256_cvtph_ps(halves));
            return;
        }
        for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]);
    }
};

// Four codes in all lanes.
inline __m256i same_codes(const char* at) {
    int32_t four;
    std::memcpy(&four, at, 4);
    return _mm256_set1_epi32(four);
}

// Adds what `blocks` blocks give to the sums of 8 packed rows, [kOuts, 8] at `sums`.
template <class Sums, Code kCode, bool kMins>
inline void add_blocks(const Codes<kCode, kMins>& codes, const char* x, int64_t blocks,
                       float* sums) {
    using Rows = Packed<kCode, kMins>;
    __m256 total[kOuts];
    for (int n = 0; n < kOuts; ++n) total[n] = _mm256_load_ps(sums + n * kLanes);
    for (int64_t b = 0; b < blocks; ++b, x += Rows::kBlockBytes) {
        const __m256i* inputs = reinterpret_cast<const __m256i*>(x);
        const __m256 scale_x = _mm256_load_ps(reinterpret_cast<const float*>(x + Rows::kScaleAt));
        __m256i value[kLanes];
#pragma GCC unroll 8
        for (int i = 0; i < kLanes; ++i) value[i] = _mm256_load_si256(inputs + i);
#pragma GCC unroll 4
        for (int n = 0; n < kOuts; ++n) {
            __m256i code[kLanes];
#pragma GCC unroll 8
            for (int i = 0; i < kLanes; ++i)
                code[i] = same_codes(codes.codes[n] + b * kBlock + 4 * i);
            const __m256i sum =
                kCode == Code::kSmall
                    ? Sums::of_shifted(code, value, _mm256_load_si256(inputs + Rows::kShiftAt / 32))
                    : Sums::of_halves(code, value);
            const __m256 scale = _mm256_mul_ps(scale_x, _mm256_set1_ps(codes.scale[n][b]));
            total[n] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, total[n]);
            if (kMins)
                total[n] = _mm256_fmadd_ps(
                    _mm256_set1_ps(codes.least[n][b]),
                    _mm256_load_ps(reinterpret_cast<const float*>(x + Rows::kSumAt)), total[n]);
        }
    }
    for (int n = 0; n < kOuts; ++n) _mm256_store_ps(sums + n * kLanes, total[n]);
}

// Sums [kOuts, 8 rows] of the rows from `row` on to `outs` outputs from `out` on.
template <class T>
inline void finish_rows(const SglQuantized& call, const float* sums, int64_t row, int64_t out,
                        int64_t outs) {
    const int64_t rows = std::min<int64_t>(kLanes, call.rows - row);
    const __m128 bias = four_biases<T>(call.bias, out, outs);
    for (int64_t half = 0; half < rows; half += 4) {
        __m128 four[4];
        for (int n = 0; n < kOuts; ++n) four[n] = _mm_load_ps(sums + n * kLanes + half);
        _MM_TRANSPOSE4_PS(four[0], four[1], four[2], four[3]);
        for (int64_t m = half; m < std::min(rows, half + 4); ++m)
            finish_row<T>(call, four[m - half], bias, row + m, out, outs);
    }
}

// Rows that are packed at `x`, part by part and 8 rows after the other, times kOuts outputs from `out`
// on, or those below `last`. `sums`: room for them all.
template <class Sums, Code kCode, bool kMins>
void multiply_packed(const SglQuantized& call, const char* x, int64_t out, int64_t last,
                     float* sums) {
    using P = Part<1>;
    const int64_t blocks = call.in_features / kBlock, tiles = (call.rows + kLanes - 1) / kLanes;
    const int64_t outs = std::min<int64_t>(kOuts, last - out);
    Codes<kCode, kMins> codes;
    std::fill_n(sums, tiles * kLanes * kOuts, 0.0f);
    for (int64_t first = 0; first < blocks; first += P::kBlocks) {
        const int64_t some = std::min<int64_t>(P::kBlocks, blocks - first);
        codes.take(call, out, last, first, some);
        for (int64_t tile = 0; tile < tiles; ++tile, x += Packed<kCode, kMins>::kPartBytes)
            add_blocks<Sums>(codes, x, some, sums + tile * kLanes * kOuts);
    }
    for (int64_t tile = 0; tile < tiles; ++tile, sums += kLanes * kOuts) {
        const int64_t row = tile * kLanes;
        if (call.dtype == SGL_FLOAT32) finish_rows<float>(call, sums, row, out, outs);
        if (call.dtype == SGL_BFLOAT16) finish_rows<Bf16>(call, sums, row, out, outs);
        if (call.dtype == SGL_FLOAT16) finish_rows<Fp16>(call, sums, row, out, outs);
    }
}

template <class Sums, Code kCode, bool kMins>
void multiply_many(const SglQuantized& whole, const char* x, int64_t first, int64_t last) {
    thread_local sgl::Scratch room;
    using Rows = Packed<kCode, kMins>;
    const int64_t parts = Part<1>::count(whole.in_features / kBlock);
    const int64_t bytes = parts * Rows::kPartBytes;
    const int64_t most = std::max<int64_t>(1, kPackedBytes / bytes);
    const int64_t tiles = std::min<int64_t>(most, (whole.rows + kLanes - 1) / kLanes);
    char* packed = room.take(tiles * (bytes + kLanes * kOuts * 4));
    float* sums = reinterpret_cast<float*>(packed + tiles * bytes);
    for (int64_t row = 0; row < whole.rows; row += most * kLanes) {
        const SglQuantized call =
            rows_of(whole, row, std::min<int64_t>(most * kLanes, whole.rows - row));
        char* to = packed;
        for (int64_t part = 0; part < parts; ++part)
            for (int64_t m = 0; m < call.rows; m += kLanes, to += Rows::kPartBytes)
                Rows::pack(call, x + row * row_bytes(call), m, part, to);
        for (int64_t out = first; out < last; out += kOuts)
            multiply_packed<Sums, kCode, kMins>(call, packed, out, last, sums);
    }
}

}  // namespace

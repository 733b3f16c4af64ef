// Products of more than a few rounded rows with a quantised weight, by dot products of bytes:
// AVX-512-VNNI.
//
// A lane is a row. It holds four of the row's inputs and meets four codes of an output, which are the
// same in all lanes, so that a block's sum stands whole in its lane and meets its scale once. Codes are
// the unsigned side, as in quantized_dots.cpp.
#include <immintrin.h>

#include <algorithm>

#include "numbers.h"
#include "quantized.h"
#include "quantized_halves.h"
#include "quantized_lines.h"
#include "scratch.h"
#include "transpose.h"

namespace {

constexpr int kLanes = 16, kOuts = 16;  // rows of a vector, sums in registers
constexpr int kFours = kBlock / 4;      // vectors of a block's inputs
constexpr int kSums = kLanes * kOuts;

// A block of 16 rows is so many vectors: its inputs, their scales, then what Lines has for each scale,
// of the whole block or half of it.
constexpr int vectors_of(const Lines& lines) { return kFours + lines.count() - 2; }

inline __m512i row_line(const SglQuantized& call, const char* x, int64_t row, int64_t part,
                        int line) {
    if (row >= call.rows) return _mm512_setzero_si512();
    const int64_t at = (row * parts_of(call) + part) * lines_of(call).count() + line;
    return _mm512_loadu_si512(x + at * 64);
}

// What all lanes of each of a block's scales add up to, as `lines` has it.
inline void sum_block(const Lines& lines, char* to) {
    const __m512i ones = _mm512_set1_epi8(1);
    const __m512 scale = _mm512_load_ps(to + kFours * 64);
    const int fours = kFours / lines.scales;
    for (int s = 0; s < lines.scales; ++s) {
        __m512i sum = _mm512_setzero_si512();
        for (int i = s * fours; i < (s + 1) * fours; ++i)
            sum = _mm512_dpbusd_epi32(sum, ones, _mm512_load_si512(to + i * 64));
        char* more = to + (kFours - 2) * 64;
        if (lines.offsets)
            _mm512_store_si512(more + lines.offset(s) * 64,
                               _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(sum, 7)));
        if (lines.minima)
            _mm512_store_ps(more + lines.sum(s) * 64, _mm512_cvtepi32_ps(sum) * scale);
    }
}

// Rows from `row` on, of which those that there are count, from lines into lanes.
void pack_rows(const SglQuantized& call, const char* x, int64_t row, char* to) {
    const Lines lines = lines_of(call);
    const int64_t blocks = call.in_features / kBlock, bytes = vectors_of(lines) * 64;
    for (int64_t part = 0; part < parts_of(call); ++part, to += kBlocks * bytes) {
        const int64_t some = std::min<int64_t>(kBlocks, blocks - part * kBlocks);
        for (int line = 0; line < 3; ++line) {
            __m512i rows[kLanes];
            for (int m = 0; m < kLanes; ++m) rows[m] = row_line(call, x, row + m, part, line);
            transpose(rows);
            const int count = line < 2 ? kFours / 2 : 1;
            for (int64_t b = 0; b < some; ++b)
                for (int i = 0; i < count; ++i)
                    _mm512_store_si512(to + b * bytes + (line * kFours / 2 + i) * 64,
                                       rows[b * (kFours / 2) + i]);
        }
        for (int64_t b = 0; b < some; ++b) sum_block(lines, to + b * bytes);
    }
}

// Codes of kOuts outputs as bytes, kBlocks blocks at a time, and their scales as floats.
template <Code kCode, int kScales, bool kMins>
class Codes {
  public:
    static constexpr int kBits = bits_of(kCode);

    // Those at `last` and beyond are as the one before.
    Codes(const SglQuantized& call, int64_t out, int64_t last)
        : call_(call), halves_(call), blocks_(call.in_features / kBlock) {
        for (int n = 0; n < kOuts; ++n) which_[n] = std::min(out + n, last - 1);
    }

    // Takes the blocks of `part`. Parts come in ascending order.
    void take(int64_t part) {
        const int64_t first = part * kBlocks;
        const int64_t some = std::min<int64_t>(kBlocks, blocks_ - first);
        if (first % kWidened == 0) widen_scales(first);
        scale_at_ = first % kWidened * kScales;
        const uint32_t words = some == kBlocks ? ~0u : (1u << some * kBits) - 1;
        for (int n = 0; n < kOuts; ++n) {
            const char* from = static_cast<const char*>(call_.codes) +
                               which_[n] * call_.code_row + first * kBlock * kBits / 8;
            _mm_prefetch(from + kOuts * call_.code_row, _MM_HINT_T1);
            if (kBits == 8) _mm_prefetch(from + kOuts * call_.code_row + 64, _MM_HINT_T1);
            spread(from, words, bytes_[n]);
        }
    }

    // Four codes of block `b` of the part, from the 4 * i-th on, in all lanes.
    __m512i four(int n, int b, int i) const {
        const int at = kBits == 8      ? b * kFours + i
                       : i < kFours / 2 ? b * (kFours / 2) + i
                                        : 16 + b * (kFours / 2) + i - kFours / 2;
        return _mm512_set1_epi32(bytes_[n][at]);
    }
    __m512 scale(int n, int b, int s) const {
        return _mm512_set1_ps(scale_[n][scale_at_ + b * kScales + s]);
    }
    __m512 least(int n, int b, int s) const {
        return _mm512_set1_ps(least_[n][scale_at_ + b * kScales + s]);
    }

  private:
    static constexpr int64_t kWidened = 16 / kScales;  // blocks whose scales are floats at a time
    const SglQuantized& call_;
    const Halves<kCode> halves_;
    const int64_t blocks_;
    int64_t which_[kOuts], scale_at_ = 0;
    alignas(64) int32_t bytes_[kOuts][kBlocks * kFours];
    alignas(64) float scale_[kOuts][16];
    alignas(64) float least_[kMins ? kOuts : 1][16];

    void spread(const char* from, uint32_t words, int32_t* to) const {
        __m512i a = load_words(words, from), b;
        if (kBits == 4) {
            halves_.spread(a, a, b);
        } else {
            const __m512i sign = _mm512_set1_epi8(-128);
            b = _mm512_xor_si512(load_words(words >> 16, from + 64), sign);
            a = _mm512_xor_si512(a, sign);
        }
        _mm512_store_si512(to, a);
        _mm512_store_si512(to + 16, b);
    }

    void widen_scales(int64_t b) {
        const int64_t count = std::min(kWidened, blocks_ - b) * kScales;
        const __mmask16 some = (1u << count) - 1;
        for (int n = 0; n < kOuts; ++n) {
            const int64_t at = which_[n] * call_.scale_row + b * kScales;
            _mm512_store_ps(scale_[n], widen(some, static_cast<const Fp16*>(call_.scales) + at));
            if (kMins)
                _mm512_store_ps(least_[n], widen(some, static_cast<const Fp16*>(call_.mins) + at));
        }
    }

    static __m512 widen(__mmask16 some, const Fp16* from) {
        return _mm512_cvtph_ps(some == 0xffff
                                   ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))
                                   : _mm256_maskz_loadu_epi16(some, from));
    }
};

// Adds block `b` of a part to the sums of kOuts outputs.
template <Code kCode, int kScales, bool kMins>
inline __attribute__((always_inline)) void add_block(const Codes<kCode, kScales, kMins>& codes,
                                                     const char* x, int b, __m512 (&total)[kOuts]) {
    constexpr Lines kLines{kScales, is_signed(kCode), kMins};
    constexpr int kEach = kFours / kScales;
    const char* more = x + (kFours - 2) * 64;
    const __m512 scale_x = _mm512_load_ps(x + kFours * 64);
    __m512i four[kFours];
#pragma GCC unroll 8
    for (int i = 0; i < kFours; ++i) four[i] = _mm512_load_si512(x + i * 64);
#pragma GCC unroll 16
    for (int n = 0; n < kOuts; ++n)
#pragma GCC unroll 2
        for (int s = 0; s < kScales; ++s) {
            __m512i dots = kLines.offsets ? _mm512_load_si512(more + kLines.offset(s) * 64)
                                          : _mm512_setzero_si512();
#pragma GCC unroll 8
            for (int i = s * kEach; i < (s + 1) * kEach; ++i)
                dots = _mm512_dpbusd_epi32(dots, codes.four(n, b, i), four[i]);
            total[n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), scale_x * codes.scale(n, b, s),
                                       total[n]);
            if (kMins)
                total[n] = _mm512_fmadd_ps(codes.least(n, b, s),
                                           _mm512_load_ps(more + kLines.sum(s) * 64), total[n]);
        }
}

// The sums of 16 packed rows with kOuts outputs.
template <Code kCode, int kScales, bool kMins>
void multiply_rows(const SglQuantized& call, const char* x, int64_t out, int64_t last,
                   __m512 (&total)[kOuts]) {
    const int64_t blocks = call.in_features / kBlock, bytes = vectors_of(lines_of(call)) * 64;
    Codes<kCode, kScales, kMins> codes(call, out, last);
    __m512 sum[kOuts];
#pragma GCC unroll 16
    for (int n = 0; n < kOuts; ++n) sum[n] = _mm512_setzero_ps();
    for (int64_t part = 0; part < parts_of(call); ++part) {
        codes.take(part);
        const int some = static_cast<int>(std::min<int64_t>(kBlocks, blocks - part * kBlocks));
        for (int b = 0; b < some; ++b, x += bytes) add_block(codes, x, b, sum);
    }
#pragma GCC unroll 16
    for (int n = 0; n < kOuts; ++n) total[n] = sum[n];
}

inline void store_some(__m512 x, __mmask16 which, float* to) {
    _mm512_mask_storeu_ps(to, which, x);
}
inline void store_some(__m512 x, __mmask16 which, Bf16* to) {
    _mm256_mask_storeu_epi16(to, which, (__m256i)_mm512_cvtneps_pbh(x));
}
inline void store_some(__m512 x, __mmask16 which, Fp16* to) {
    _mm256_mask_storeu_epi16(to, which, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

// Sums [outputs, rows] to the outputs [out, last) of rows from `row` on.
template <class T>
void finish(const SglQuantized& call, const __m512 (&total)[kOuts], int64_t row, int64_t out,
            int64_t last) {
    const int64_t rows = std::min<int64_t>(kLanes, call.rows - row);
    const int64_t outs = std::min<int64_t>(kOuts, last - out);
    const __mmask16 which = (1u << outs) - 1;
    alignas(64) float bias[kOuts] = {};
    if (call.bias)
        for (int64_t n = 0; n < outs; ++n)
            bias[n] = to_float(static_cast<const T*>(call.bias)[out + n]);
    __m512i lanes[kOuts];
    for (int n = 0; n < kOuts; ++n) lanes[n] = _mm512_castps_si512(total[n]);
    transpose(lanes);
    T* to = static_cast<T*>(call.out) + row * call.out_row + out;
    for (int64_t m = 0; m < rows; ++m, to += call.out_row)
        store_some(_mm512_fmadd_ps(_mm512_castsi512_ps(lanes[m]), _mm512_set1_ps(call.gain),
                                   _mm512_load_ps(bias)),
                   which, to);
}

template <Code kCode, int kScales, bool kMins>
void multiply_range(const SglQuantized& call, const char* x, int64_t first, int64_t last) {
    thread_local sgl::Scratch room;
    const int64_t bytes = parts_of(call) * kBlocks * vectors_of(lines_of(call)) * 64;
    char* packed = room.take((call.rows + kLanes - 1) / kLanes * bytes);
    for (int64_t row = 0; row < call.rows; row += kLanes)
        pack_rows(call, x, row, packed + row / kLanes * bytes);
    for (int64_t out = first; out < last; out += kOuts)
        for (int64_t row = 0; row < call.rows; row += kLanes) {
            __m512 total[kOuts];
            multiply_rows<kCode, kScales, kMins>(call, packed + row / kLanes * bytes, out, last,
                                                 total);
            if (call.dtype == SGL_FLOAT32) finish<float>(call, total, row, out, last);
            if (call.dtype == SGL_BFLOAT16) finish<Bf16>(call, total, row, out, last);
            if (call.dtype == SGL_FLOAT16) finish<Fp16>(call, total, row, out, last);
        }
}

template <Code kCode, int kScales>
void multiply_layout(const SglQuantized& call, const char* x, int64_t first, int64_t last) {
    if (call.mins)
        multiply_range<kCode, kScales, true>(call, x, first, last);
    else
        multiply_range<kCode, kScales, false>(call, x, first, last);
}

}  // namespace

void sgl::multiply_lanes(const SglQuantized& call, const char* x, int64_t first, int64_t last) {
    const Code code = code_of(call);
    if (code == Code::kHalf) multiply_layout<Code::kHalf, 1>(call, x, first, last);
    if (code == Code::kNamed) multiply_layout<Code::kNamed, 1>(call, x, first, last);
    if (code != Code::kByte) return;
    if (call.group == 32) multiply_layout<Code::kByte, 1>(call, x, first, last);
    if (call.group == 16) multiply_layout<Code::kByte, 2>(call, x, first, last);
}

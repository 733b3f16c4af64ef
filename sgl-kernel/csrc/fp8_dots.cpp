// Products of bfloat16 rows with a weight of E4M3, by AVX-512's dot instructions of bfloat16 (and VBMI).
//
// Every E4M3 is a bfloat16, so nothing is rounded on the way. 64 codes are taken at a time: the two bytes
// of a bfloat16 are looked up by the seven bits that are its size, and the sign is put back. What a group of
// inputs adds up to meets its scale in fp32.
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "numbers.h"
#include "quantized.h"

namespace {

constexpr int64_t kStep = 64;            // codes taken at a time
constexpr int64_t kHalf = kStep / 2;     // inputs of a vector
constexpr int64_t kAhead = 4 << 10;      // bytes of the codes asked for ahead

// Lower and upper bytes of the sizes that 7 bits have, as bfloat16.
struct Sizes {
    alignas(64) uint8_t low[128], high[128];
    Sizes() : low(), high() {
        for (int code = 0; code < 128; ++code) {
            const uint32_t bits = to_bits(to_float(E4m3{static_cast<uint8_t>(code)})) >> 16;
            low[code] = static_cast<uint8_t>(bits);
            high[code] = static_cast<uint8_t>(bits >> 8);
        }
    }
};

class Codes {
  public:
    Codes() {
        static const Sizes sizes;
        for (int i = 0; i < 2; ++i) {
            low_[i] = _mm512_load_si512(sizes.low + 64 * i);
            high_[i] = _mm512_load_si512(sizes.high + 64 * i);
        }
    }

    // The 64 codes at `from`, or the first 32 of them, as two vectors of bfloat16.
    void widen(const uint8_t* from, bool whole, __m512i (&out)[2]) const {
        const __m512i bytes = whole ? _mm512_loadu_si512(from)
                                    : _mm512_castsi256_si512(_mm256_loadu_si256(
                                          reinterpret_cast<const __m256i*>(from)));
        // Eights of the first 32 into the lower halves of lanes, those of the others into the upper.
        const __m512i codes = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), bytes);
        const __m512i low = _mm512_permutex2var_epi8(low_[0], codes, low_[1]);
        const __m512i size = _mm512_permutex2var_epi8(high_[0], codes, high_[1]);
        // size | (codes & 0x80)
        const __m512i high =
            _mm512_ternarylogic_epi32(size, codes, _mm512_set1_epi8(-128), 0xf8);
        out[0] = _mm512_unpacklo_epi8(low, high);
        out[1] = _mm512_unpackhi_epi8(low, high);
    }

  private:
    __m512i low_[2], high_[2];
};

// Adds products of 32 inputs, those of one half of the numbers.
template <int kWhich, int kRows, int kOuts>
inline void add_half(const Bf16* x, int64_t x_row, const __m512i (&numbers)[kOuts][2],
                     __m512 (&part)[kRows][kOuts]) {
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m) {
        const __m512i some = _mm512_loadu_si512(x + m * x_row);
#pragma GCC unroll 4
        for (int n = 0; n < kOuts; ++n)
            part[m][n] = _mm512_dpbf16_ps(part[m][n], (__m512bh)some, (__m512bh)numbers[n][kWhich]);
    }
}

// Sums of rows from `row` on with outputs from `out` on. One output's codes are read in the order of their
// addresses, which the processor's own fetching follows. Two sums of each grow side by side, since
// additions wait, and always in the same order: a row's answer doesn't depend on its neighbours.
template <int kRows, int kOuts>
inline void multiply_some(const SglQuantized& call, const Codes& codes, int64_t row, int64_t out) {
    const int64_t width = call.in_features;
    const Bf16* x = static_cast<const Bf16*>(call.x) + row * call.x_row;
    const uint8_t* weight = static_cast<const uint8_t*>(call.codes) + out * call.code_row;
    const float* scale = static_cast<const float*>(call.scales) + out * call.scale_row;
    __m512 total[kRows][kOuts] = {};
    for (int64_t first = 0; first < width; first += call.group, ++scale) {
        const int64_t last = std::min(width, first + call.group);
        __m512 part[2][kRows][kOuts] = {};
        for (int64_t d = first; d < last; d += kStep) {
            const bool whole = d + kHalf < last;
            __m512i numbers[kOuts][2];
#pragma GCC unroll 4
            for (int n = 0; n < kOuts; ++n) {
                const uint8_t* from = weight + n * call.code_row + d;
                _mm_prefetch(reinterpret_cast<const char*>(from) + kAhead, _MM_HINT_T1);
                codes.widen(from, whole, numbers[n]);
            }
            add_half<0>(x + d, call.x_row, numbers, part[0]);
            if (whole) add_half<1>(x + d + kHalf, call.x_row, numbers, part[1]);
        }
        for (int n = 0; n < kOuts; ++n) {
            const __m512 factor = _mm512_set1_ps(scale[n * call.scale_row]);
            for (int m = 0; m < kRows; ++m)
                total[m][n] = _mm512_fmadd_ps(_mm512_add_ps(part[0][m][n], part[1][m][n]), factor,
                                              total[m][n]);
        }
    }
    const auto* bias = static_cast<const Bf16*>(call.bias);
    for (int m = 0; m < kRows; ++m)
        for (int n = 0; n < kOuts; ++n)
            store(_mm512_reduce_add_ps(total[m][n]) * call.gain + (bias ? to_float(bias[out + n]) : 0.0f),
                  static_cast<Bf16*>(call.out) + (row + m) * call.out_row + out + n);
}

template <int kOuts>
inline void multiply_rows(const SglQuantized& call, const Codes& codes, int64_t out) {
    int64_t row = 0;
    for (; row + 4 <= call.rows; row += 4) multiply_some<4, kOuts>(call, codes, row, out);
    for (; row + 2 <= call.rows; row += 2) multiply_some<2, kOuts>(call, codes, row, out);
    if (row < call.rows) multiply_some<1, kOuts>(call, codes, row, out);
}

}  // namespace

bool sgl::has_fp8_dots(const SglQuantized& call) {
    static const bool has_permutes = __builtin_cpu_supports("avx512vbmi");
    return call.isa >= SGL_AVX512_BF16 && call.isa <= SGL_AMX && call.is_fp8 &&
           call.dtype == SGL_BFLOAT16 && has_permutes;
}

void sgl::multiply_fp8_dots(const SglQuantized& call, int64_t first, int64_t last) {
    const Codes codes;
    int64_t out = first;
    if (call.rows > 1)
        for (; out + 2 <= last; out += 2) multiply_rows<2>(call, codes, out);
    for (; out < last; ++out) multiply_rows<1>(call, codes, out);
}

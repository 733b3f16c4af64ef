// Vectors of AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include "numbers.h"

namespace {

struct Isa {
    static constexpr int kLanes = 8;
    using F = __m256;

    static F load(const float* x) { return _mm256_loadu_ps(x); }
    static F load(const Bf16* x) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
    static F load(const Fp16* x) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
    }
    // Two neighbours in 32 bits come apart by a shift and a mask: half the work of a load each.
    static constexpr int kWide = 2;
    template <class T>
    static void load_some(const T* x, F (&out)[2]) {
        out[0] = load(x);
        out[1] = load(x + kLanes);
    }
    static void load_some(const Bf16* x, F (&out)[2]) {
        const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
        const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
        out[0] = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
        out[1] = _mm256_castsi256_ps(_mm256_and_si256(pairs, upper));
    }
    template <class T>
    static constexpr bool reorders(T) { return false; }
    static constexpr bool reorders(Bf16) { return true; }
    // 32 codes of half a byte, the values that these name, or signed bytes, as floats.
    static void halves(const uint8_t* codes, F (&out)[4]) {
        const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
        const __m128i mask = _mm_set1_epi8(15);
        const __m128i low = _mm_and_si128(both, mask);
        const __m128i high = _mm_and_si128(_mm_srli_epi16(both, 4), mask);
        out[0] = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(low));
        out[1] = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(low, 8)));
        out[2] = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(high));
        out[3] = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(high, 8)));
    }
    static void named(const uint8_t* codes, const int8_t* values, F (&out)[4]) {
        const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
        const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
        const __m128i mask = _mm_set1_epi8(15);
        const __m128i low = _mm_shuffle_epi8(all, _mm_and_si128(both, mask));
        const __m128i high = _mm_shuffle_epi8(all, _mm_and_si128(_mm_srli_epi16(both, 4), mask));
        out[0] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(low));
        out[1] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(low, 8)));
        out[2] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(high));
        out[3] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(high, 8)));
    }
    static void signed_bytes(const int8_t* codes, F (&out)[4]) {
        for (int i = 0; i < 4; ++i) {
            const __m128i eight =
                _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + 8 * i));
            out[i] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
        }
    }
    // 32 E4M3 over 2^8: their bits in a 16-bit float's places, whose exponent has another bias.
    static void e4m3(const uint8_t* codes, F (&out)[4]) {
        for (int i = 0; i < 2; ++i) {
            const __m128i some = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes) + i);
            // The sign comes twice: once where it belongs, once where it has to go, unless that is
            // what makes an exponent of ones.
            const __m256i bits = _mm256_slli_epi16(_mm256_cvtepi8_epi16(some), 7);
            const __m256i twice = _mm256_set1_epi16(static_cast<short>(0xc000));
            const __m256i lost = _mm256_cmpeq_epi16(_mm256_or_si256(bits, twice),
                                                    _mm256_set1_epi16(static_cast<short>(0xff80)));
            const __m256i nan = _mm256_and_si256(lost, _mm256_set1_epi16(0x4000));
            const __m256i half = _mm256_or_si256(
                _mm256_and_si256(bits, _mm256_set1_epi16(static_cast<short>(0xbfff))), nan);
            out[2 * i] = _mm256_cvtph_ps(_mm256_castsi256_si128(half));
            out[2 * i + 1] = _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
        }
    }
    static void widen(const Fp16* from, int64_t count, float* to) {
        int64_t i = 0;
        for (; i + 8 <= count; i += 8) _mm256_storeu_ps(to + i, load(from + i));
        for (; i < count; ++i) to[i] = to_float(from[i]);
    }
    static float sum(F x) {
        __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        y = _mm_add_ps(y, _mm_movehl_ps(y, y));
        return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
    }
};

}  // namespace

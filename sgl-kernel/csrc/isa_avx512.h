// Vectors of AVX-512 (F, BW, DQ, VL).
#pragma once

#include <immintrin.h>

#include "numbers.h"

namespace {

struct Isa {
    static constexpr int kLanes = 16;
    using F = __m512;

    static F load(const float* x) { return _mm512_loadu_ps(x); }
    static F load(const Bf16* x) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    static F load(const Fp16* x) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
    }
    static constexpr int kWide = 1;
    template <class T>
    static void load_some(const T* x, F (&out)[1]) { out[0] = load(x); }
    template <class T>
    static constexpr bool reorders(T) { return false; }
    // 32 codes of half a byte, the values that these name, or signed bytes, as floats.
    static void halves(const uint8_t* codes, F (&out)[2]) {
        const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
        const __m128i mask = _mm_set1_epi8(15);
        const __m128i high = _mm_and_si128(_mm_srli_epi16(both, 4), mask);
        out[0] = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_and_si128(both, mask)));
        out[1] = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(high));
    }
    static void named(const uint8_t* codes, const int8_t* values, F (&out)[2]) {
        const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
        const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
        const __m128i mask = _mm_set1_epi8(15);
        const __m128i low = _mm_shuffle_epi8(all, _mm_and_si128(both, mask));
        const __m128i high = _mm_shuffle_epi8(all, _mm_and_si128(_mm_srli_epi16(both, 4), mask));
        out[0] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(low));
        out[1] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(high));
    }
    static void signed_bytes(const int8_t* codes, F (&out)[2]) {
        for (int i = 0; i < 2; ++i) {
            const __m128i some =
                _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 16 * i));
            out[i] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(some));
        }
    }
    // 32 E4M3 over 2^8: their bits in a 16-bit float's places, whose exponent has another bias.
    static void e4m3(const uint8_t* codes, F (&out)[2]) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
        const __m256i sized = _mm256_or_si256(bytes, _mm256_set1_epi8(-128));
        const __mmask32 lost = _mm256_cmpeq_epi8_mask(sized, _mm256_set1_epi8(-1));
        // The sign comes twice: once where it belongs, once where it has to go.
        __m512i half = _mm512_slli_epi16(_mm512_cvtepi8_epi16(bytes), 7);
        half = _mm512_and_si512(half, _mm512_set1_epi16(static_cast<short>(0xbfff)));
        half = _mm512_mask_mov_epi16(half, lost, _mm512_set1_epi16(0x7e00));
        out[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(half));
        out[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
    }
    static void widen(const Fp16* from, int64_t count, float* to) {
        int64_t i = 0;
        for (; i + 8 <= count; i += 8) {
            const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
            _mm256_storeu_ps(to + i, _mm256_cvtph_ps(eight));
        }
        for (; i < count; ++i) to[i] = to_float(from[i]);
    }
    static float sum(F x) { return _mm512_reduce_add_ps(x); }
};

}  // namespace

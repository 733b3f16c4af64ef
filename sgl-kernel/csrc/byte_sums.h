// Sums of products of unsigned and signed bytes, four to a lane, in AVX2's vectors.
#pragma once

#include <immintrin.h>

namespace {

// By products that are summed in pairs of 16 bits, which must hold them: bytes of up to 128 times bytes
// of up to 127 fit, and so do the sums of 8 pairs of codes of 4 bits.
struct PairSums {
    // Of codes of 4 bits, kCount vectors added up, at most 8.
    template <int kCount>
    static __m256i of_halves(const __m256i (&codes)[kCount], const __m256i (&x)[kCount]) {
        __m256i pairs = _mm256_maddubs_epi16(codes[0], x[0]);
#pragma GCC unroll 8
        for (int i = 1; i < kCount; ++i)
            pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(codes[i], x[i]));
        return four(pairs);
    }
    // Of bytes of up to 128.
    template <int kCount>
    static __m256i of_bytes(const __m256i (&codes)[kCount], const __m256i (&x)[kCount]) {
        __m256i sum = four(_mm256_maddubs_epi16(codes[0], x[0]));
#pragma GCC unroll 8
        for (int i = 1; i < kCount; ++i)
            sum = _mm256_add_epi32(sum, four(_mm256_maddubs_epi16(codes[i], x[i])));
        return sum;
    }

  private:
    static __m256i four(__m256i pairs) {
        return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }
};

// By dot products of four bytes: `Dots::add` adds those of unsigned with signed ones to sums. Sums are
// those of PairSums, bit for bit.
template <class Dots>
struct DotSums {
    template <int kCount>
    static __m256i of_halves(const __m256i (&codes)[kCount], const __m256i (&x)[kCount]) {
        return of_bytes(codes, x);
    }
    template <int kCount>
    static __m256i of_bytes(const __m256i (&codes)[kCount], const __m256i (&x)[kCount]) {
        __m256i sum = _mm256_setzero_si256();
#pragma GCC unroll 8
        for (int i = 0; i < kCount; ++i) sum = Dots::add(sum, codes[i], x[i]);
        return sum;
    }
};

}  // namespace

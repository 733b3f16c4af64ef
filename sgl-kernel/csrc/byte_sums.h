// Sums of products of unsigned and signed bytes, four to a lane, in AVX2's vectors.
#pragma once

#include <immintrin.h>

namespace {

// By products that are summed in pairs of 16 bits, which must hold them: bytes of up to 128 times bytes
// of up to 127 fit, and so do the sums of 8 pairs of codes of 4 bits. 8 pairs of shifted values pass 16
// bits, but not what is left of them without the shift, at which sums that wrap arrive all the same.
struct PairSums {
    // Of codes of 4 bits or shifted values, two vectors at most, and `sum`.
    template <int kCount>
    static __m256i add_halves(__m256i sum, const __m256i (&codes)[kCount],
                              const __m256i (&x)[kCount]) {
        return _mm256_add_epi32(sum, of_halves(codes, x));
    }
    // Of codes of 4 bits, kCount vectors added up, at most 8.
    template <int kCount>
    static __m256i of_halves(const __m256i (&codes)[kCount], const __m256i (&x)[kCount]) {
        return four(pairs_of(codes, x));
    }
    // The same of shifted values. `shift`: of each pair -kShift times the sum of its inputs, 16 bits.
    template <int kCount>
    static __m256i of_shifted(const __m256i (&codes)[kCount], const __m256i (&x)[kCount],
                              __m256i shift) {
        return four(_mm256_add_epi16(shift, pairs_of(codes, x)));
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

    static __m256i four(__m256i pairs) {
        return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }

  private:
    template <int kCount>
    static __m256i pairs_of(const __m256i (&codes)[kCount], const __m256i (&x)[kCount]) {
        __m256i pairs = _mm256_maddubs_epi16(codes[0], x[0]);
#pragma GCC unroll 8
        for (int i = 1; i < kCount; ++i)
            pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(codes[i], x[i]));
        return pairs;
    }
};

// By dot products of four bytes: `Dots::add` adds those of unsigned with signed ones to sums. Sums are
// those of PairSums, bit for bit.
template <class Dots>
struct DotSums {
    template <int kCount>
    static __m256i add_halves(__m256i sum, const __m256i (&codes)[kCount],
                              const __m256i (&x)[kCount]) {
        return add(sum, codes, x);
    }
    template <int kCount>
    static __m256i of_halves(const __m256i (&codes)[kCount], const __m256i (&x)[kCount]) {
        return of_bytes(codes, x);
    }
    template <int kCount>
    static __m256i of_shifted(const __m256i (&codes)[kCount], const __m256i (&x)[kCount],
                              __m256i shift) {
        return add(PairSums::four(shift), codes, x);
    }
    template <int kCount>
    static __m256i of_bytes(const __m256i (&codes)[kCount], const __m256i (&x)[kCount]) {
        return add(_mm256_setzero_si256(), codes, x);
    }

  private:
    template <int kCount>
    static __m256i add(__m256i sum, const __m256i (&codes)[kCount], const __m256i (&x)[kCount]) {
#pragma GCC unroll 8
        for (int i = 0; i < kCount; ++i) sum = Dots::add(sum, codes[i], x[i]);
        return sum;
    }
};

}  // namespace

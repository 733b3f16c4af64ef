// How codes are read, and those of half a byte become unsigned bytes: AVX-512.
#pragma once

#include <immintrin.h>

#include "quantized.h"

namespace {

// 64 bytes, or those words of them that `which` names. From memory masked loads took
// twice as long.
inline __m512i load_words(__mmask16 which, const void* from) {
    return which == 0xffff ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi32(which, from);
}

// Unsigned bytes: they are so already, or the values that they name, signed, become so by adding 128.
template <Code kCode>
class Halves {
  public:
    explicit Halves(const SglQuantized& call) {
        if (kCode != Code::kNamed) return;
        const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(call.values));
        values_ = _mm512_xor_si512(_mm512_broadcast_i32x4(values), _mm512_set1_epi8(-128));
    }

    // Of 64 bytes those in the low halves, and those in the high ones.
    void spread(__m512i both, __m512i& low, __m512i& high) const {
        const __m512i mask = _mm512_set1_epi8(15);
        low = _mm512_and_si512(both, mask);
        high = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
        if (kCode != Code::kNamed) return;
        low = _mm512_shuffle_epi8(values_, low);
        high = _mm512_shuffle_epi8(values_, high);
    }

  private:
    __m512i values_ = _mm512_setzero_si512();
};

}  // namespace

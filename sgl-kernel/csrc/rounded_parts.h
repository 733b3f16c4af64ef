// How inputs that are rounded to bytes lie for vectors of 32 bytes: AVX2.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "quantized.h"

namespace {

constexpr int kBlock = 32;     // inputs that share a scale
constexpr int kPartScales = 8; // scales of a weight that are taken at a time
constexpr int kSteps = 4;      // vectors that they fill, a scale for each half
// What is added to values of this size at most, so that they are no less than 0: see PairSums.
constexpr int kShift = 16;

// A row is so many parts, each the inputs of 8 scales of a weight. Bytes come in four steps, as the
// codes that they meet fill vectors: with a scale for each 32, 64 bytes of two blocks, the first 16 of
// both and then the others; with a scale for each 16, 32 bytes of one block. Then come 8 floats, the
// inputs' scale where each of the weight's is, those of the lower halves first: the even ones, then
// the odd ones. For minima 8 floats follow, in plain order: the sum of each scale's inputs. For small values
// each step's 8 lanes follow, of 32 bits: -kShift times the sum of each four inputs of its two vectors.
template <int kScales>
struct Part {
    static constexpr int kBlocks = kPartScales / kScales;
    static constexpr int kVectors = 2 / kScales;  // of a step
    static constexpr int kScaleAt = kBlocks * kBlock, kSumAt = kScaleAt + 32;

    static constexpr int64_t shift_at(bool minima) { return kSumAt + 32 * minima; }
    static constexpr int64_t bytes(bool minima, bool small) {
        return shift_at(minima) + kSteps * 32 * small;
    }
    // Where 16 inputs stand, of block `b` and of its half `i`.
    static constexpr int64_t half(int64_t b, int i) {
        return kScales == 2 ? b * kBlock + i * 16 : b / 2 * 64 + i * 32 + b % 2 * 16;
    }
    static constexpr int64_t count(int64_t blocks) { return (blocks + kBlocks - 1) / kBlocks; }
};

// Where the scale `s` of a part stands among the 8 floats.
constexpr int scale_place(int s) { return s / 2 + s % 2 * 4; }

// As code_of(), with small values told apart.
inline Code kind_of(const SglQuantized& call) {
    const Code code = code_of(call);
    const auto is_small = [](int value) { return value >= -kShift && value <= kShift; };
    const bool small = std::all_of(call.values, call.values + 16, is_small);
    return code == Code::kNamed && small ? Code::kSmall : code;
}

inline int64_t row_bytes(const SglQuantized& call) {
    const int64_t blocks = call.in_features / kBlock;
    const bool minima = call.mins != nullptr, small = kind_of(call) == Code::kSmall;
    return call.group == 16 ? Part<2>::count(blocks) * Part<2>::bytes(minima, false)
                            : Part<1>::count(blocks) * Part<1>::bytes(minima, small);
}

// What codes name, in both halves: small values shifted.
template <Code kCode>
inline __m256i values_of(const SglQuantized& call) {
    const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(call.values));
    const __m256i both = _mm256_broadcastsi128_si256(values);
    return kCode == Code::kSmall ? _mm256_add_epi8(both, _mm256_set1_epi8(kShift)) : both;
}

}  // namespace

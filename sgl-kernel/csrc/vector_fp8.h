// Products with a weight of E4M3, whose scales are fp32 and each for a group of any multiple of 32 inputs.
//
// Part of vector_quantized.h. `Isa::e4m3` gives numbers over kUnit, which is what a shift of the bits into
// a 16-bit float makes of them; the scale takes the power of two back. Subnormal codes are exact so, and
// a code of NaN is one.
#pragma once

#include <algorithm>

#include "numbers.h"
#include "quantized.h"

namespace {

constexpr int kBlock = 32;                       // codes taken at a time
constexpr int kVectors = kBlock / Isa::kLanes;   // that they fill
constexpr float kUnit = 0x1p8f;
constexpr int kSums = 2;                         // that grow side by side, of a row

// Adds the products of one output with kRows rows of the input.
template <int kRows>
inline void multiply_fp8(const SglQuantized& call, const float* x, int64_t row, int64_t out,
                         float (&result)[kRows]) {
    const int64_t width = call.in_features;
    const uint8_t* codes = static_cast<const uint8_t*>(call.codes) + out * call.code_row;
    const float* scale = static_cast<const float*>(call.scales) + out * call.scale_row;
    const float* input = x + row * width;
    Isa::F total[kRows] = {};
    for (int64_t first = 0; first < width; first += call.group, ++scale) {
        const int64_t last = std::min(width, first + call.group);
        Isa::F part[kRows][kSums] = {};
        for (int64_t d = first; d < last; d += kBlock) {
            Isa::F code[kVectors];
            Isa::e4m3(codes + d, code);
#pragma GCC unroll 4
            for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
                for (int i = 0; i < kVectors; ++i)
                    part[m][i % kSums] += code[i] * Isa::load(input + m * width + d + i * Isa::kLanes);
        }
        for (int m = 0; m < kRows; ++m) total[m] += (part[m][0] + part[m][1]) * (*scale * kUnit);
    }
    for (int m = 0; m < kRows; ++m) result[m] = Isa::sum(total[m]);
}

// One output's weights as floats, without the gain.
inline void widen_fp8(const SglQuantized& call, int64_t out, float* to) {
    const int64_t width = call.in_features;
    const uint8_t* codes = static_cast<const uint8_t*>(call.codes) + out * call.code_row;
    const float* scale = static_cast<const float*>(call.scales) + out * call.scale_row;
    for (int64_t first = 0; first < width; first += call.group, ++scale)
        for (int64_t d = first; d < std::min(width, first + call.group); d += kBlock) {
            Isa::F code[kVectors];
            Isa::e4m3(codes + d, code);
#pragma GCC unroll 8
            for (int i = 0; i < kVectors; ++i) {
                const Isa::F value = code[i] * (*scale * kUnit);
                std::memcpy(to + d + i * Isa::kLanes, &value, sizeof value);
            }
        }
}

}  // namespace

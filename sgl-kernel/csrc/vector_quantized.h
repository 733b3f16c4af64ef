// Products with a quantised weight: its codes become fp32 in registers (for many rows in the first
// cache), the input stays as it is.
//
// The including file defines `Isa`. Codes are taken 32 at a time; what they are multiplied with is
// summed for each group alone, so that its scale is applied once. A minimum adds itself times the sum
// of the group's inputs, which is the same for every output.
#pragma once

#include <memory>

#include "numbers.h"
#include "quantized.h"
#include "vector_fp8.h"

namespace {

constexpr int64_t kScalesAtOnce = 8;             // widened at a time
constexpr int kOuts = 4;                         // outputs that are floats at a time

// The 32 codes of a block of an output: two in a byte, the first 16 in the low halves; or signed bytes.
template <Code kCode>
inline void load_codes(const SglQuantized& call, const uint8_t* codes, int64_t block,
                       Isa::F (&out)[kVectors]) {
    if (kCode == Code::kHalf) Isa::halves(codes + block * (kBlock / 2), out);
    if (kCode == Code::kNamed) Isa::named(codes + block * (kBlock / 2), call.values, out);
    if (kCode == Code::kByte)
        Isa::signed_bytes(reinterpret_cast<const int8_t*>(codes) + block * kBlock, out);
}

// Adds the products of one output with kRows rows of the input.
template <Code kCode, int kGroup, int kRows>
inline void multiply_block(const SglQuantized& call, const float* x, const float* sums, int64_t row,
                           int64_t out, float (&result)[kRows]) {
    constexpr int kScales = kBlock / kGroup, kPart = kVectors / kScales;
    const int64_t width = call.in_features, blocks = width / kBlock, groups = width / kGroup;
    const uint8_t* codes = static_cast<const uint8_t*>(call.codes) + out * call.code_row;
    const Fp16* scales = static_cast<const Fp16*>(call.scales) + out * call.scale_row;
    const float* input = x + row * width;
    Isa::F total[kRows] = {};
    float wide[kScalesAtOnce * kScales];
    for (int64_t first = 0; first < blocks; first += kScalesAtOnce) {
        const int64_t count = blocks - first < kScalesAtOnce ? blocks - first : kScalesAtOnce;
        Isa::widen(scales + first * kScales, count * kScales, wide);
        for (int64_t b = 0; b < count; ++b) {
            Isa::F code[kVectors];
            load_codes<kCode>(call, codes, first + b, code);
            const float* values = input + (first + b) * kBlock;
#pragma GCC unroll 4
            for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 2
                for (int s = 0; s < kScales; ++s) {
                    Isa::F part = code[s * kPart] *
                                  Isa::load(values + m * width + s * kPart * Isa::kLanes);
#pragma GCC unroll 8
                    for (int i = s * kPart + 1; i < (s + 1) * kPart; ++i)
                        part += code[i] * Isa::load(values + m * width + i * Isa::kLanes);
                    total[m] += part * wide[b * kScales + s];
                }
        }
    }
    for (int m = 0; m < kRows; ++m) result[m] = Isa::sum(total[m]);
    if (!call.mins) return;
    const Fp16* mins = static_cast<const Fp16*>(call.mins) + out * call.scale_row;
    const int64_t whole = groups - groups % Isa::kLanes;
    for (int m = 0; m < kRows; ++m) {
        const float* sum = sums + (row + m) * groups;
        Isa::F added = {};
        for (int64_t g = 0; g < whole; g += Isa::kLanes)
            added += Isa::load(mins + g) * Isa::load(sum + g);
        result[m] += Isa::sum(added);
        for (int64_t g = whole; g < groups; ++g) result[m] += to_float(mins[g]) * sum[g];
    }
}

template <class T, Code kCode, int kGroup, int kRows>
inline void multiply_rows(const SglQuantized& call, const float* x, const float* sums, int64_t row,
                          int64_t out) {
    float result[kRows];
    if constexpr (kCode == Code::kFp8)
        multiply_fp8<kRows>(call, x, row, out, result);
    else
        multiply_block<kCode, kGroup, kRows>(call, x, sums, row, out, result);
    const float bias = call.bias ? to_float(static_cast<const T*>(call.bias)[out]) : 0.0f;
    for (int m = 0; m < kRows; ++m)
        store(result[m] * call.gain + bias,
              static_cast<T*>(call.out) + (row + m) * call.out_row + out);
}

// One output's weights as floats, without the gain.
template <Code kCode, int kGroup>
inline void widen_output(const SglQuantized& call, int64_t out, float* to) {
    if constexpr (kCode == Code::kFp8) {
        widen_fp8(call, out, to);
        return;
    }
    constexpr int kScales = kBlock / kGroup, kPart = kVectors / kScales;
    const uint8_t* codes = static_cast<const uint8_t*>(call.codes) + out * call.code_row;
    const Fp16* scales = static_cast<const Fp16*>(call.scales) + out * call.scale_row;
    const Fp16* mins =
        call.mins ? static_cast<const Fp16*>(call.mins) + out * call.scale_row : nullptr;
    const int64_t blocks = call.in_features / kBlock;
    float scale[kScalesAtOnce * kScales], least[kScalesAtOnce * kScales] = {};
    for (int64_t first = 0; first < blocks; first += kScalesAtOnce) {
        const int64_t count = blocks - first < kScalesAtOnce ? blocks - first : kScalesAtOnce;
        Isa::widen(scales + first * kScales, count * kScales, scale);
        if (mins) Isa::widen(mins + first * kScales, count * kScales, least);
        for (int64_t b = 0; b < count; ++b) {
            Isa::F code[kVectors];
            load_codes<kCode>(call, codes, first + b, code);
#pragma GCC unroll 8
            for (int i = 0; i < kVectors; ++i) {
                const int64_t g = b * kScales + i / kPart;
                const Isa::F value = code[i] * scale[g] + least[g];
                std::memcpy(to + (first + b) * kBlock + i * Isa::kLanes, &value, sizeof value);
            }
        }
    }
}

// Products of kRows rows with the kOuts outputs below `last` whose weights are floats in `wide`.
template <class T, int kRows>
inline void multiply_wide(const SglQuantized& call, const float* x, const float* wide, int64_t row,
                          int64_t out, int64_t last) {
    const int64_t width = call.in_features;
    Isa::F total[kRows][kOuts] = {};
    for (int64_t d = 0; d < width; d += Isa::kLanes) {
        Isa::F part[kOuts];
        for (int n = 0; n < kOuts; ++n) part[n] = Isa::load(wide + n * width + d);
        for (int m = 0; m < kRows; ++m) {
            const Isa::F value = Isa::load(x + (row + m) * width + d);
            for (int n = 0; n < kOuts; ++n) total[m][n] += value * part[n];
        }
    }
    const T* bias = static_cast<const T*>(call.bias);
    for (int m = 0; m < kRows; ++m)
        for (int n = 0; n < kOuts && out + n < last; ++n)
            store(Isa::sum(total[m][n]) * call.gain + (bias ? to_float(bias[out + n]) : 0.0f),
                  static_cast<T*>(call.out) + (row + m) * call.out_row + out + n);
}

// Many rows: the codes of a few outputs become floats once for all of them.
template <class T, Code kCode, int kGroup>
inline void multiply_many(const SglQuantized& call, const float* x, int64_t first, int64_t last) {
    const std::unique_ptr<float[]> wide(new float[kOuts * call.in_features]());
    for (int64_t out = first; out < last; out += kOuts) {
        for (int64_t n = out; n < out + kOuts && n < last; ++n)
            widen_output<kCode, kGroup>(call, n, wide.get() + (n - out) * call.in_features);
        int64_t row = 0;
        // Three rows and four outputs are twelve sums: with what they are made of 16 registers.
        for (; row + 3 <= call.rows; row += 3)
            multiply_wide<T, 3>(call, x, wide.get(), row, out, last);
        if (row + 2 == call.rows) multiply_wide<T, 2>(call, x, wide.get(), row, out, last);
        if (row + 1 == call.rows) multiply_wide<T, 1>(call, x, wide.get(), row, out, last);
    }
}

template <class T, Code kCode, int kGroup>
inline void multiply_range(const SglQuantized& call, const float* x, const float* sums,
                           int64_t first, int64_t last) {
    if (call.rows >= sgl::kManyRows) {
        multiply_many<T, kCode, kGroup>(call, x, first, last);
        return;
    }
    for (int64_t out = first; out < last; ++out) {
        int64_t row = 0;
        for (; row + 4 <= call.rows; row += 4)
            multiply_rows<T, kCode, kGroup, 4>(call, x, sums, row, out);
        for (; row < call.rows; ++row)
            multiply_rows<T, kCode, kGroup, 1>(call, x, sums, row, out);
    }
}

template <class T>
inline void multiply_typed(const SglQuantized& call, const float* x, const float* sums,
                           int64_t first, int64_t last) {
    const Code code = code_of(call);
    if (code == Code::kHalf) multiply_range<T, Code::kHalf, 32>(call, x, sums, first, last);
    if (code == Code::kNamed) multiply_range<T, Code::kNamed, 32>(call, x, sums, first, last);
    if (code == Code::kFp8) multiply_range<T, Code::kFp8, 32>(call, x, sums, first, last);
    if (code != Code::kByte) return;
    if (call.group == 32) multiply_range<T, Code::kByte, 32>(call, x, sums, first, last);
    if (call.group == 16) multiply_range<T, Code::kByte, 16>(call, x, sums, first, last);
}

inline void multiply_any(const SglQuantized& call, const float* x, const float* sums, int64_t first,
                         int64_t last) {
    if (call.dtype == SGL_FLOAT32) multiply_typed<float>(call, x, sums, first, last);
    if (call.dtype == SGL_BFLOAT16) multiply_typed<Bf16>(call, x, sums, first, last);
    if (call.dtype == SGL_FLOAT16) multiply_typed<Fp16>(call, x, sums, first, last);
}

template <class T, Code kCode, int kGroup>
inline void dequantize_rows(const SglQuantized& call, int64_t first, int64_t last) {
    const std::unique_ptr<float[]> wide(new float[call.in_features]);
    for (int64_t row = first; row < last; ++row) {
        widen_output<kCode, kGroup>(call, call.ids ? call.ids[row] : row, wide.get());
        T* out = static_cast<T*>(call.out) + row * call.out_row;
#pragma omp simd
        for (int64_t d = 0; d < call.in_features; ++d) store(wide[d] * call.gain, out + d);
    }
}

template <class T>
inline void dequantize_typed(const SglQuantized& call, int64_t first, int64_t last) {
    const Code code = code_of(call);
    if (code == Code::kHalf) dequantize_rows<T, Code::kHalf, 32>(call, first, last);
    if (code == Code::kNamed) dequantize_rows<T, Code::kNamed, 32>(call, first, last);
    if (code == Code::kFp8) dequantize_rows<T, Code::kFp8, 32>(call, first, last);
    if (code != Code::kByte) return;
    if (call.group == 32) dequantize_rows<T, Code::kByte, 32>(call, first, last);
    if (call.group == 16) dequantize_rows<T, Code::kByte, 16>(call, first, last);
}

inline void dequantize_any(const SglQuantized& call, int64_t first, int64_t last) {
    if (call.dtype == SGL_FLOAT32) dequantize_typed<float>(call, first, last);
    if (call.dtype == SGL_BFLOAT16) dequantize_typed<Bf16>(call, first, last);
    if (call.dtype == SGL_FLOAT16) dequantize_typed<Fp16>(call, first, last);
}

}  // namespace

// What the files of products with quantised weights share.
#pragma once

#include <cstdint>

#include "api.h"

namespace sgl {

// From so many rows on the codes of a few outputs become floats once for all of them.
constexpr int64_t kManyRows = 6;

// Outputs [first, last) of all rows. `x` is the input in fp32 [rows, in_features]. `sums` is the sum of
// each of its groups [rows, in_features / group], read for fewer than kManyRows rows and a weight with
// minima only.
using MultiplyQuantized = void (*)(const SglQuantized&, const float* x, const float* sums,
                                   int64_t first, int64_t last);
// Rows [first, last) of the weight into `out`.
using Dequantize = void (*)(const SglQuantized&, int64_t first, int64_t last);

// 128 inputs of a row as bytes, in the order in which the codes of four blocks come: the first 16 inputs
// of each block in `bytes[0]`, the others in `bytes[1]`. Each lane is 4 of them.
struct RoundedInputs {
    int8_t bytes[2][64];
    float scale[16];       // of each lane's block
    int32_t offset[2][16]; // -128 times the sum of a lane, which bytes of codes + 128 need
    float sum[2][16];      // of a lane, times its scale
};

// Rows [rows, in_features] in fp32 into [rows, inputs / 128 rounded up]. Where `halves_apart` is false
// `offset[0]` and `sum[0]` are of both halves.
void round_inputs(const float* x, int64_t rows, int64_t in_features, bool halves_apart,
                  RoundedInputs* to);
void multiply_rounded(const SglQuantized&, const RoundedInputs* x, int64_t first, int64_t last);

void multiply_quantized_generic(const SglQuantized&, const float*, const float*, int64_t, int64_t);
void multiply_quantized_avx2(const SglQuantized&, const float*, const float*, int64_t, int64_t);
void multiply_quantized_avx512(const SglQuantized&, const float*, const float*, int64_t, int64_t);
void dequantize_generic(const SglQuantized&, int64_t, int64_t);
void dequantize_avx2(const SglQuantized&, int64_t, int64_t);
void dequantize_avx512(const SglQuantized&, int64_t, int64_t);

}  // namespace sgl

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

// The inputs rounded to bytes, for multiply_rounded: room for them, and how they get there from fp32
// [rows, in_features]. Inputs and codes meet in quantized_dots.cpp; quantized_lines.h says how they lie.
int64_t rounded_bytes(const SglQuantized&);
void round_inputs(const SglQuantized&, const float* x, char* to);
void multiply_rounded(const SglQuantized&, const char* x, int64_t first, int64_t last);
// The same for more than a few rows, see quantized_lanes.cpp.
void multiply_lanes(const SglQuantized&, const char* x, int64_t first, int64_t last);

// The inputs as they are, for multiply_packed, which rounds the weight: room for them, and how 16 rows,
// from 16 * tile on, get there. See quantized_amx.cpp.
int64_t packed_bytes(const SglQuantized&);
void pack_inputs(const SglQuantized&, int64_t tile, char* to);
void multiply_packed(const SglQuantized&, const char* x, int64_t first, int64_t last);

void multiply_quantized_generic(const SglQuantized&, const float*, const float*, int64_t, int64_t);
void multiply_quantized_avx2(const SglQuantized&, const float*, const float*, int64_t, int64_t);
void multiply_quantized_avx512(const SglQuantized&, const float*, const float*, int64_t, int64_t);
void dequantize_generic(const SglQuantized&, int64_t, int64_t);
void dequantize_avx2(const SglQuantized&, int64_t, int64_t);
void dequantize_avx512(const SglQuantized&, int64_t, int64_t);

}  // namespace sgl

// What the files of the products of a few rows share.
#pragma once

#include <cstdint>

#include "api.h"

namespace sgl {

// Outputs [first, last) of all rows. `x` are the rows as floats, `x_row` apart.
using Multiply = void (*)(const SglLinear&, const float* x, int64_t x_row, int64_t first,
                          int64_t last);

void linear_generic(const SglLinear&, const float*, int64_t, int64_t, int64_t);
void linear_avx2(const SglLinear&, const float*, int64_t, int64_t, int64_t);
void linear_avx512(const SglLinear&, const float*, int64_t, int64_t, int64_t);

// linear_avx2 wants rows in a form of its own: floats, wide_row_avx2() apart, filled up with zeros, and of
// a bf16 weight in the order in which it takes that apart. Rows [first, last) of all, in the weight's type
// or in fp32, to their places in `to`.
int64_t wide_row_avx2(int64_t in_features);
void widen_rows_avx2(const SglLinear&, int32_t x_dtype, int64_t first, int64_t last, float* to);

// The same of bfloat16 rows as they are. Ranges had best be multiples of kDotOuts.
constexpr int64_t kDotOuts = 6;
void linear_dots(const SglLinear&, int64_t first, int64_t last);

// The same on AMX tiles, of rows that pack_rows() has packed into a room of packed_bytes(), or has found
// to need none. Ranges had best be multiples of kTileOuts.
constexpr int64_t kTileOuts = 32;
int64_t packed_bytes(const SglLinear&);
const char* pack_rows(const SglLinear&, char* room);
void linear_tiles(const SglLinear&, const char* packed, int64_t first, int64_t last);

}  // namespace sgl

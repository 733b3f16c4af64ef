// What the files of the work on single rows share.
#pragma once

#include <cstdint>

#include "api.h"

namespace sgl {

// Rows [first, last) of a call.
using NormRows = void (*)(const SglNorm&, int64_t first, int64_t last);
using GateRows = void (*)(const SglGate&, int64_t first, int64_t last);
using HighestRows = void (*)(const SglHighest&, int64_t first, int64_t last);
// The weights e^((logit - highest) / temperature) of a row, those below `least` 0, and of each block of
// kWeightBlock their sum and the largest. The last block is filled up with 0.
using WeighRow = void (*)(const float* logits, int64_t width, float highest, float temperature,
                          float least, float* weights, float* sums, float* tops);
constexpr int64_t kWeightBlock = 64;
using RotateRows = void (*)(const SglRotate&, int64_t first, int64_t last);

void norm_rows_generic(const SglNorm&, int64_t, int64_t);
void norm_rows_avx2(const SglNorm&, int64_t, int64_t);
void norm_rows_avx512(const SglNorm&, int64_t, int64_t);
void gate_rows_generic(const SglGate&, int64_t, int64_t);
void gate_rows_avx2(const SglGate&, int64_t, int64_t);
void gate_rows_avx512(const SglGate&, int64_t, int64_t);
void rotate_rows_generic(const SglRotate&, int64_t, int64_t);
void rotate_rows_avx2(const SglRotate&, int64_t, int64_t);
void rotate_rows_avx512(const SglRotate&, int64_t, int64_t);
void highest_rows_generic(const SglHighest&, int64_t, int64_t);
void highest_rows_avx2(const SglHighest&, int64_t, int64_t);
void highest_rows_avx512(const SglHighest&, int64_t, int64_t);
void weigh_row_generic(const float*, int64_t, float, float, float, float*, float*, float*);
void weigh_row_avx2(const float*, int64_t, float, float, float, float*, float*, float*);
void weigh_row_avx512(const float*, int64_t, float, float, float, float*, float*, float*);

// Columns [first, first + count) of all rows of K, or of V, into their slots; numbers of k and v take
// `bytes` each. Whole heads, of INT8. The call must be one that sgl_store() serves.
void store_columns(const SglStore&, bool of_v, int64_t first, int64_t count, int64_t bytes);

}  // namespace sgl

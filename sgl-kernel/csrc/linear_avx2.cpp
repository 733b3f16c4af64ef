// Products of a few rows: AVX2, FMA and F16C.
#include "isa_avx2.h"
#include "vector_linear.h"

void sgl::linear_avx2(const SglLinear& call, const float* x, int64_t x_row, int64_t first,
                      int64_t last) {
    multiply_any(call, x, x_row, first, last);
}

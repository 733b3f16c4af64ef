// Products of a few rows: AVX-512.
#include "isa_avx512.h"
#include "vector_linear.h"

void sgl::linear_avx512(const SglLinear& call, const float* x, int64_t x_row, int64_t first,
                        int64_t last) {
    multiply_any(call, x, x_row, first, last);
}

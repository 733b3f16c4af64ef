// Products of a few rows: plain C++.
#include "isa_generic.h"
#include "vector_linear.h"

void sgl::linear_generic(const SglLinear& call, const float* x, int64_t x_row, int64_t first,
                         int64_t last) {
    multiply_any(call, x, x_row, first, last);
}

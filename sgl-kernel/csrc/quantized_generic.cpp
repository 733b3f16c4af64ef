// Products with quantised weights: plain C++.
#include "isa_generic.h"

#include "vector_quantized.h"

void sgl::multiply_quantized_generic(const SglQuantized& call, const float* x, const float* sums,
                                  int64_t first, int64_t last) {
    multiply_any(call, x, sums, first, last);
}

void sgl::dequantize_generic(const SglQuantized& call, int64_t first, int64_t last) {
    dequantize_any(call, first, last);
}

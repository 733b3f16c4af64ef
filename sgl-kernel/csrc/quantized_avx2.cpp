// Products with quantised weights: AVX2, FMA and F16C.
#include "isa_avx2.h"

#include "vector_quantized.h"

void sgl::multiply_quantized_avx2(const SglQuantized& call, const float* x, const float* sums,
                                  int64_t first, int64_t last) {
    multiply_any(call, x, sums, first, last);
}

void sgl::dequantize_avx2(const SglQuantized& call, int64_t first, int64_t last) {
    dequantize_any(call, first, last);
}

// Products with quantised weights: AVX-512.
#include "isa_avx512.h"

#include "vector_quantized.h"

void sgl::multiply_quantized_avx512(const SglQuantized& call, const float* x, const float* sums,
                                  int64_t first, int64_t last) {
    multiply_any(call, x, sums, first, last);
}

void sgl::dequantize_avx512(const SglQuantized& call, int64_t first, int64_t last) {
    dequantize_any(call, first, last);
}

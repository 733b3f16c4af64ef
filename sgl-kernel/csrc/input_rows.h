// Input rows of any dtype as floats, for the products that want them so.
#pragma once

#include "api.h"
#include "numbers.h"

namespace {

template <class T>
inline void widen_typed(const void* x, int64_t x_row, int64_t rows, int64_t width, float* to) {
    for (int64_t m = 0; m < rows; ++m) {
        const T* row = static_cast<const T*>(x) + m * x_row;
        for (int64_t d = 0; d < width; ++d) to[m * width + d] = to_float(row[d]);
    }
}

// Rows of `width` elements, `x_row` apart, into `to` [rows, width].
inline void widen_rows(const void* x, int32_t dtype, int64_t x_row, int64_t rows, int64_t width,
                       float* to) {
    if (dtype == SGL_FLOAT32) widen_typed<float>(x, x_row, rows, width, to);
    if (dtype == SGL_BFLOAT16) widen_typed<Bf16>(x, x_row, rows, width, to);
    if (dtype == SGL_FLOAT16) widen_typed<Fp16>(x, x_row, rows, width, to);
}

}  // namespace

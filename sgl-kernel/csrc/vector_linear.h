// Products of a few rows with a weight that is read once: fp32 arithmetic on any dtype.
//
// The including file defines `Isa`, as for vector_attention.h. A weight's row lies in memory as its
// checkpoint has it; what is multiplied at a time is a block of kRows x kOuts sums in registers, and
// the weight's part of it stays in the first cache while the other rows use it.
#pragma once

#include "linear.h"
#include "numbers.h"

namespace {

template <class T, int kRows, int kOuts>
inline void multiply_block(const SglLinear& call, const float* x, int64_t x_row, int64_t row,
                           int64_t out) {
    const int64_t width = call.in_features, whole = width - width % Isa::kLanes;
    const T* weight = static_cast<const T*>(call.weight) + out * call.weight_row;
    const float* input = x + row * x_row;
    Isa::F total[kRows][kOuts] = {};
    for (int64_t d = 0; d < whole; d += Isa::kLanes) {
        Isa::F part[kOuts];
        for (int n = 0; n < kOuts; ++n) part[n] = Isa::load(weight + n * call.weight_row + d);
        for (int m = 0; m < kRows; ++m) {
            const Isa::F value = Isa::load(input + m * x_row + d);
            for (int n = 0; n < kOuts; ++n) total[m][n] += value * part[n];
        }
    }
    const T* bias = static_cast<const T*>(call.bias);
    for (int m = 0; m < kRows; ++m)
        for (int n = 0; n < kOuts; ++n) {
            float sum = Isa::sum(total[m][n]);
            for (int64_t d = whole; d < width; ++d)
                sum += input[m * x_row + d] * to_float(weight[n * call.weight_row + d]);
            if (bias) sum += to_float(bias[out + n]);
            store(sum, static_cast<T*>(call.out) + (row + m) * call.out_row + out + n);
        }
}

template <class T, int kOuts>
inline void multiply_rows(const SglLinear& call, const float* x, int64_t x_row, int64_t out) {
    int64_t row = 0;
    for (; row + 2 <= call.rows; row += 2) multiply_block<T, 2, kOuts>(call, x, x_row, row, out);
    if (row < call.rows) multiply_block<T, 1, kOuts>(call, x, x_row, row, out);
}

template <class T>
inline void multiply(const SglLinear& call, const float* x, int64_t x_row, int64_t first,
                     int64_t last) {
    int64_t out = first;
    if (call.rows == 1)  // one row alone needs more sums at a time to hide the additions' latency
        for (; out + 8 <= last; out += 8) multiply_block<T, 1, 8>(call, x, x_row, 0, out);
    for (; out + 4 <= last; out += 4) multiply_rows<T, 4>(call, x, x_row, out);
    for (; out < last; ++out) multiply_rows<T, 1>(call, x, x_row, out);
}

inline void multiply_any(const SglLinear& call, const float* x, int64_t x_row, int64_t first,
                         int64_t last) {
    if (call.dtype == SGL_FLOAT32) multiply<float>(call, x, x_row, first, last);
    if (call.dtype == SGL_BFLOAT16) multiply<Bf16>(call, x, x_row, first, last);
    if (call.dtype == SGL_FLOAT16) multiply<Fp16>(call, x, x_row, first, last);
}

}  // namespace

// Products of rounded inputs with a quantised weight, by sums of bytes in AVX2's vectors: those of a few
// rows and of more. The including file brings the `Sums` of byte_sums.h.
#pragma once

#include "quantized_few.h"
#include "quantized_rows.h"

namespace {

// More rows are multiplied lane by lane, where codes have 4 bits. With 8 bits that took as long.
constexpr int64_t kMostRows = 5;

template <class Sums, bool kMins>
void multiply_halves(const SglQuantized& call, const char* x, int64_t first, int64_t last) {
    if (call.rows > kMostRows)
        multiply_many<Sums, kMins>(call, x, first, last);
    else
        multiply_few<Sums, 4, 1, kMins>(call, x, first, last);
}

template <class Sums, bool kMins>
void multiply_layout(const SglQuantized& call, const char* x, int64_t first, int64_t last) {
    if (call.bits == 4) multiply_halves<Sums, kMins>(call, x, first, last);
    if (call.bits == 8 && call.group == 32)
        multiply_few<Sums, 8, 1, kMins>(call, x, first, last);
    if (call.bits == 8 && call.group == 16)
        multiply_few<Sums, 8, 2, kMins>(call, x, first, last);
}

template <class Sums>
void multiply_bytes(const SglQuantized& call, const char* x, int64_t first, int64_t last) {
    if (call.mins)
        multiply_layout<Sums, true>(call, x, first, last);
    else
        multiply_layout<Sums, false>(call, x, first, last);
}

}  // namespace

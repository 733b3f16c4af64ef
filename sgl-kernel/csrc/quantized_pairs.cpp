// Products of rounded inputs with a quantised weight, by sums of pairs of products of bytes: AVX2.
#include "quantized_few.h"
#include "quantized_rows.h"

namespace {

// More rows are multiplied lane by lane, where codes have 4 bits. With 8 bits that took as long.
constexpr int64_t kMostRows = 5;

template <bool kMins>
void multiply_halves(const SglQuantized& call, const char* x, int64_t first, int64_t last) {
    if (call.rows > kMostRows)
        multiply_many<PairSums, kMins>(call, x, first, last);
    else
        multiply_few<PairSums, 4, 1, kMins>(call, x, first, last);
}

template <bool kMins>
void multiply_layout(const SglQuantized& call, const char* x, int64_t first, int64_t last) {
    if (call.bits == 4) multiply_halves<kMins>(call, x, first, last);
    if (call.bits == 8 && call.group == 32) multiply_few<PairSums, 8, 1, kMins>(call, x, first, last);
    if (call.bits == 8 && call.group == 16) multiply_few<PairSums, 8, 2, kMins>(call, x, first, last);
}

void multiply(const SglQuantized& call, const char* x, int64_t first, int64_t last) {
    if (call.mins)
        multiply_layout<true>(call, x, first, last);
    else
        multiply_layout<false>(call, x, first, last);
}

}  // namespace

const sgl::RoundedProduct sgl::rounded_pairs{rounded_bytes_in_parts, round_inputs_in_parts, multiply};

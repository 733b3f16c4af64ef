// Products with quantised weights: widens the input, sums its groups, shares the outputs out.
#include "quantized.h"

#include <algorithm>
#include <memory>

#include "choose.h"
#include "input_rows.h"
#include "parallel.h"

namespace {

constexpr int64_t kTasksPerThread = 8;     // so that threads end together
constexpr int64_t kTaskCodes = 32 << 10;   // fewer are not worth a task
constexpr int64_t kBlock = 32;
constexpr int64_t kOutsAtOnce = 8;         // ranges are multiples of it

void sum_groups(const SglQuantized& call, const float* x, float* sums) {
    const int64_t count = call.rows * (call.in_features / call.group);
    for (int64_t i = 0; i < count; ++i) {
        float sum = 0.0f;
        for (int64_t d = 0; d < call.group; ++d) sum += x[i * call.group + d];
        sums[i] = sum;
    }
}

bool is_served(const SglQuantized& call) {
    if (call.dtype < SGL_FLOAT32 || call.dtype > SGL_FLOAT16 || call.num_threads < 1) return false;
    if (call.out_features < 1 || call.in_features < kBlock || call.in_features % kBlock)
        return false;
    return (call.bits == 4 && call.group == 32) ||
           (call.bits == 8 && (call.group == 32 || call.group == 16));
}

int64_t outs_of_a_task(const SglQuantized& call) {
    const int64_t least = kTaskCodes / call.in_features + 1;
    const int64_t fair = call.out_features / (kTasksPerThread * call.num_threads) + 1;
    return (std::max(least, fair) + kOutsAtOnce - 1) / kOutsAtOnce * kOutsAtOnce;
}

template <class Work>
void over_outs(const SglQuantized& call, int64_t count, const Work& work) {
    const int64_t outs = outs_of_a_task(call);
    sgl::for_each_index((count + outs - 1) / outs, call.num_threads, [&] {
        return [&](int64_t i) { work(i * outs, std::min(count, (i + 1) * outs)); };
    });
}

int32_t multiply_rounded(const SglQuantized& call) {
#if defined(__x86_64__)
    if (call.isa < SGL_AVX512_BF16 || call.isa > SGL_AMX) return -1;
    const std::unique_ptr<float[]> wide(new float[call.rows * call.in_features]);
    widen_rows(call.x, call.dtype, call.x_row, call.rows, call.in_features, wide.get());
    const std::unique_ptr<char[]> x(new char[sgl::rounded_bytes(call) + 64]);
    char* lines = x.get() + -reinterpret_cast<uintptr_t>(x.get()) % 64;
    sgl::round_inputs(call, wide.get(), lines);
    over_outs(call, call.out_features, [&](int64_t first, int64_t last) {
        sgl::multiply_rounded(call, lines, first, last);
    });
    return 0;
#else
    (void)call;
    return -1;
#endif
}

}  // namespace

extern "C" int32_t sgl_quantized_linear(const SglQuantized* arguments) {
    const SglQuantized& call = *arguments;
    if (!is_served(call) || call.rows < 1) return -1;
    if (call.round_inputs) return multiply_rounded(call);
    const sgl::MultiplyQuantized multiply = SGL_CHOOSE(call.isa, sgl::multiply_quantized);
    const std::unique_ptr<float[]> x(new float[call.rows * call.in_features]);
    widen_rows(call.x, call.dtype, call.x_row, call.rows, call.in_features, x.get());
    std::unique_ptr<float[]> sums;
    if (call.mins && call.rows < sgl::kManyRows) {
        sums.reset(new float[call.rows * (call.in_features / call.group)]);
        sum_groups(call, x.get(), sums.get());
    }
    over_outs(call, call.out_features, [&](int64_t first, int64_t last) {
        multiply(call, x.get(), sums.get(), first, last);
    });
    return 0;
}

extern "C" int32_t sgl_dequantize(const SglQuantized* arguments) {
    const SglQuantized& call = *arguments;
    if (!is_served(call)) return -1;
    const sgl::Dequantize dequantize = SGL_CHOOSE(call.isa, sgl::dequantize);
    const int64_t count = call.ids ? call.rows : call.out_features;
    over_outs(call, count, [&](int64_t first, int64_t last) { dequantize(call, first, last); });
    return 0;
}

// Products with quantised weights: widens the input, sums its groups, shares the outputs out.
#include "quantized.h"

#include <algorithm>

#include "after.h"
#include "choose.h"
#include "input_rows.h"
#include "parallel.h"
#include "scratch.h"

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
void over_outs(const SglQuantized& call, int64_t count, sgl::After* after, const Work& work) {
    const int64_t outs = outs_of_a_task(call);
    sgl::for_each_index((count + outs - 1) / outs, call.num_threads, [&] {
        return [&](int64_t i) {
            const int64_t first = i * outs, last = std::min(count, first + outs);
            work(first, last);
            if (after) after->done(first, last);
        };
    });
}

// The inputs as floats, until the thread's next call.
const float* widened(const SglQuantized& call) {
    thread_local sgl::Scratch room;
    auto* wide = reinterpret_cast<float*>(room.take(call.rows * call.in_features * 4));
    widen_rows(call.x, call.dtype, call.x_row, call.rows, call.in_features, wide);
    return wide;
}

int32_t multiply_rounded(const SglQuantized& call, sgl::After* after) {
#if defined(__x86_64__)
    if (call.isa < SGL_AVX512_BF16 || call.isa > SGL_AMX) return -1;
    thread_local sgl::Scratch room;
    char* lines = room.take(sgl::rounded_bytes(call));
    sgl::round_inputs(call, widened(call), lines);
    over_outs(call, call.out_features, after, [&](int64_t first, int64_t last) {
        sgl::multiply_rounded(call, lines, first, last);
    });
    return 0;
#else
    (void)call;
    (void)after;
    return -1;
#endif
}

}  // namespace

int32_t sgl::quantized_linear_then(const SglQuantized& call, After* after) {
    if (!is_served(call) || call.rows < 1) return -1;
    if (call.round_inputs) return ::multiply_rounded(call, after);
    const sgl::MultiplyQuantized multiply = SGL_CHOOSE(call.isa, sgl::multiply_quantized);
    const float* x = widened(call);
    float* sums = nullptr;
    if (call.mins && call.rows < sgl::kManyRows) {
        thread_local Scratch room;
        const int64_t count = call.rows * (call.in_features / call.group);
        sums = reinterpret_cast<float*>(room.take(count * 4));
        sum_groups(call, x, sums);
    }
    over_outs(call, call.out_features, after, [&](int64_t first, int64_t last) {
        multiply(call, x, sums, first, last);
    });
    return 0;
}

extern "C" int32_t sgl_quantized_linear(const SglQuantized* call) {
    return sgl::quantized_linear_then(*call, nullptr);
}

extern "C" int32_t sgl_dequantize(const SglQuantized* arguments) {
    const SglQuantized& call = *arguments;
    if (!is_served(call)) return -1;
    const sgl::Dequantize dequantize = SGL_CHOOSE(call.isa, sgl::dequantize);
    const int64_t count = call.ids ? call.rows : call.out_features;
    over_outs(call, count, nullptr, [&](int64_t first, int64_t last) {
        dequantize(call, first, last);
    });
    return 0;
}

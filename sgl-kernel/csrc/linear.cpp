// Products of a few rows: widens the rows once, then gives each thread ranges of the outputs.
#include "linear.h"

#include <algorithm>
#include <memory>

#include "choose.h"
#include "input_rows.h"
#include "parallel.h"

namespace {

constexpr int64_t kOutsAtOnce = 8;         // ranges are multiples of it
constexpr int64_t kTasksPerThread = 8;     // so that threads end together
constexpr int64_t kTaskBytes = 32 << 10;   // of the weight; less is not worth a task

int64_t outs_of_a_task(const SglLinear& call) {
    const int64_t row_bytes = call.in_features * (call.dtype == SGL_FLOAT32 ? 4 : 2);
    const int64_t least = kTaskBytes / std::max<int64_t>(1, row_bytes) + 1;
    const int64_t fair = call.out_features / (kTasksPerThread * call.num_threads) + 1;
    return (std::max(least, fair) + kOutsAtOnce - 1) / kOutsAtOnce * kOutsAtOnce;
}

}  // namespace

extern "C" int32_t sgl_linear(const SglLinear* arguments) {
    const SglLinear& call = *arguments;
    if (call.dtype < SGL_FLOAT32 || call.dtype > SGL_FLOAT16 || call.num_threads < 1) return -1;
    if (call.rows < 1 || call.out_features < 1 || call.in_features < 1) return -1;
    const auto* x = static_cast<const float*>(call.x);
    int64_t x_row = call.x_row;
    std::unique_ptr<float[]> wide;
    if (call.dtype != SGL_FLOAT32) {
        wide.reset(new float[call.rows * call.in_features]);
        widen_rows(call.x, call.dtype, call.x_row, call.rows, call.in_features, wide.get());
        x = wide.get();
        x_row = call.in_features;
    }
    const sgl::Multiply multiply = SGL_CHOOSE(call.isa, sgl::linear);
    const int64_t outs = outs_of_a_task(call);
    sgl::for_each_index((call.out_features + outs - 1) / outs, call.num_threads, [&] {
        return [&](int64_t i) {
            multiply(call, x, x_row, i * outs, std::min(call.out_features, (i + 1) * outs));
        };
    });
    return 0;
}

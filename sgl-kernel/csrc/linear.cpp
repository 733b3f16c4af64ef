// Products of rows: gives each thread ranges of the outputs. Where there are no dot instructions for
// them, the rows are widened once.
#include "linear.h"

#include <algorithm>

#include "after.h"
#include "choose.h"
#include "input_rows.h"
#include "parallel.h"
#include "scratch.h"

namespace {

constexpr int64_t kOutsAtOnce = 8;         // ranges are multiples of it
constexpr int64_t kTasksPerThread = 8;     // so that threads end together
constexpr int64_t kTaskBytes = 32 << 10;   // of the weight; less is not worth a task
constexpr int64_t kWideElements = 32 << 10;  // widened by a task
constexpr int64_t kWideBytes = 16 << 20;     // of widened rows at a time, if they are many

int64_t outs_of_a_task(const SglLinear& call, int64_t at_once) {
    const int64_t row_bytes = call.in_features * (call.dtype == SGL_FLOAT32 ? 4 : 2);
    const int64_t least = kTaskBytes / std::max<int64_t>(1, row_bytes) + 1;
    const int64_t fair = call.out_features / (kTasksPerThread * call.num_threads) + 1;
    return (std::max(least, fair) + at_once - 1) / at_once * at_once;
}

template <class Work>
void over_outs(const SglLinear& call, int64_t at_once, sgl::After* after, const Work& work) {
    const int64_t outs = outs_of_a_task(call, at_once);
    sgl::for_each_index((call.out_features + outs - 1) / outs, call.num_threads, [&] {
        return [&](int64_t i) {
            const int64_t first = i * outs, last = std::min(call.out_features, first + outs);
            work(first, last);
            if (after) after->done(first, last);
        };
    });
}

void multiply_widened(const SglLinear& call, sgl::After* after) {
    const auto* x = static_cast<const float*>(call.x);
    int64_t x_row = call.x_row;
    if (call.dtype != SGL_FLOAT32) {
        thread_local sgl::Scratch room;
        auto* wide = reinterpret_cast<float*>(room.take(call.rows * call.in_features * 4));
        widen_rows(call.x, call.dtype, call.x_row, call.rows, call.in_features, wide);
        x = wide;
        x_row = call.in_features;
    }
    const sgl::Multiply multiply = SGL_CHOOSE(call.isa, sgl::linear);
    over_outs(call, kOutsAtOnce, after, [&](int64_t first, int64_t last) {
        multiply(call, x, x_row, first, last);
    });
}

#if defined(__x86_64__)
// AVX2 has a form of its own for the rows, and multiplies any number of them.
void multiply_avx2(const SglLinear& whole, sgl::After* after) {
    const int64_t row = sgl::wide_row_avx2(whole.in_features);
    const int64_t size = whole.dtype == SGL_FLOAT32 ? 4 : 2;
    const int64_t most = std::max<int64_t>(1, kWideBytes / (4 * row));
    const int64_t rows_of_a_task = std::max<int64_t>(1, kWideElements / row);
    thread_local sgl::Scratch room;
    auto* x = reinterpret_cast<float*>(room.take(std::min(most, whole.rows) * row * 4));
    for (int64_t first = 0; first < whole.rows; first += most) {
        SglLinear call = whole;
        call.rows = std::min(most, whole.rows - first);
        call.x = static_cast<const char*>(whole.x) + first * whole.x_row * size;
        call.out = static_cast<char*>(whole.out) + first * whole.out_row * size;
        const int64_t tasks = (call.rows + rows_of_a_task - 1) / rows_of_a_task;
        sgl::for_each_index(tasks, call.num_threads, [&] {
            return [&](int64_t i) {
                const int64_t begin = i * rows_of_a_task;
                const int64_t end = std::min(call.rows, begin + rows_of_a_task);
                sgl::widen_rows_avx2(call, call.dtype, begin, end, x);
            };
        });
        sgl::After* const then = first + most >= whole.rows ? after : nullptr;
        over_outs(call, kOutsAtOnce, then, [&](int64_t begin, int64_t end) {
            sgl::linear_avx2(call, x, row, begin, end);
        });
    }
}
#endif

}  // namespace

int32_t sgl::linear_then(const SglLinear& call, After* after) {
    if (call.dtype < SGL_FLOAT32 || call.dtype > SGL_FLOAT16 || call.num_threads < 1) return -1;
    if (call.rows < 1 || call.out_features < 1 || call.in_features < 1) return -1;
#if defined(__x86_64__)
    if (call.isa == SGL_AMX && call.dtype == SGL_BFLOAT16) {
        thread_local sgl::Scratch room;
        const char* packed = sgl::pack_rows(call, room.take(sgl::packed_bytes(call)));
        over_outs(call, sgl::kTileOuts, after, [&](int64_t first, int64_t last) {
            sgl::linear_tiles(call, packed, first, last);
        });
        return 0;
    }
    if (call.isa == SGL_AVX512_BF16 && call.dtype == SGL_BFLOAT16) {
        over_outs(call, sgl::kDotOuts, after, [&](int64_t first, int64_t last) {
            sgl::linear_dots(call, first, last);
        });
        return 0;
    }
    if (call.isa == SGL_AVX2) {
        multiply_avx2(call, after);
        return 0;
    }
#endif
    multiply_widened(call, after);
    return 0;
}

extern "C" int32_t sgl_linear(const SglLinear* call) { return sgl::linear_then(*call, nullptr); }

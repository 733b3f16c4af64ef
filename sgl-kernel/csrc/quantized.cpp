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
constexpr int64_t kTileOuts = 32;          // the same by tiles
constexpr int64_t kTile = 16;              // rows that are packed together
constexpr int64_t kRoundedRows = 512;      // that are rounded at a time
// Rows that are packed at a time: at least so many, or what stays in the second cache.
constexpr int64_t kPackedRows = 256, kPackedBytes = 1 << 20;

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
    return is_layout(call);
}

int64_t outs_of_a_task(const SglQuantized& call, int64_t at_once) {
    const int64_t least = kTaskCodes / call.in_features + 1;
    const int64_t fair = call.out_features / (kTasksPerThread * call.num_threads) + 1;
    return (std::max(least, fair) + at_once - 1) / at_once * at_once;
}

template <class Work>
void over_outs(const SglQuantized& call, int64_t count, int64_t at_once, sgl::After* after,
               const Work& work) {
    const int64_t outs = outs_of_a_task(call, at_once);
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

#if defined(__x86_64__)
// Rows [first, first + count) by tiles.
void multiply_some(const SglQuantized& whole, int64_t first, int64_t count, sgl::After* after) {
    const SglQuantized call = rows_of(whole, first, count);
    thread_local sgl::Scratch room;
    char* packed = room.take(sgl::packed_bytes(call));
    sgl::for_each_index((count + kTile - 1) / kTile, call.num_threads, [&] {
        return [&](int64_t tile) { sgl::pack_inputs(call, tile, packed); };
    });
    over_outs(call, call.out_features, kTileOuts, after, [&](int64_t from, int64_t to) {
        sgl::multiply_packed(call, packed, from, to);
    });
}
#endif

int32_t multiply_packed(const SglQuantized& call, sgl::After* after) {
#if defined(__x86_64__)
    if (call.isa != SGL_AMX || call.dtype != SGL_BFLOAT16) return -1;
    const int64_t most = std::max(kPackedRows, kPackedBytes / (2 * call.in_features));
    for (int64_t row = 0; row < call.rows; row += most) {
        const int64_t count = std::min(most, call.rows - row);
        multiply_some(call, row, count, row + count == call.rows ? after : nullptr);
    }
    return 0;
#else
    (void)call;
    (void)after;
    return -1;
#endif
}

// Rounds the inputs, as many rows at a time as make a task.
void round_inputs(const SglQuantized& call, const sgl::RoundedProduct& product, char* to) {
    const int64_t width = call.in_features, rows = std::max<int64_t>(1, kTaskCodes / width);
    const int64_t bytes = product.bytes(call) / call.rows;
    sgl::for_each_index((call.rows + rows - 1) / rows, call.num_threads, [&] {
        return [&](int64_t i) {
            const SglQuantized some =
                rows_of(call, i * rows, std::min(rows, call.rows - i * rows));
            product.round(some, widened(some), to + i * rows * bytes);
        };
    });
}

int32_t multiply_rounded(const SglQuantized& whole, sgl::After* after) {
    const sgl::RoundedProduct* product = sgl::rounded_product(whole.isa);
    if (!product) return -1;
    thread_local sgl::Scratch room;
    for (int64_t row = 0; row < whole.rows; row += kRoundedRows) {
        const bool ends = row + kRoundedRows >= whole.rows;
        const SglQuantized call = rows_of(whole, row, std::min(kRoundedRows, whole.rows - row));
        char* rounded = room.take(product->bytes(call));
        round_inputs(call, *product, rounded);
        over_outs(call, call.out_features, kOutsAtOnce, ends ? after : nullptr,
                  [&](int64_t first, int64_t last) { product->multiply(call, rounded, first, last); });
    }
    return 0;
}

}  // namespace

const sgl::RoundedProduct* sgl::rounded_product(int32_t isa) {
#if defined(__x86_64__)
    if (isa >= SGL_AVX512_BF16 && isa <= SGL_AMX) return &rounded_dots;
    if (isa != SGL_AVX2 && isa != SGL_AVX512) return nullptr;
#if defined(SGL_AVX_VNNI)
    if (has_avx_vnni()) return &rounded_vex;
#endif
    return &rounded_pairs;
#else
    (void)isa;
    return nullptr;
#endif
}

int32_t sgl::quantized_linear_then(const SglQuantized& call, After* after) {
    if (!is_served(call) || call.rows < 1) return -1;
    if (call.round_weight) return ::multiply_packed(call, after);
    if (call.round_inputs) return ::multiply_rounded(call, after);
    if (has_fp8_dots(call)) {
        over_outs(call, call.out_features, kOutsAtOnce, after, [&](int64_t first, int64_t last) {
            multiply_fp8_dots(call, first, last);
        });
        return 0;
    }
    const sgl::MultiplyQuantized multiply = SGL_CHOOSE(call.isa, sgl::multiply_quantized);
    const float* x = widened(call);
    float* sums = nullptr;
    if (call.mins && call.rows < sgl::kManyRows) {
        thread_local Scratch room;
        const int64_t count = call.rows * (call.in_features / call.group);
        sums = reinterpret_cast<float*>(room.take(count * 4));
        sum_groups(call, x, sums);
    }
    over_outs(call, call.out_features, kOutsAtOnce, after, [&](int64_t first, int64_t last) {
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
    over_outs(call, count, kOutsAtOnce, nullptr, [&](int64_t first, int64_t last) {
        dequantize(call, first, last);
    });
    return 0;
}

// Work on single rows: chooses the instructions and gives each thread ranges of rows.
#include "rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "choose.h"
#include "input_rows.h"
#include "parallel.h"

namespace {

constexpr int64_t kTaskElements = 32 << 10;  // fewer are not worth a thread's waking
constexpr int64_t kTaskBytes = 256 << 10;    // copied

template <class Call>
void over_rows(const Call& call, void (*work)(const Call&, int64_t, int64_t)) {
    const int64_t rows = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, call.width));
    sgl::for_each_index((call.rows + rows - 1) / rows, call.num_threads, [&] {
        return [&](int64_t i) { work(call, i * rows, std::min(call.rows, (i + 1) * rows)); };
    });
}

bool is_dtype(int32_t dtype) { return dtype >= SGL_FLOAT32 && dtype <= SGL_FLOAT16; }

}  // namespace

extern "C" int32_t sgl_norm(const SglNorm* arguments) {
    const SglNorm& call = *arguments;
    if (!is_dtype(call.x_dtype) || !is_dtype(call.dtype) || call.num_threads < 1) return -1;
    if (call.width < 1 || call.group < 1 || (call.residual && !call.total)) return -1;
    over_rows(call, SGL_CHOOSE(call.isa, sgl::norm_rows));
    return 0;
}

extern "C" int32_t sgl_silu_and_mul(const SglGate* arguments) {
    const SglGate& call = *arguments;
    if (!is_dtype(call.dtype) || call.num_threads < 1 || call.width < 1) return -1;
    over_rows(call, SGL_CHOOSE(call.isa, sgl::silu_rows));
    return 0;
}

extern "C" int32_t sgl_rotate(const SglRotate* arguments) {
    const SglRotate& call = *arguments;
    if (!is_dtype(call.dtype) || call.num_threads < 1 || call.width < 1) return -1;
    if (call.head_dim < 2 || call.head_dim % 2 || call.width % call.head_dim) return -1;
    over_rows(call, SGL_CHOOSE(call.isa, sgl::rotate_rows));
    return 0;
}

extern "C" int32_t sgl_highest(const SglHighest* arguments) {
    const SglHighest& call = *arguments;
    if (call.num_threads < 1 || call.width < 1) return -1;
    over_rows(call, SGL_CHOOSE(call.isa, sgl::highest_rows));
    return 0;
}

extern "C" int32_t sgl_gather(const SglGather* arguments) {
    const SglGather& call = *arguments;
    if (call.bytes < 1) return -1;
    for (int64_t i = 0; i < call.rows; ++i)
        std::memcpy(static_cast<char*>(call.out) + i * call.out_row,
                    static_cast<const char*>(call.table) + call.ids[i] * call.table_row,
                    static_cast<size_t>(call.bytes));
    return 0;
}

extern "C" int32_t sgl_angles(const SglAngles* arguments) {
    const SglAngles& call = *arguments;
    if (call.half < 1) return -1;
    const int64_t first = call.interleaved ? 2 : 1, second = call.interleaved ? 1 : call.half;
    for (int64_t row = 0; row < call.rows; ++row)
        for (int64_t i = 0; i < call.half; ++i) {
            const double angle = static_cast<double>(call.positions[row]) * call.frequencies[i];
            const auto cos = static_cast<float>(std::cos(angle) * call.scaling);
            const auto sin = static_cast<float>(std::sin(angle) * call.scaling);
            const int64_t at = row * 2 * call.half + i * first;
            call.cos[at] = call.cos[at + second] = cos;
            call.sin[at] = -sin;
            call.sin[at + second] = sin;
        }
    return 0;
}

extern "C" int32_t sgl_widen(const SglWiden* arguments) {
    const SglWiden& call = *arguments;
    if (!is_dtype(call.dtype) || call.num_threads < 1 || call.width < 1) return -1;
    const int64_t bytes = call.dtype == SGL_FLOAT32 ? 4 : 2;
    sgl::for_each_index(call.rows, call.num_threads, [&] {
        return [&](int64_t row) {
            const char* x = static_cast<const char*>(call.x) + row * call.x_row * bytes;
            widen_rows(x, call.dtype, 0, 1, call.width, call.out + row * call.width);
        };
    });
    return 0;
}

extern "C" int32_t sgl_store(const SglStore* arguments) {
    const SglStore& call = *arguments;
    if (call.num_threads < 1 || call.k_bytes < 1 || call.v_bytes < 1) return -1;
    const int64_t rows = std::max<int64_t>(1, kTaskBytes / (call.k_bytes + call.v_bytes));
    sgl::for_each_index((call.rows + rows - 1) / rows, call.num_threads, [&] {
        return [&](int64_t i) {
            const int64_t last = std::min(call.rows, (i + 1) * rows);
            for (int64_t row = i * rows; row < last; ++row) {
                const int64_t slot = call.slots[row];
                std::memcpy(static_cast<char*>(call.k_plane) + slot * call.k_slot,
                            static_cast<const char*>(call.k) + row * call.k_row,
                            static_cast<size_t>(call.k_bytes));
                std::memcpy(static_cast<char*>(call.v_plane) + slot * call.v_slot,
                            static_cast<const char*>(call.v) + row * call.v_row,
                            static_cast<size_t>(call.v_bytes));
            }
        };
    });
    return 0;
}

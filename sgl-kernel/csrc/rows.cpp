// Work on single rows: chooses the instructions and gives each thread ranges of rows.
#include "rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "choose.h"
#include "input_rows.h"
#include "numbers.h"
#include "parallel.h"

namespace {

constexpr int64_t kTaskElements = 32 << 10;  // fewer are not worth a thread's waking
constexpr int64_t kTeamElements = 4 << 10;   // the same where threads wait without sleeping
constexpr int64_t kTaskBytes = 256 << 10;    // copied

template <class Call>
void over_rows(const Call& call, void (*work)(const Call&, int64_t, int64_t)) {
    const int64_t elements = sgl::leads_team() ? kTeamElements : kTaskElements;
    const int64_t rows = std::max<int64_t>(1, elements / std::max<int64_t>(1, call.width));
    sgl::for_each_index((call.rows + rows - 1) / rows, call.num_threads, [&] {
        return [&](int64_t i) { work(call, i * rows, std::min(call.rows, (i + 1) * rows)); };
    });
}

// One plane's part of a store: rows of `bytes`, `from_row` apart, into slots `slot_bytes` apart.
struct StoreSide {
    const void* from;
    void* plane;
    int64_t from_row, slot_bytes, bytes, dim;  // dim: numbers of a head
    float factor;                              // of numbers that are rounded to fp8

    const char* row(int64_t number) const {
        return static_cast<const char*>(from) + number * from_row;
    }
    char* slot(int64_t number) const { return static_cast<char*>(plane) + number * slot_bytes; }
};

void copy_rows(const SglStore& call, const StoreSide& side, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row)
        std::memcpy(side.slot(call.slots[row]), side.row(row), static_cast<size_t>(side.bytes));
}

template <class X, class Plane>
void round_rows(const SglStore& call, const StoreSide& side, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
        const X* from = reinterpret_cast<const X*>(side.row(row));
        Plane* to = reinterpret_cast<Plane*>(side.slot(call.slots[row]));
#pragma omp simd
        for (int64_t d = 0; d < side.bytes; ++d) store(to_float(from[d]) * side.factor, to + d);
    }
}

template <class T>
void scale_rows(const SglScale& call, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
        const T* x = static_cast<const T*>(call.x) + row * call.x_row;
        T* out = static_cast<T*>(call.out) + row * call.out_row;
        float factor = call.factor;
        if (call.positions) {
            const double steps =
                std::floor((static_cast<double>(call.positions[row]) + 1.0) / call.floor_scale);
            factor = static_cast<float>(1.0 + call.attn_scale * std::log1p(steps));
        }
#pragma omp simd
        for (int64_t d = 0; d < call.width; ++d) store(to_float(x[d]) * factor, out + d);
    }
}

// A head in multiples of its largest over 127, and behind it the float that they are multiples of.
template <class X>
void pack_head(const X* from, int64_t dim, char* to) {
    constexpr float kMost = 0x1.fffffep127f;
    float most = 0.0f;
    bool nan = false;
    for (int64_t d = 0; d < dim; ++d) {
        const float size = std::fabs(to_float(from[d]));
        nan |= size != size;
        most = size > most ? size : most;
    }
    const float scale = nan ? from_bits(0x7fc00000u) : (most > kMost ? kMost : most) / 127.0f;
    for (int64_t d = 0; d < dim; ++d) {
        float code = scale > 0.0f ? to_float(from[d]) / scale : 0.0f;
        code = code > 127.0f ? 127.0f : code < -127.0f ? -127.0f : code;
        to[d] = static_cast<char>(std::lrint(code));
    }
    std::memcpy(to + dim, &scale, sizeof scale);
}

template <class X>
void pack_rows(const SglStore& call, const StoreSide& side, int64_t first, int64_t last) {
    const int64_t packed = side.dim + int64_t{sizeof(float)};
    for (int64_t row = first; row < last; ++row) {
        const X* from = reinterpret_cast<const X*>(side.row(row));
        char* to = side.slot(call.slots[row]);
        for (int64_t at = 0; at < side.bytes; at += packed, from += side.dim)
            pack_head(from, side.dim, to + at);
    }
}

using StoreRows = void (*)(const SglStore&, const StoreSide&, int64_t, int64_t);

template <class Plane>
StoreRows rounding_of(int32_t x_dtype) {
    if (x_dtype == SGL_FLOAT32) return round_rows<float, Plane>;
    if (x_dtype == SGL_BFLOAT16) return round_rows<Bf16, Plane>;
    return x_dtype == SGL_FLOAT16 ? round_rows<Fp16, Plane> : nullptr;
}

StoreRows storing_of(const SglStore& call) {
    if (call.plane_dtype == -1) return copy_rows;
    if (call.plane_dtype == SGL_FP8_E4M3) return rounding_of<E4m3>(call.x_dtype);
    if (call.plane_dtype == SGL_INT8) {
        const int64_t scale = sizeof(float);
        const bool whole = call.k_dim > 0 && call.k_bytes % (call.k_dim + scale) == 0 &&
                           call.v_dim > 0 && call.v_bytes % (call.v_dim + scale) == 0;
        if (!whole) return nullptr;
        if (call.x_dtype == SGL_FLOAT32) return pack_rows<float>;
        if (call.x_dtype == SGL_BFLOAT16) return pack_rows<Bf16>;
        return call.x_dtype == SGL_FLOAT16 ? pack_rows<Fp16> : nullptr;
    }
    return call.plane_dtype == SGL_FP8_E5M2 ? rounding_of<E5m2>(call.x_dtype) : nullptr;
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

extern "C" int32_t sgl_gate(const SglGate* arguments) {
    const SglGate& call = *arguments;
    if (!is_dtype(call.dtype) || call.num_threads < 1 || call.width < 1) return -1;
    if (call.kind < SGL_GATE_SILU || call.kind > SGL_GATE_CLAMPED) return -1;
    over_rows(call, SGL_CHOOSE(call.isa, sgl::gate_rows));
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

extern "C" int32_t sgl_scale(const SglScale* arguments) {
    const SglScale& call = *arguments;
    if (!is_dtype(call.dtype) || call.num_threads < 1 || call.width < 1) return -1;
    over_rows(call, call.dtype == SGL_FLOAT32    ? scale_rows<float>
                    : call.dtype == SGL_BFLOAT16 ? scale_rows<Bf16>
                                                 : scale_rows<Fp16>);
    return 0;
}

void sgl::store_columns(const SglStore& call, bool of_v, int64_t first, int64_t count,
                        int64_t bytes) {
    const int64_t dim = of_v ? call.v_dim : call.k_dim;
    const auto stored = [&](int64_t columns) {  // bytes in the plane
        if (call.plane_dtype == -1) return columns * bytes;
        if (call.plane_dtype != SGL_INT8) return columns;
        return columns / dim * (dim + int64_t{sizeof(float)});
    };
    const auto* from = static_cast<const char*>(of_v ? call.v : call.k) + first * bytes;
    auto* plane = static_cast<char*>(of_v ? call.v_plane : call.k_plane) + stored(first);
    const StoreSide side{from, plane, of_v ? call.v_row : call.k_row,
                         of_v ? call.v_slot : call.k_slot, stored(count), dim,
                         of_v ? call.v_factor : call.k_factor};
    storing_of(call)(call, side, 0, call.rows);
}

extern "C" int32_t sgl_store(const SglStore* arguments) {
    const SglStore& call = *arguments;
    const StoreRows work = storing_of(call);
    if (!work || call.num_threads < 1 || call.k_bytes < 1 || call.v_bytes < 1) return -1;
    const StoreSide k{call.k,      call.k_plane, call.k_row,   call.k_slot,
                      call.k_bytes, call.k_dim,   call.k_factor};
    const StoreSide v{call.v,      call.v_plane, call.v_row,   call.v_slot,
                      call.v_bytes, call.v_dim,   call.v_factor};
    const int64_t rows = std::max<int64_t>(1, kTaskBytes / (call.k_bytes + call.v_bytes));
    sgl::for_each_index((call.rows + rows - 1) / rows, call.num_threads, [&] {
        return [&](int64_t i) {
            const int64_t last = std::min(call.rows, (i + 1) * rows);
            work(call, k, i * rows, last);
            work(call, v, i * rows, last);
        };
    });
    return 0;
}

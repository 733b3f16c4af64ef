// Norms, gates and rotations of rows as plain loops in fp32, which the compiler turns into vectors: compiled
// once per instruction set. A row is read from memory once; its second reading is from the cache.
#pragma once

#include <cmath>
#include <type_traits>

#include "numbers.h"
#include "rows.h"

namespace {

// e^x to about 2 ulp for any x, without a branch: 2^k times a polynomial; 0 and infinity beyond.
inline float exp_any(float x) {
    constexpr float kLog2e = 1.44269504088896340736f;
    float y = x * kLog2e;
    y = y < -127.0f ? -127.0f : y;
    y = y > 128.0f ? 128.0f : y;
    const float whole = std::floor(y + 0.5f), p = exp2_fraction(y - whole);
    // in two factors: the exponent alone would leave the range at both ends
    const int32_t k = static_cast<int32_t>(whole), half = k >> 1;
    return p * from_bits(static_cast<uint32_t>(half + 127) << 23) *
           from_bits(static_cast<uint32_t>(k - half + 127) << 23);
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exp_any(-x)); }

inline float gated(const SglGate&, std::integral_constant<int, SGL_GATE_SILU>, float gate, float up) {
    return gate / (1.0f + exp_any(-gate)) * up;
}
// 1 + tanh(y) is twice the sigmoid of 2 y.
inline float gated(const SglGate&, std::integral_constant<int, SGL_GATE_GELU_TANH>, float gate,
                   float up) {
    constexpr float kTwice = 1.59576912160573071f;  // 2 sqrt(2 / pi)
    return gate * sigmoid(kTwice * (gate + 0.044715f * gate * gate * gate)) * up;
}
inline float gated(const SglGate& call, std::integral_constant<int, SGL_GATE_CLAMPED>, float gate,
                   float up) {
    gate = gate > call.limit ? call.limit : gate;
    up = up > call.limit ? call.limit : up < -call.limit ? -call.limit : up;
    return (up + 1.0f) * gate * sigmoid(call.alpha * gate);
}

template <class X, class W>
inline void norm_row(const SglNorm& call, int64_t row) {
    const int64_t width = call.width;
    const X* x = static_cast<const X*>(call.x) + row / call.group * call.x_group +
                 row % call.group * call.x_row;
    const W* weight = static_cast<const W*>(call.weight);
    W* out = static_cast<W*>(call.out) + row * call.out_row;
    float squares = 0.0f;
    if (call.residual) {
        const float* residual = call.residual + row * call.residual_row;
        float* total = call.total + row * call.total_row;
#pragma omp simd reduction(+ : squares)
        for (int64_t d = 0; d < width; ++d) {
            const float value = to_float(x[d]) + residual[d];
            total[d] = value;
            squares += value * value;
        }
        const float scale = 1.0f / std::sqrt(squares / static_cast<float>(width) + call.eps);
#pragma omp simd
        for (int64_t d = 0; d < width; ++d)
            store(total[d] * scale * (call.offset + to_float(weight[d])), out + d);
        return;
    }
    if (call.total) {
        float* total = call.total + row * call.total_row;
#pragma omp simd
        for (int64_t d = 0; d < width; ++d) total[d] = to_float(x[d]);
    }
#pragma omp simd reduction(+ : squares)
    for (int64_t d = 0; d < width; ++d) squares += to_float(x[d]) * to_float(x[d]);
    const float scale = 1.0f / std::sqrt(squares / static_cast<float>(width) + call.eps);
#pragma omp simd
    for (int64_t d = 0; d < width; ++d)
        store(to_float(x[d]) * scale * (call.offset + to_float(weight[d])), out + d);
}

template <class X, class W>
inline void norm_some(const SglNorm& call, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) norm_row<X, W>(call, row);
}

template <class X>
inline void norm_from(const SglNorm& call, int64_t first, int64_t last) {
    if (call.dtype == SGL_FLOAT32) norm_some<X, float>(call, first, last);
    if (call.dtype == SGL_BFLOAT16) norm_some<X, Bf16>(call, first, last);
    if (call.dtype == SGL_FLOAT16) norm_some<X, Fp16>(call, first, last);
}

inline void norm_any(const SglNorm& call, int64_t first, int64_t last) {
    if (call.x_dtype == SGL_FLOAT32) norm_from<float>(call, first, last);
    if (call.x_dtype == SGL_BFLOAT16) norm_from<Bf16>(call, first, last);
    if (call.x_dtype == SGL_FLOAT16) norm_from<Fp16>(call, first, last);
}

template <class T, int kKind>
inline void gate_kind(const SglGate& call, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
        const T* gate = static_cast<const T*>(call.x) + row * call.x_row;
        const T* up = gate + call.width;
        T* out = static_cast<T*>(call.out) + row * call.out_row;
#pragma omp simd
        for (int64_t d = 0; d < call.width; ++d)
            store(gated(call, std::integral_constant<int, kKind>(), to_float(gate[d]), to_float(up[d])),
                  out + d);
    }
}

template <class T>
inline void gate_some(const SglGate& call, int64_t first, int64_t last) {
    if (call.kind == SGL_GATE_SILU) gate_kind<T, SGL_GATE_SILU>(call, first, last);
    if (call.kind == SGL_GATE_GELU_TANH) gate_kind<T, SGL_GATE_GELU_TANH>(call, first, last);
    if (call.kind == SGL_GATE_CLAMPED) gate_kind<T, SGL_GATE_CLAMPED>(call, first, last);
}

inline void gate_any(const SglGate& call, int64_t first, int64_t last) {
    if (call.dtype == SGL_FLOAT32) gate_some<float>(call, first, last);
    if (call.dtype == SGL_BFLOAT16) gate_some<Bf16>(call, first, last);
    if (call.dtype == SGL_FLOAT16) gate_some<Fp16>(call, first, last);
}

template <class T>
inline void rotate_head(const T* x, const float* cos, const float* sin, T* out, int64_t dim,
                        bool interleaved) {
    const int64_t half = dim / 2;
    if (interleaved) {
#pragma omp simd
        for (int64_t i = 0; i < half; ++i) {
            const float a = to_float(x[2 * i]), b = to_float(x[2 * i + 1]);
            store(a * cos[2 * i] + b * sin[2 * i], out + 2 * i);
            store(b * cos[2 * i + 1] + a * sin[2 * i + 1], out + 2 * i + 1);
        }
        return;
    }
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
        const float a = to_float(x[i]), b = to_float(x[half + i]);
        store(a * cos[i] + b * sin[i], out + i);
        store(b * cos[half + i] + a * sin[half + i], out + half + i);
    }
}

template <class T>
inline void rotate_some(const SglRotate& call, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
        const T* x = static_cast<const T*>(call.x) + row * call.x_row;
        T* out = static_cast<T*>(call.out) + row * call.out_row;
        const float* cos = call.cos + row * call.angle_row;
        const float* sin = call.sin + row * call.angle_row;
        for (int64_t d = 0; d < call.width; d += call.head_dim)
            rotate_head(x + d, cos, sin, out + d, call.head_dim, call.interleaved != 0);
    }
}

inline void rotate_any(const SglRotate& call, int64_t first, int64_t last) {
    if (call.dtype == SGL_FLOAT32) rotate_some<float>(call, first, last);
    if (call.dtype == SGL_BFLOAT16) rotate_some<Bf16>(call, first, last);
    if (call.dtype == SGL_FLOAT16) rotate_some<Fp16>(call, first, last);
}

// Two passes: which is the highest, then where it stands. A block without it is passed over whole.
inline void highest_some(const SglHighest& call, int64_t first, int64_t last) {
    constexpr int64_t kBlock = 256;
    for (int64_t row = first; row < last; ++row) {
        const float* x = call.x + row * call.x_row;
        float highest = -INFINITY;
        int bad = 0;
#pragma omp simd reduction(max : highest) reduction(| : bad)
        for (int64_t d = 0; d < call.width; ++d) {
            highest = x[d] > highest ? x[d] : highest;
            bad |= x[d] != x[d];
        }
        int64_t place = 0;
        for (int64_t begin = 0; !bad && begin < call.width; begin += kBlock) {
            const int64_t end = begin + kBlock < call.width ? begin + kBlock : call.width;
            int found = 0;
#pragma omp simd reduction(| : found)
            for (int64_t d = begin; d < end; ++d) found |= x[d] == highest;
            if (!found) continue;
            for (place = begin; x[place] != highest;) ++place;
            break;
        }
        call.highest[row] = bad ? NAN : highest;
        call.place[row] = place;
    }
}

// Weights in (0, 1]; what is below e^-87 would not be a normal number, and is 0.
inline void weigh_blocks(const float* logits, int64_t width, float highest, float temperature,
                         float least, float* weights, float* sums, float* tops) {
    constexpr int64_t kBlock = sgl::kWeightBlock;
    constexpr float kLowest = -87.0f;
    for (int64_t begin = 0; begin < width; begin += kBlock, ++sums, ++tops) {
        const int64_t count = width - begin < kBlock ? width - begin : kBlock;
        const float* x = logits + begin;
        float* to = weights + begin;
        float sum = 0.0f, top = 0.0f;
#pragma omp simd reduction(+ : sum) reduction(max : top)
        for (int64_t d = 0; d < count; ++d) {
            const float y = (x[d] - highest) / temperature;
            float w = exp_any(y);
            w = y >= kLowest && w >= least ? w : 0.0f;  // NaN is none
            to[d] = w;
            sum += w;
            top = w > top ? w : top;
        }
        for (int64_t d = count; d < kBlock; ++d) to[d] = 0.0f;
        *sums = sum;
        *tops = top;
    }
}

}  // namespace

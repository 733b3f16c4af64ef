// Vectors of floats as the attention kernels use them: loads and stores of any cells, powers of two, and
// lanes that are seen.
//
// The including file defines `Isa` and `Math`.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

typedef int32_t Int32s __attribute__((vector_size(sizeof(Isa::F))));

inline Isa::F load_cells(const float* x) {
    Isa::F y;
    std::memcpy(&y, x, sizeof y);
    return y;
}
inline void store_cells(Isa::F x, float* to) { std::memcpy(to, &x, sizeof x); }
inline Isa::F spread(float x) { return Math::broadcast(&x); }

// 2^x for x <= 0; 0 for minus infinity, NaN for NaN.
template <bool kShort>
inline Isa::F exp2_lanes(Isa::F x) {
    x = Math::max(spread(Math::kLeastPower), x);
    const Isa::F whole = Math::round(x), t = x - whole;
    Isa::F y;
    if (kShort) {
        y = spread(9.5827768e-3f);
        y = y * t + spread(5.5907213e-2f);
        y = y * t + spread(2.4024105e-1f);
        y = y * t + spread(6.9312410e-1f);
    } else {
        y = spread(1.5403530e-4f);
        y = y * t + spread(1.3333558e-3f);
        y = y * t + spread(9.6181291e-3f);
        y = y * t + spread(5.5504109e-2f);
        y = y * t + spread(2.4022651e-1f);
        y = y * t + spread(6.9314718e-1f);
    }
    return Math::times_power(y * t + spread(1.0f), whole);
}

// Lanes [begin, end) of x, minus infinity elsewhere.
inline Isa::F keep_lanes(Isa::F x, int begin, int end) {
    Int32s lane;
    for (int i = 0; i < Isa::kLanes; ++i) lane[i] = i;
    return (lane >= begin) & (lane < end) ? x : spread(-INFINITY);
}

}  // namespace

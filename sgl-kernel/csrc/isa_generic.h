// Vectors in plain C++; on ARM the compiler makes NEON of them, which every such CPU has.
#pragma once

#include "numbers.h"

namespace {

struct Isa {
    static constexpr int kLanes = 4;
    typedef float F __attribute__((vector_size(16)));

    template <class T>
    static F load(const T* x) {
        return F{to_float(x[0]), to_float(x[1]), to_float(x[2]), to_float(x[3])};
    }
    static float sum(F x) { return (x[0] + x[1]) + (x[2] + x[3]); }
};

}  // namespace

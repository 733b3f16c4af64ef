// Vectors in plain C++; on ARM the compiler makes NEON of them, which every such CPU has.
#pragma once

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "numbers.h"

namespace {

struct Isa {
    static constexpr int kLanes = 4;
    typedef float F __attribute__((vector_size(16)));

    template <class T>
    static F load(const T* x) {
        return F{to_float(x[0]), to_float(x[1]), to_float(x[2]), to_float(x[3])};
    }
    static constexpr int kWide = 1;
    template <class T>
    static void load_some(const T* x, F (&out)[1]) { out[0] = load(x); }
    template <class T>
    static constexpr bool reorders(T) { return false; }
    // 32 codes of half a byte, the values that these name, or signed bytes, as floats.
    static void halves(const uint8_t* codes, F (&out)[8]) {
        float values[32];
        for (int i = 0; i < 16; ++i) {
            values[i] = static_cast<float>(codes[i] & 15);
            values[16 + i] = static_cast<float>(codes[i] >> 4);
        }
        std::memcpy(out, values, sizeof(values));
    }
    static void named(const uint8_t* codes, const int8_t* values, F (&out)[8]) {
        int8_t found[32];
#if defined(__aarch64__)
        const uint8x16_t both = vld1q_u8(codes);
        const int8x16_t all = vld1q_s8(values);
        vst1q_s8(found, vqtbl1q_s8(all, vandq_u8(both, vdupq_n_u8(15))));
        vst1q_s8(found + 16, vqtbl1q_s8(all, vshrq_n_u8(both, 4)));
#else
        for (int i = 0; i < 16; ++i) {
            found[i] = values[codes[i] & 15];
            found[16 + i] = values[codes[i] >> 4];
        }
#endif
        signed_bytes(found, out);
    }
    static void signed_bytes(const int8_t* codes, F (&out)[8]) {
        float values[32];
        for (int i = 0; i < 32; ++i) values[i] = static_cast<float>(codes[i]);
        std::memcpy(out, values, sizeof(values));
    }
    static void widen(const Fp16* from, int64_t count, float* to) {
        for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]);
    }
    static float sum(F x) { return (x[0] + x[1]) + (x[2] + x[3]); }
};

}  // namespace

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
    // 32 E4M3 over 2^8; on ARM their bits in a 16-bit float's places, whose exponent has another bias.
    static void e4m3(const uint8_t* codes, F (&out)[8]) {
#if defined(__aarch64__)
        for (int i = 0; i < 4; ++i) {
            const int16x8_t wide = vmovl_s8(vreinterpret_s8_u8(vld1_u8(codes + 8 * i)));
            // The sign comes twice: once where it belongs, once where it has to go.
            const uint16x8_t bits = vshlq_n_u16(vreinterpretq_u16_s16(wide), 7);
            const uint16x8_t sized = vorrq_u16(bits, vdupq_n_u16(0xc000));
            const uint16x8_t lost = vceqq_u16(sized, vdupq_n_u16(0xff80));
            const uint16x8_t one = vandq_u16(bits, vdupq_n_u16(0xbfff));
            const uint16x8_t half = vorrq_u16(one, vandq_u16(lost, vdupq_n_u16(0x4000)));
            out[2 * i] = vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(half)));
            out[2 * i + 1] = vcvt_f32_f16(vreinterpret_f16_u16(vget_high_u16(half)));
        }
#else
        float values[32];
        for (int i = 0; i < 32; ++i) values[i] = to_float(E4m3{codes[i]}) * 0x1p-8f;
        std::memcpy(out, values, sizeof(values));
#endif
    }
    static void widen(const Fp16* from, int64_t count, float* to) {
        for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]);
    }
    static float sum(F x) { return (x[0] + x[1]) + (x[2] + x[3]); }
};

}  // namespace

// Floats of 16 and of 8 bits by their bits, and their conversions without special instructions.
//
// In an unnamed namespace on purpose: each instruction set's file gets its own copy, so that the
// linker can never take one that this processor cannot run.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

struct Bf16 {
    uint16_t bits;
};
struct Fp16 {
    uint16_t bits;
};

// fp8: 4 bits of exponent with NaN and no infinity, or the upper byte of an Fp16.
struct E4m3 {
    uint8_t bits;
};
struct E5m2 {
    uint8_t bits;
};

// A row of a head in signed bytes, and behind them the float that they are multiples of.
struct Int8 {
    int8_t code;
};

inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(Bf16 x) { return from_bits(uint32_t{x.bits} << 16); }
inline float to_float(Fp16 x) {
    const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, rest = x.bits & 0x7fffu;
    if (rest >= 0x7c00) return from_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    // A power of two moves the exponent's bias, and makes subnormals normal on the way.
    return from_bits(sign | to_bits(from_bits(rest << 13) * 0x1p112f));
}

// Subnormals are counted out: multiplied, they would be subnormal floats, which some processors
// take a hundred times as long for.
inline float to_float(E4m3 x) {
    const uint32_t sign = uint32_t{x.bits & 0x80u} << 24, rest = x.bits & 0x7fu;
    const float small = static_cast<float>(static_cast<int32_t>(rest)) * 0x1p-9f;
    uint32_t bits = rest < 8 ? to_bits(small) : (rest << 20) + 0x3c000000u;
    bits = rest == 0x7f ? 0x7fc00000u : bits;
    return from_bits(sign | bits);
}
inline float to_float(E5m2 x) {
    const uint32_t sign = uint32_t{x.bits & 0x80u} << 24, rest = x.bits & 0x7fu;
    const float small = static_cast<float>(static_cast<int32_t>(rest)) * 0x1p-16f;
    uint32_t bits = rest < 4 ? to_bits(small) : (rest << 21) + 0x38000000u;
    bits = rest >= 0x7c ? 0x7f800000u | rest << 21 : bits;
    return from_bits(sign | bits);
}

// 2^t for |t| <= 1/2 and a little beyond, to about 2 ulp.
inline float exp2_fraction(float t) {
    float y = 1.5403530e-4f;
    y = y * t + 1.3333558e-3f;
    y = y * t + 9.6181291e-3f;
    y = y * t + 5.5504109e-2f;
    y = y * t + 2.4022651e-1f;
    y = y * t + 6.9314718e-1f;
    y = y * t + 1.0f;
    return y;
}

// 2^x for x <= 0, exact to about 2 ulp: the integer part into the exponent, the rest a polynomial.
inline float exp2_small(float x) {
    x = x < -126.0f ? -126.0f : x;
    const float whole = static_cast<float>(static_cast<int32_t>(x - 0.5f));
    const float y = exp2_fraction(x - whole);
    return from_bits(to_bits(y) + (static_cast<uint32_t>(static_cast<int32_t>(whole)) << 23));
}

inline void store(float value, float* to) { *to = value; }

// Round to nearest, ties to even; NaN stays NaN.
inline void store(float value, Bf16* to) {
    const uint32_t bits = to_bits(value);
    if (value != value) {
        to->bits = static_cast<uint16_t>(bits >> 16 | 0x40u);
        return;
    }
    to->bits = static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline void store(float value, Fp16* to) {
    const uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000u;
    uint32_t rest = bits & 0x7fffffffu, half;
    if (rest > 0x7f800000u) {
        half = 0x7e00u;
    } else if (rest >= 0x477ff000u) {  // rounds to 65,536 or more
        half = 0x7c00u;
    } else if (rest < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded value in the bits
        half = to_bits(from_bits(rest) + 0.5f) - 0x3f000000u;
    } else {
        rest += 0xfffu + (rest >> 13 & 1u);
        half = (rest - 0x38000000u) >> 13;
    }
    to->bits = static_cast<uint16_t>(sign | half);
}

// To the nearest float with kBits bits of fraction, ties to even, as the code of an fp8 without its
// sign. kLeast are the bits of the smallest normal one, kMost those of the largest finite one.
template <int kBits, uint32_t kLeast, uint32_t kMost>
inline uint32_t round_fp8(uint32_t rest) {
    constexpr int kDrop = 23 - kBits;
    rest = rest > kMost ? kMost : rest;
    const uint32_t even = rest + (1u << (kDrop - 1)) - 1 + (rest >> kDrop & 1u);
    const uint32_t normal = (even - kLeast + (1u << 23)) >> kDrop;
    // Added to this power, a subnormal's last bit stands last in the sum: the addition rounds.
    constexpr uint32_t kPower = kLeast + (uint32_t{kDrop} << 23);
    const uint32_t small = to_bits(from_bits(rest) + from_bits(kPower)) - kPower;
    return rest < kLeast ? small : normal;
}

inline void store(float value, E4m3* to) {
    const uint32_t bits = to_bits(value), rest = bits & 0x7fffffffu;
    const uint32_t code = round_fp8<3, 0x3c800000u, 0x43e00000u>(rest);  // 2^-6, 448
    to->bits = static_cast<uint8_t>((bits >> 24 & 0x80u) | (rest > 0x7f800000u ? 0x7fu : code));
}
inline void store(float value, E5m2* to) {
    const uint32_t bits = to_bits(value), rest = bits & 0x7fffffffu;
    const uint32_t code = round_fp8<2, 0x38800000u, 0x47600000u>(rest);  // 2^-14, 57,344
    to->bits = static_cast<uint8_t>((bits >> 24 & 0x80u) | (rest > 0x7f800000u ? 0x7fu : code));
}

}  // namespace

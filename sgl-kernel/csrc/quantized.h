// What the files of products with quantised weights share.
#pragma once

#include <cstdint>

#include "api.h"

namespace sgl {

// From so many rows on the codes of a few outputs become floats once for all of them.
constexpr int64_t kManyRows = 6;

// Outputs [first, last) of all rows. `x` is the input in fp32 [rows, in_features]. `sums` is the sum of
// each of its groups [rows, in_features / group], read for fewer than kManyRows rows and a weight with
// minima only.
using MultiplyQuantized = void (*)(const SglQuantized&, const float* x, const float* sums,
                                   int64_t first, int64_t last);
// Rows [first, last) of the weight into `out`.
using Dequantize = void (*)(const SglQuantized&, int64_t first, int64_t last);

// Products of inputs that are rounded to bytes: room for these, how they get there from fp32 [rows,
// in_features], row after row, and outputs [first, last) of all rows.
struct RoundedProduct {
    int64_t (*bytes)(const SglQuantized&);
    void (*round)(const SglQuantized&, const float* x, char* to);
    void (*multiply)(const SglQuantized&, const char* x, int64_t first, int64_t last);
};
// The best that a level of instructions has, or null.
const RoundedProduct* rounded_product(int32_t isa);

// AVX-512's dot products of bytes: quantized_lines.h says how inputs lie. Those of more than a few rows
// are in quantized_lanes.cpp.
extern const RoundedProduct rounded_dots;
void multiply_lanes(const SglQuantized&, const char* x, int64_t first, int64_t last);
// AVX2: rounded_parts.h says how inputs lie.
extern const RoundedProduct rounded_pairs;
// The same with AVX-VNNI, which gives the same bits.
extern const RoundedProduct rounded_vex;
bool has_avx_vnni();
int64_t rounded_bytes_in_parts(const SglQuantized&);
void round_inputs_in_parts(const SglQuantized&, const float* x, char* to);

// The inputs as they are, for multiply_packed, which rounds the weight: room for them, and how 16 rows,
// from 16 * tile on, get there. See quantized_amx.cpp.
int64_t packed_bytes(const SglQuantized&);
void pack_inputs(const SglQuantized&, int64_t tile, char* to);
void multiply_packed(const SglQuantized&, const char* x, int64_t first, int64_t last);

// bfloat16 inputs as they are with E4M3, by dot instructions of bfloat16. See fp8_dots.cpp.
#if defined(__x86_64__)
bool has_fp8_dots(const SglQuantized&);
void multiply_fp8_dots(const SglQuantized&, int64_t first, int64_t last);
#else
inline bool has_fp8_dots(const SglQuantized&) { return false; }
inline void multiply_fp8_dots(const SglQuantized&, int64_t, int64_t) {}
#endif

void multiply_quantized_generic(const SglQuantized&, const float*, const float*, int64_t, int64_t);
void multiply_quantized_avx2(const SglQuantized&, const float*, const float*, int64_t, int64_t);
void multiply_quantized_avx512(const SglQuantized&, const float*, const float*, int64_t, int64_t);
void dequantize_generic(const SglQuantized&, int64_t, int64_t);
void dequantize_avx2(const SglQuantized&, int64_t, int64_t);
void dequantize_avx512(const SglQuantized&, int64_t, int64_t);

}  // namespace sgl

namespace {

// Half a byte that is its own value, half a byte that names one of 16, the same where these are small (which
// AVX2 tells apart), a signed byte, or an E4M3.
enum class Code { kHalf, kNamed, kSmall, kByte, kFp8 };

constexpr int bits_of(Code code) { return code == Code::kByte || code == Code::kFp8 ? 8 : 4; }
inline Code code_of(const SglQuantized& call) {
    if (call.bits == 8) return call.is_fp8 ? Code::kFp8 : Code::kByte;
    return call.has_values ? Code::kNamed : Code::kHalf;
}

// Whether codes, groups and what goes with them are of a kind that there is.
inline bool is_layout(const SglQuantized& call) {
    if (call.bits == 4) return call.group == 32 && !call.is_fp8;
    if (call.bits != 8 || call.has_values) return false;
    if (call.is_fp8) return !call.mins && !call.round_inputs && call.group > 0 && call.group % 32 == 0;
    return call.group == 32 || call.group == 16;
}

// Scales stand so many bytes apart.
inline int64_t scale_bytes(const SglQuantized& call) { return call.is_fp8 ? 4 : 2; }

// Rows [first, first + count) of a product.
inline SglQuantized rows_of(const SglQuantized& whole, int64_t first, int64_t count) {
    const int64_t bytes = whole.dtype == SGL_FLOAT32 ? 4 : 2;
    SglQuantized some = whole;
    some.rows = count;
    some.x = static_cast<const char*>(whole.x) + first * whole.x_row * bytes;
    some.out = static_cast<char*>(whole.out) + first * whole.out_row * bytes;
    return some;
}

}  // namespace
